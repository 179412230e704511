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
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from vswa_plugin.dynamo import (
    COMPONENTS,
    ETCD_ENV,
    LOOPBACK_ENV,
    NATS_ENV,
    ROUTER_COMPONENT,
    EndpointName,
    default_endpoint,
)
from vswa_plugin.embedded import start_etcd, start_nats
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.processes import Child, free_port, is_free, python_module
from vswa_plugin.registry import Entry
from vswa_plugin.registry.opening import registry_from_env
from vswa_plugin.router import args as router_args
from vswa_plugin.router.models import slug_of
from vswa_plugin.topologies import Routing, WorkerGroup
from vswa_plugin.worker import args as worker_args

WORKER_TIMEOUT_S = 120.0
READY_TIMEOUT_S = 30.0
#: How long a worker may drain before it is killed; above its own --drain-timeout.
STOP_TIMEOUT_S = 40.0
Progress = Callable[[str], None]
#: Read by the plugin dynamo_events: what a worker tells Dynamo's own router.
PROJECTION_ENV = "VSWA_DYNAMO_EVENTS"
_JOINS = re.compile(r"worker ([0-9a-f]+) joins")
_STATUS = re.compile(r"status on (http://\S+):")


class ClusterSettings(msgspec.Struct, frozen=True):
    """What to start.

    :param groups: the workers; see topologies.py.
    :param http_port: port of the frontend; 0 for a free one.
    :param routing: ``exact``: routers of ours in front of hidden workers; ``stock``: the frontend's own, told
        of the workers' blocks. Neither: the frontend chooses by ``router_mode``.
    :param worker_options: added to the command line of every worker; ``router_options``: of every router.
    :param keep: start frontend, routers and workers again when they fail, and wait for them without end.
    """

    model_path: str
    served_model_name: str
    groups: tuple[WorkerGroup, ...] = (WorkerGroup(),)
    engine: str = "gemma3_cpu"
    namespace: str = "dynamo"
    http_host: str = "127.0.0.1"
    http_port: int = 0
    router_mode: str = "round-robin"
    routing: Routing = Routing()
    worker_options: tuple[str, ...] = ()
    router_options: tuple[str, ...] = ()
    keep: bool = False


def worker_arguments(settings: ClusterSettings, group: WorkerGroup) -> list[str]:
    """The command line of a worker of ``group``."""
    arguments = ["--mode", group.mode, "--engine", settings.engine, "--model-path", settings.model_path]
    arguments += ["--served-model-name", settings.served_model_name]
    arguments += ["--endpoint", f"dyn://{default_endpoint(group.mode, settings.namespace)}"]
    if group.engine_args:
        arguments += ["--extra-engine-args", group.engine_args]
    if group.override:
        arguments += ["--override-engine-args", json.dumps(group.override)]
    return [*arguments, *settings.worker_options]


def router_endpoint(settings: ClusterSettings) -> EndpointName:
    """Where all routers of the model stand, and those of no other."""
    model = slug_of(settings.served_model_name)
    return EndpointName(settings.namespace, ROUTER_COMPONENT, f"generate-{model}")


def router_arguments(settings: ClusterSettings) -> list[str]:
    """The command line of a router of ours, each of which stands for all the others."""
    arguments = ["--endpoint", f"dyn://{router_endpoint(settings)}"]
    arguments += ["--served-model-name", settings.served_model_name]
    workers = _parsed(settings)[0]
    arguments += ["--heartbeat", f"{workers.heartbeat_s:g}"]
    if workers.registry:
        arguments += ["--registry", workers.registry]
    for option, names in (("--plugin", workers.plugin), ("--no-plugin", workers.no_plugin)):
        for name in names:
            arguments += [option, name]
    return [*arguments, *settings.router_options]


def routing_environment(routing: Routing) -> dict[str, str]:
    """What tells workers which router they work behind, whatever our own environment says."""
    told = {worker_args.ROUTER_ENV: routing.router or ""}
    if routing.router == "stock":
        told[PROJECTION_ENV] = os.environ.get(PROJECTION_ENV) or "boundary"
    return told


def check_settings(settings: ClusterSettings) -> None:
    """Raise ConfigError for whatever can be found wrong without starting a process."""
    hidden = settings.routing.router == "exact"
    for workers in _parsed(settings):
        if workers.showing.visible == hidden:
            raise ConfigError(
                f"--register ({workers.showing.reason}): "
                + (
                    "expected hidden workers behind our router, else the frontend sends requests past it"
                    if hidden
                    else "expected workers that the frontend can see, nothing else sends them requests"
                )
                + "; leave it at auto"
            )
    if hidden:
        router_args.parse(router_arguments(settings))


def _parsed(settings: ClusterSettings) -> list[worker_args.WorkerArgs]:
    """The workers' command lines, as a worker of each group reads its own."""
    environ = {**os.environ, **routing_environment(settings.routing)}
    return [worker_args.parse(worker_arguments(settings, group), environ) for group in settings.groups]


