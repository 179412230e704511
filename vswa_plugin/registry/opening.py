"""Which registry: from an argument or the environment.

VSWA_REGISTRY            etcd | http(s)://host:port,... | file:DIR | file (Dynamo's directory)
DYN_DISCOVERY_BACKEND    where VSWA_REGISTRY is not set: as Dynamo finds its instances, etcd | file; beside
                         another one, such as kubernetes, the etcd of ETCD_ENDPOINTS
DYN_FILE_KV              Dynamo's directory (default: dynamo_store_kv in the temporary directory)
ETCD_ENDPOINTS, ETCD_AUTH_*   see etcd_settings.py
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vswa_plugin.dynamo.names import DEFAULT_ETCD, ETCD_ENV
from vswa_plugin.errors import ConfigError, ConnectError, shown, unknown_choice
from vswa_plugin.registry import Registry
from vswa_plugin.registry.etcd_settings import EtcdSecurity
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.tasks import Tasks

__all__ = [
    "open_registry",
    "registry_from_env",
]

logger = logging.getLogger(__name__)

REGISTRY_ENV, DISCOVERY_ENV, FILE_ENV = "VSWA_REGISTRY", "DYN_DISCOVERY_BACKEND", "DYN_FILE_KV"
#: Dynamo's names of the backends that we have too; "" and kv_store mean etcd.
_DISCOVERY = {"": "etcd", "etcd": "etcd", "kv_store": "etcd", "file": "file"}

#: For ``--help``.
ENVIRONMENT = """\
  VSWA_REGISTRY    where workers register: etcd, file:DIR, or etcd URLs (default: as DYN_DISCOVERY_BACKEND)
  ETCD_ENDPOINTS   discovery and the registry, several with commas (default http://127.0.0.1:2379)
  ETCD_AUTH_USERNAME, ETCD_AUTH_PASSWORD     user of etcd, both or none
  ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT, ETCD_AUTH_CLIENT_KEY   PEM files, for https endpoints
  DYN_DISCOVERY_BACKEND, DYN_FILE_KV         Dynamo's discovery: etcd (default), file and its directory, or
                   kubernetes, beside which the registry is the etcd of ETCD_ENDPOINTS
"""


def open_registry(
    where: str, environ: Mapping[str, str] | None = None, tasks: Tasks | None = None
) -> Registry:
    """The registry that ``where`` names (see VSWA_REGISTRY above). Connects to nothing.

    :param tasks: where its long-lived tasks are watched.
    :raises ConfigError: names the variable that is wrong.
    """
    environ = os.environ if environ is None else environ
    scheme = where.partition(":")[0]
    if where == "etcd":
        return _etcd(environ.get(ETCD_ENV) or DEFAULT_ETCD, environ, tasks)
    if scheme in ("http", "https"):
        return _etcd(where, environ, tasks)
    if where == "file":
        return FileRegistry(_dynamo_directory(environ), tasks=tasks)
    if scheme == "file":
        return FileRegistry(_directory(where), tasks=tasks)
    known = ("etcd", "file", "file:DIR", "http://host:port", "https://host:port")
    raise ConfigError(f"{REGISTRY_ENV}: {unknown_choice('registry', where, known)}")


def registry_from_env(environ: Mapping[str, str] | None = None, tasks: Tasks | None = None) -> Registry:
    """The registry that VSWA_REGISTRY names, else the one beside Dynamo's discovery.

    :param tasks: where its long-lived tasks are watched.
    :raises ConfigError: names the variable that is wrong.
    """
    environ = os.environ if environ is None else environ
    where = environ.get(REGISTRY_ENV) or discovery_backend(environ) or (environ.get(ETCD_ENV) and "etcd")
    if not where:
        raise ConfigError(
            f"{DISCOVERY_ENV}: expected a registry beside {shown(environ[DISCOVERY_ENV])}, through which "
            f"Dynamo's processes find each other, but our routers no windows of workers; got none: set "
            f"{ETCD_ENV}, or {REGISTRY_ENV} to http://host:port of an etcd or to file:DIR on a shared volume"
        )
    return open_registry(where, environ, tasks)


async def reach(registry: Registry, timeout_s: float) -> None:
    """Return once ``registry`` answers; raises ConnectError after ``timeout_s``, with progress meanwhile."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            await registry.entries()
            return
        except ConnectError as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("%s; trying on", error)
            await asyncio.sleep(1)


async def reach_discovery(timeout_s: float) -> None:
    """The same for what Dynamo's runtime would wait for, which blocks the event loop for minutes."""
    backend = discovery_backend()
    if backend is None:
        return
    registry = open_registry(backend)
    try:
        await reach(registry, timeout_s)
    finally:
        await registry.close()


def discovery_backend(environ: Mapping[str, str] | None = None) -> str | None:
    """``etcd`` or ``file``: where Dynamo finds its instances. None where it is something else."""
    environ = os.environ if environ is None else environ
    return _DISCOVERY.get(environ.get(DISCOVERY_ENV, ""))


def _etcd(endpoints: str, environ: Mapping[str, str], tasks: Tasks | None) -> Registry:
    from vswa_plugin.registry.etcd import EtcdRegistry  # imports gRPC: not for those who use files

    return EtcdRegistry(endpoints, security=EtcdSecurity.from_env(environ), tasks=tasks)


def _directory(where: str) -> str:
    """The directory of ``file:DIR``, ``file:/DIR`` or ``file:///DIR``."""
    parts = urlsplit(where)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path:
        raise ConfigError(f"{REGISTRY_ENV}: expected file:DIR or file:///DIR, got {where!r}")
    return path


def _dynamo_directory(environ: Mapping[str, str]) -> Path:
    named = environ.get(FILE_ENV)
    # As Dynamo finds it. Python would go to another folder where TMPDIR names one that is not there.
    return Path(named) if named else Path(environ.get("TMPDIR") or "/tmp") / "dynamo_store_kv"
