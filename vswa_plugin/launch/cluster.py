"""A whole deployment on this machine: brokers, frontend and workers as child processes on loopback.

Used by ``vswa demo``, ``vswa serve``, ``python -m vswa_plugin.launch`` and the tests. Brokers are those of
NATS_SERVER and ETCD_ENDPOINTS where these are set, else embedded ones that live as long as the cluster.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import socket
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from vswa_plugin.dynamo.names import COMPONENTS, ETCD_ENV, LOOPBACK_ENV, NATS_ENV, ROUTER_COMPONENT
from vswa_plugin.engine.gpus import VISIBLE_ENV
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.launch.brokers import ETCD_FAULT, start_etcd, start_nats
from vswa_plugin.launch.complaints import Complaints
from vswa_plugin.launch.envoy import Address, EnvoySettings, envoy_config, find_envoy
from vswa_plugin.launch.probe import Probe
from vswa_plugin.launch.processes import Child, free_port, python_module
from vswa_plugin.launch.settings import ClusterSettings as ClusterSettings
from vswa_plugin.launch.settings import (
    check_settings,
    named_registry,
    router_address,
    router_arguments,
    routing_environment,
    status_port,
    worker_arguments,
)
from vswa_plugin.launch.targets import write_targets
from vswa_plugin.launch.topologies import WorkerGroup
from vswa_plugin.program.addresses import check_address, local_url
from vswa_plugin.registry import Entry, Registry
from vswa_plugin.registry.opening import open_registry, registry_from_env

WORKER_TIMEOUT_S = 120.0
READY_TIMEOUT_S = 30.0
#: How long a worker may drain before it is killed; above its own --drain-timeout.
STOP_TIMEOUT_S = 40.0
Progress = Callable[[str], None]
#: Lets the frontend's headers wait for the first token, for ten minutes at most.
PEEK_ENV = {"DYN_HTTP_PRE_COMMIT_ERROR_PEEK_MS": "600000"}
#: Between two looks at how large the logs are.
LOG_INTERVAL_S = 1.0


class Cluster:
    """Children by kind. They are stopped workers first, then routers and frontend, then brokers."""

    def __init__(
        self,
        settings: ClusterSettings,
        folder: Path,
        progress: Progress = lambda _: None,
        scratch: Path | None = None,
    ) -> None:
        """:param folder: for logs.
        :param scratch: for what no later cluster may find, such as etcd's data; by default ``folder``.
        """
        self.settings = settings
        self.folder = folder
        self._scratch = scratch or folder
        self.nats_server = os.environ.get(NATS_ENV, "")
        self.etcd_endpoints = os.environ.get(ETCD_ENV, "")
        self.url = ""
        self.frontend: Child | None = None
        self.workers: list[Child] = []
        self.routers: list[Child] = []
        #: Before the frontend, where pickers choose for it.
        self.envoy: Child | None = None
        #: HTTP API of each router.
        self.router_urls: list[str] = []
        self._brokers: list[Child] = []
        self._picks = settings.routing.router == "picker"
        self._pickers: list[Address] = []
        self._frontend_address: Address
        self._progress = progress
        self._numbers: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to find this cluster's brokers and to stay on loopback."""
        return {
            **{name: os.environ.get(name, value) for name, value in LOOPBACK_ENV.items()},
            NATS_ENV: self.nats_server,
            ETCD_ENV: self.etcd_endpoints,
            **routing_environment(self.settings.routing),
            # Two processes that each take all cores for every matrix product are slower than one.
            "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"),
            "DYN_LOG": os.environ.get("DYN_LOG", "warn"),
        }

    async def start(self) -> None:
        """Start what is not started yet and return once the frontend serves the model and knows all workers.

        :raises ConfigError: the settings contradict themselves; the frontend's port is taken; with ``keep``,
            what a process wants corrected.
        :raises ChildDied: something has ended.
        """
        check_settings(self.settings)
        await self.start_brokers()
        await self._start_frontend()
        if self._picks or self.settings.routing.router == "exact":
            for _ in range(self.settings.routing.count):
                await self.add_router()
        if self._picks:
            await self._start_envoy()
        for group in self.settings.groups:
            for _ in range(group.count):
                await self._start_worker(group)
        await _all(*(self._registered(child) for child in self.workers))
        await self._say_engines()
        await self.wait_for_model()
        await self.write_targets()

    async def start_brokers(self) -> None:
        if not self.nats_server:
            self._progress("starting an embedded nats-server")
            child, self.nats_server = await start_nats(self.folder)
            self._brokers.append(child)
        if not self.etcd_endpoints:
            self._progress(f"starting an embedded etcd, never for production: {ETCD_FAULT}")
            child, self.etcd_endpoints = await start_etcd(self.folder, self._scratch / "etcd-data")
            self._brokers.append(child)

    async def _start_frontend(self) -> None:
        settings = self.settings
        check_address(settings.http_host, settings.http_port)
        host, port = settings.http_host, settings.http_port or free_port()
        env = {}
        if self._picks:  # clients come to Envoy; and its picker learns of a first token by the headers
            host, port, env = "127.0.0.1", free_port(), PEEK_ENV
        self.url = local_url(host, port)
        self._frontend_address = Address(host, port)
        self._progress(f"starting Dynamo's frontend on {self.url}")
        command = python_module("vswa_plugin.frontend", "--http-port", str(port), "--http-host", host)
        mode = "kv" if settings.routing.router == "stock" else settings.router_mode
        command += ["--router-mode", mode, "--namespace", settings.namespace]
        self.frontend = await self._start_child("frontend", command, env)

    async def _start_envoy(self) -> None:
        """Let clients come to Envoy, which asks the pickers where each request goes."""
        settings = self.settings
        port = settings.http_port or free_port()
        self.url = local_url(settings.http_host, port)
        self._progress(f"starting Envoy on {self.url}, before the frontend")
        listen = Address(settings.http_host, port)
        config = envoy_config(EnvoySettings(listen, (self._frontend_address,), tuple(self._pickers)))
        path = self._scratch / "envoy.json"
        path.write_text(json.dumps(config))
        command = [find_envoy(), "-c", str(path), "--disable-hot-restart", "--log-level", "warning"]
        self.envoy = await self._start_child("envoy", command, {})

    async def add_router(self) -> Child:
        """Start one more router of ours."""
        kind = "picker" if self._picks else "router"
        name = f"{kind}-{next(self._numbers[kind])}"
        host, port = router_address(self.settings)
        port = port or free_port()
        url = local_url(host, port)
        self._progress(f"starting {name}, which scores every window; its HTTP API is on {url}")
        command = python_module("vswa_plugin.router", *router_arguments(self.settings))
        if self._picks:
            self._pickers.append(Address("127.0.0.1", free_port()))
            grpc = "--grpc-port", str(self._pickers[-1].port)
            command = python_module("vswa_plugin", "picker", *router_arguments(self.settings), *grpc)
        self.routers.append(await self._start_child(name, [*command, "--http-port", str(port)], {}))
        self.router_urls.append(url)
        return self.routers[-1]

    async def add_worker(
        self,
        group: WorkerGroup | None = None,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """Start one more worker, by default of the first group; return once it is in the registry."""
        child = await self._start_worker(group or self.settings.groups[0], options, env or {})
        await self._registered(child)
        return child

    async def _start_worker(
        self, group: WorkerGroup, options: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> Child:
        kind = "worker" if group.mode == "agg" else group.mode
        number = next(self._numbers[kind])
        name = f"{kind}-{number}"
        status = status_port(self.settings, next(self._numbers["status"]))
        if status is None:  # one that is kept has the same port after each start
            status = free_port() if self.settings.keep else 0
        arguments = [*worker_arguments(self.settings, group), "--status-port", str(status), *options]
        command = python_module("vswa_plugin.worker", *arguments)
        engine = f"{self.settings.engine} with " if self.settings.engine else ""
        gpus = group.gpus[number] if number < len(group.gpus) else ""
        where = f", on GPU {gpus}" if gpus else ""
        self._progress(f"starting {name}: {engine}{self.settings.model_path}{where}")
        env = {**({VISIBLE_ENV: gpus} if gpus else {}), **(env or {})}
        child = await self._start_child(name, command, env)
        self.workers.append(child)
        return child

    async def _start_child(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Child:
        child = await Child.start(name, command, self.folder, {**self.env, **env})
        if self.settings.keep:
            child.keep(self._progress)
        return child

    async def _registered(self, child: Child) -> None:
        async with self._registry() as registry:

            async def joined() -> bool:
                for broker in self._brokers:
                    broker.check()
                return child.pid in await self._entries_by_pid(registry)

            await child.until(joined, "registered", math.inf if self.settings.keep else WORKER_TIMEOUT_S)

    async def _say_engines(self) -> None:
        """Which engine each worker runs, and why that one."""
        async with self._registry() as registry:
            entries = await self._entries_by_pid(registry)
        for worker in self.workers:
            if (entry := entries.get(worker.pid)) is not None:
                engine = " ".join(filter(None, (entry.engine, entry.engine_version)))
                self._progress(f"{worker.name} runs {engine}: {entry.engine_reason}")

    async def entries(self) -> list[Entry]:
        """The workers in the registry."""
        async with self._registry() as registry:
            return await registry.entries()

    async def status_urls(self) -> dict[str, list[str]]:
        """Where our workers serve their status, by mode; those that were given ``--status-port``."""
        async with self._registry() as registry:
            entries = await self._entries_by_pid(registry)
        urls: dict[str, list[str]] = {}
        for entry in (entries[worker.pid] for worker in self.workers if worker.pid in entries):
            urls.setdefault(entry.mode, []).extend([entry.status_url] if entry.status_url else [])
        return urls

    async def write_targets(self) -> Path:
        """Write where the metrics of all programs are, for Prometheus; the file."""
        async with self._registry() as registry:
            entries = await self._entries_by_pid(registry)
        urls = {"frontend": self.url}
        urls |= {child.name: url for child, url in zip(self.routers, self.router_urls, strict=True)}
        for worker in self.workers:
            entry = entries.get(worker.pid)
            if entry is not None and entry.status_url is not None:
                urls[worker.name] = entry.status_url
        return await asyncio.to_thread(write_targets, self.folder, urls)

    @asynccontextmanager
    async def _registry(self) -> AsyncIterator[Registry]:
        where, environ = named_registry(self.settings), {**os.environ, **self.env}
        registry = open_registry(where, environ) if where else registry_from_env(environ)
        try:
            yield registry
        finally:
            await registry.close()

    async def _entries_by_pid(self, registry: Registry) -> dict[int, Entry]:
        """Workers of this machine; none while the registry is away: they wait for it too, and say so."""
        try:
            entries = await registry.entries()
        except ConnectError:
            return {}
        here = socket.gethostname()
        return {entry.pid: entry for entry in entries if entry.host == here}

    async def wait_for_model(self) -> None:
        """Return once frontend and routers know all workers that were to be started, and a request is served.

        A model is listed a few milliseconds before its requests are not refused any more.
        """
        if self.frontend is None:
            raise ConfigError("expected a frontend, got none: call start first")
        wanted: Counter[str] = Counter()
        for group in self.settings.groups:
            wanted[COMPONENTS[group.mode]] += group.count
        wanted[ROUTER_COMPONENT] = 0 if self._picks else len(self.routers)

        async with Probe(self.settings, self.url) as probe, self._registry() as registry:

            async def serves() -> bool:
                self.check()
                return (
                    wanted <= await probe.instances()
                    and await self._routers_know(probe, registry)
                    and await probe.lists_model()
                    and await probe.serves_model()
                )

            self._progress("waiting until the frontend serves the model")
            timeout_s = math.inf if self.settings.keep else READY_TIMEOUT_S
            complaints = Complaints(self.frontend, self.settings.served_model_name, self._progress)
            await complaints.until(serves, timeout_s)

    async def _routers_know(self, probe: Probe, registry: Registry) -> bool:
        """Whether each router of ours sends requests to all workers."""
        if not self.routers:
            return True
        entries = await self._entries_by_pid(registry)
        pids = {worker.pid for worker in self.workers}
        ours = {entry.worker_id for pid, entry in entries.items() if pid in pids}
        routed = [await probe.routed_workers(url) for url in self.router_urls]
        return len(ours) == len(pids) and all(ours <= each for each in routed)

    async def failed(self) -> None:
        """Return when nothing but brokers is left; raises what the cluster cannot go on without.

        :raises ConfigError: what a process says must be corrected.
        :raises ChildDied: an embedded broker has ended.
        """
        children = [*self.workers, *self._front()]
        over = asyncio.ensure_future(_all(*(child.over() for child in children)))
        brokers = [asyncio.ensure_future(broker.wait()) for broker in self._brokers]
        try:
            await asyncio.wait((over, *brokers), return_when=asyncio.FIRST_COMPLETED)
            for broker in self._brokers:
                broker.check()
            await over
        finally:
            for task in (over, *brokers):
                task.cancel()

    async def stop(self) -> dict[str, int]:
        """Stop everything that runs; exit codes by name.

        Requests under way need the frontend until workers have drained, and Dynamo its brokers to the last.
        """
        stopped = await asyncio.gather(*(worker.stop(STOP_TIMEOUT_S) for worker in self.workers))
        codes = {worker.name: code for worker, code in zip(self.workers, stopped, strict=True)}
        for child in (*self._front(), *reversed(self._brokers)):
            codes[child.name] = await child.stop()
        return codes

    def hurry(self) -> None:
        """While workers drain: do not wait for requests under way any longer."""
        for worker in self.workers:
            worker.terminate()

    def check(self) -> None:
        """Raise ChildDied if anything has ended."""
        for child in self._children():
            child.check()

    async def bound_logs(self) -> None:
        """Keep the logs of all children below the bound, without end. Files are copied in a thread."""
        while True:
            for child in self._children():
                await asyncio.to_thread(child.bound_log, self.settings.log_bytes)
            # Nothing announces that a file has grown.
            await asyncio.sleep(LOG_INTERVAL_S)

    def _children(self) -> list[Child]:
        return [*self._brokers, *self._front(), *self.workers]

    def _front(self) -> list[Child]:
        """What stands before the workers, in the order in which it is stopped."""
        gateway = [self.envoy] if self.envoy else []
        return [*gateway, *self.routers, *([self.frontend] if self.frontend else [])]


async def _all(*parts: Coroutine[Any, Any, None]) -> None:
    """Run all; where one raises, the others are ended before its error goes on."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