class Cluster:
    """Children by kind. They are stopped workers first, then routers and frontend, then brokers."""

    def __init__(self, settings: ClusterSettings, folder: Path, progress: Progress = lambda _: None) -> None:
        self.settings = settings
        self.folder = folder
        self.nats_server = os.environ.get(NATS_ENV, "")
        self.etcd_endpoints = os.environ.get(ETCD_ENV, "")
        self.url = ""
        self.frontend: Child | None = None
        self.workers: list[Child] = []
        self.routers: list[Child] = []
        self._brokers: list[Child] = []
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
        if self.settings.routing.router == "exact":
            for _ in range(self.settings.routing.count):
                await self.add_router()
        for group in self.settings.groups:
            for _ in range(group.count):
                await self._start_worker(group)
        await _all(*(self._registered(child) for child in self.workers))
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

    async def _start_frontend(self) -> None:
        settings = self.settings
        if settings.http_port and not is_free(settings.http_host, settings.http_port):
            raise ConfigError(
                f"--http-port: expected a port of {settings.http_host} that is free, got "
                f"{settings.http_port}, on which something listens or we may not"
            )
        port = settings.http_port or free_port()
        # Whoever listens everywhere is asked here.
        self.url = f"http://{settings.http_host.replace('0.0.0.0', '127.0.0.1')}:{port}"
        self._progress(f"starting Dynamo's frontend on {self.url}")
        command = python_module("vswa_plugin.frontend", "--http-port", str(port))
        command += ["--http-host", settings.http_host]
        mode = "kv" if settings.routing.router == "stock" else settings.router_mode
        command += ["--router-mode", mode, "--namespace", settings.namespace]
        self.frontend = await self._start_child("frontend", command, {})

    async def add_router(self) -> Child:
        """Start one more router of ours."""
        name = f"router-{next(self._numbers['router'])}"
        self._progress(f"starting {name}, which knows every window")
        command = python_module("vswa_plugin.router", *router_arguments(self.settings))
        self.routers.append(await self._start_child(name, command, {}))
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
        name = f"{kind}-{next(self._numbers[kind])}"
        command = python_module("vswa_plugin.worker", *worker_arguments(self.settings, group), *options)
        self._progress(f"starting {name}: {self.settings.engine} with {self.settings.model_path}")
        child = await self._start_child(name, command, env or {})
        self.workers.append(child)
        return child

    async def _start_child(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Child:
        child = await Child.start(name, command, self.folder, {**self.env, **env})
        if self.settings.keep:
            child.keep(self._progress)
        return child

    async def _registered(self, child: Child) -> None:
        registry = registry_from_env({**os.environ, **self.env})

        async def joined() -> bool:
            for broker in self._brokers:
                broker.check()
            try:
                return any(entry.pid == child.pid for entry in await registry.entries())
            except ConnectError:
                return False  # the worker waits for it too, and says so

        try:
            await child.until(joined, "registered", math.inf if self.settings.keep else WORKER_TIMEOUT_S)
        finally:
            await registry.leave()

    async def entries(self) -> list[Entry]:
        """The workers in the registry."""
        registry = registry_from_env({**os.environ, **self.env})
        try:
            return await registry.entries()
        finally:
            await registry.leave()

    async def wait_for_model(self) -> None:
        """Return once frontend and routers know all workers that were to be started, and a request is served.

        A model is listed a few milliseconds before its requests are not refused any more.
        """
        if self.frontend is None:
            raise ConfigError("expected a frontend, got none: call start first")
        wanted: Counter[str] = Counter()
        for group in self.settings.groups:
            wanted[COMPONENTS[group.mode]] += group.count
        wanted[ROUTER_COMPONENT] = len(self.routers)

        async def serves() -> bool:
            self.check()
            known = self._routers_know() and wanted <= await self._instances()
            return known and await self._lists() and await self._answers()

        self._progress("waiting until the frontend serves the model")
        timeout_s = math.inf if self.settings.keep else READY_TIMEOUT_S
        await self.frontend.until(serves, f"serving {self.settings.served_model_name}", timeout_s)

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
        for child in (*self._brokers, *self._front(), *self.workers):
            child.check()

    def _front(self) -> list[Child]:
        """What stands before the workers, in the order in which it is stopped."""
        return [*self.routers, *([self.frontend] if self.frontend else [])]

    async def _get(self, path: str) -> dict[str, Any]:
        """What the frontend says; nothing while it does not answer."""
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}{path}") as answer:
                said: dict[str, Any] = await answer.json()
                return said
        except (aiohttp.ClientError, OSError):
            return {}

    async def _instances(self) -> Counter[str]:
        """Workers that the frontend knows, by Dynamo component."""
        instances = (await self._get("/health")).get("instances", [])
        endpoints = ("generate", router_endpoint(self.settings).endpoint)
        ours = (i for i in instances if i["namespace"] == self.settings.namespace)
        return Counter(i["component"] for i in ours if i["endpoint"] in endpoints)

    def _routers_know(self) -> bool:
        """Whether each router of ours says that it sends requests to all workers."""
        workers = sum(group.count for group in self.settings.groups)
        return all(len(set(_JOINS.findall(router.log()))) >= workers for router in self.routers)

    async def _lists(self) -> bool:
        models = (await self._get("/v1/models")).get("data", [])
        return self.settings.served_model_name in [model["id"] for model in models]

    async def _answers(self) -> bool:
        """Whether the shortest possible request is served."""
        body = {"model": self.settings.served_model_name, "prompt": "Hi", "max_tokens": 1}
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{self.url}/v1/completions", json=body) as answer,
            ):
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False


async def status_url(worker: Child) -> str:
    """Where a worker that was given ``--status-port 0`` serves its status, from its log."""
    found: list[str] = []

    async def told() -> bool:
        found.extend(_STATUS.findall(worker.log()))
        return bool(found)

    await worker.until(told, "telling its status port", 20)
    return found[-1]


async def _all(*parts: Coroutine[Any, Any, None]) -> None:
    """Run all; where one raises, the others are ended before its error goes on."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
