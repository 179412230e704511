"""A whole deployment on this machine: brokers, frontend and workers as child processes on loopback.

Used by ``vswa demo``, ``vswa serve`` and the tests. Brokers are those of NATS_SERVER and ETCD_ENDPOINTS
where these are set, else embedded ones that live as long as the cluster.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from vswa_plugin.dynamo import ETCD_ENV, LOOPBACK_ENV, NATS_ENV
from vswa_plugin.embedded import start_etcd, start_nats
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.processes import Child, free_port, python_module
from vswa_plugin.registry import Entry
from vswa_plugin.registry.opening import registry_from_env

WORKER_TIMEOUT_S = 120.0
Progress = Callable[[str], None]


class ClusterSettings(msgspec.Struct, frozen=True):
    """What to start.

    :param engine_args: engine options as a YAML file, or None.
    :param override: engine options laid over the file.
    :param http_port: port of the frontend; 0 for a free one.
    """

    model_path: str
    served_model_name: str
    engine: str = "gemma3_cpu"
    workers: int = 2
    namespace: str = "dynamo"
    engine_args: str | None = None
    override: dict[str, Any] = {}
    http_port: int = 0
    router_mode: str = "round-robin"
    worker_options: tuple[str, ...] = ()


class Cluster:
    """Children in the order in which they were started; stopped in the reverse order, brokers last."""

    def __init__(self, settings: ClusterSettings, folder: Path, progress: Progress = lambda _: None) -> None:
        self.settings = settings
        self.folder = folder
        self.nats_server = os.environ.get(NATS_ENV, "")
        self.etcd_endpoints = os.environ.get(ETCD_ENV, "")
        self.url = ""
        self.frontend: Child | None = None
        self.workers: list[Child] = []
        self._brokers: list[Child] = []
        self._progress = progress
        self._numbers = itertools.count()

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to find this cluster's brokers and to stay on loopback."""
        return {
            **LOOPBACK_ENV,
            NATS_ENV: self.nats_server,
            ETCD_ENV: self.etcd_endpoints,
            # Two processes that each take all cores for every matrix product are slower than one.
            "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"),
            "DYN_LOG": os.environ.get("DYN_LOG", "warn"),
        }

    async def start(self) -> None:
        """Start what is not started yet and return once the frontend serves the model from all workers."""
        if not (self.nats_server and self.etcd_endpoints):
            await self.start_brokers()
        await self.start_frontend()
        await asyncio.gather(*(self.add_worker() for _ in range(self.settings.workers)))
        await self.wait_for_model()

    async def start_brokers(self) -> None:
        if not self.nats_server:
            self._progress("starting an embedded nats-server")
            child, self.nats_server = await start_nats(self.folder)
            self._brokers.append(child)
        if not self.etcd_endpoints:
            self._progress("starting an embedded etcd")
            child, self.etcd_endpoints = await start_etcd(self.folder, self.folder / "etcd-data")
            self._brokers.append(child)

    async def start_frontend(self) -> None:
        port = self.settings.http_port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._progress(f"starting Dynamo's frontend on {self.url}")
        command = python_module("vswa_plugin.frontend", "--http-port", str(port))
        command += ["--router-mode", self.settings.router_mode, "--namespace", self.settings.namespace]
        self.frontend = await Child.start("frontend", command, self.folder, self.env)
        await self.frontend.until(self._answers, "answering", 60)

    async def add_worker(self, options: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Child:
        """Start one more worker and return once it is in the registry."""
        settings = self.settings
        name = f"worker-{next(self._numbers)}"
        command = python_module("vswa_plugin.worker", "--mode", "agg", "--engine", settings.engine)
        command += ["--model-path", settings.model_path, "--served-model-name", settings.served_model_name]
        command += ["--endpoint", f"dyn://{settings.namespace}.backend.generate"]
        if settings.engine_args:
            command += ["--extra-engine-args", settings.engine_args]
        if settings.override:
            command += ["--override-engine-args", json.dumps(settings.override)]
        command += [*settings.worker_options, *options]
        self._progress(f"starting {name}: {settings.engine} with {settings.model_path}")
        child = await Child.start(name, command, self.folder, {**self.env, **(env or {})})
        self.workers.append(child)
        registry = registry_from_env({**os.environ, **self.env})

        async def joined() -> bool:
            return any(entry.pid == child.pid for entry in await registry.entries())

        try:
            await child.until(joined, "registered", WORKER_TIMEOUT_S)
        finally:
            await registry.leave()
        return child

    async def entries(self) -> list[Entry]:
        """The workers in the registry."""
        registry = registry_from_env({**os.environ, **self.env})
        try:
            return await registry.entries()
        finally:
            await registry.leave()

    async def wait_for_model(self) -> None:
        """Return once the frontend lists the model."""
        if self.frontend is None:
            raise ConfigError("expected a frontend, got none: call start_frontend first")

        async def listed() -> bool:
            return self.settings.served_model_name in await self._models()

        self._progress("waiting until the frontend lists the model")
        await self.frontend.until(listed, f"listing {self.settings.served_model_name}", 30)

    async def stop(self) -> dict[str, int]:
        """Stop everything that runs; exit codes by name. Brokers go last, as Dynamo wants it."""
        first = [*self.workers, *([self.frontend] if self.frontend else [])]
        codes = dict(
            zip((c.name for c in first), await asyncio.gather(*(c.stop(40) for c in first)), strict=True)
        )
        for broker in reversed(self._brokers):
            codes[broker.name] = await broker.stop()
        return codes

    def check(self) -> None:
        """Raise ChildDied if anything has ended."""
        for child in (*self._brokers, *([self.frontend] if self.frontend else []), *self.workers):
            child.check()

    async def _answers(self) -> bool:
        try:
            await self._models()
        except ConnectError:
            return False
        return True

    async def _models(self) -> list[str]:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}/v1/models") as answer:
                return [model["id"] for model in (await answer.json()).get("data", [])]
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectError(f"expected the frontend at {self.url}, got {error}") from error
