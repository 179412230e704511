"""The relay as a program: one connection to NATS, and one task for each worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

from prometheus_client.core import Metric

from vswa_plugin.dynamo.runtime import connect
from vswa_plugin.host.host import PluginHost
from vswa_plugin.program.life import PLUGINS_END_S, Life, Program
from vswa_plugin.program.metrics import About, Page
from vswa_plugin.program.status import StatusServer, reachable_url
from vswa_plugin.publishing.publisher import PublisherOptions, check_batch_bytes
from vswa_plugin.registry import Registry
from vswa_plugin.registry.opening import open_registry, reach, reach_discovery, registry_from_env
from vswa_plugin.relay.args import RelayArgs
from vswa_plugin.relay.instances import Instances, one_on_each
from vswa_plugin.relay.listed import Listed
from vswa_plugin.relay.metrics import families
from vswa_plugin.relay.worker import TICK_S, RelayedWorker, Shared
from vswa_plugin.wire.transport import Transport

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0


class Relay(Program):
    """All workers of the list."""

    def __init__(self, args: RelayArgs, host: PluginHost, life: Life) -> None:
        self._args = args
        self._host = host
        self._life = life
        # Without echo: what comes in on the subject of a worker is another publisher's.
        self._transport = Transport(args.nats_server, "vswa relay", echo=False)
        self.page = Page(lambda: About("relay"), self._families, host.metrics)
        self._server = StatusServer(life.status, self.page.render)
        self._shared: Shared | None = None
        self._workers: dict[RelayedWorker, asyncio.Task[None]] = {}
        #: They begin and end workers as instances come and go.
        self._following: list[asyncio.Task[None]] = []
        #: Held while they do: a worker that is cancelled once more would not end in order.
        self._changing = asyncio.Lock()
        self._runtime: object = None

    async def start(self) -> None:
        args, status_url = self._args, None
        if args.status_port is not None:
            bound = await self._server.start(args.status_host, args.status_port)
            status_url = reachable_url(args.status_host, bound)
        logger.info("connecting to NATS at %s", args.nats_server)
        await self._transport.connect(CONNECT_TIMEOUT_S)
        registry = self._registry()
        logger.info("connecting to the registry, %s", registry)
        try:
            await reach(registry, CONNECT_TIMEOUT_S)
        finally:
            await registry.close()
        options = check_batch_bytes(
            PublisherOptions(heartbeat_s=args.heartbeat_s), self._transport.max_payload
        )
        self._shared = Shared(
            self._host, self._transport, self._registry, await self._instances(), options, status_url
        )
        for each in args.workers:
            if each.of_every_host:
                task = self._life.tasks.start(self._follow(each), f"follow {each.endpoint}")
                self._following.append(task)
            else:
                self._begin(each)

    def _registry(self) -> Registry:
        tasks = self._life.tasks
        where = self._args.registry
        return open_registry(where, tasks=tasks) if where else registry_from_env(tasks=tasks)

    async def _instances(self) -> Instances | None:
        """Dynamo's discovery, where a worker has its id from there."""
        if all(each.worker_id is not None for each in self._args.workers):
            return None
        await reach_discovery(CONNECT_TIMEOUT_S)
        self._runtime = connect()
        return Instances(self._runtime)

    def _begin(self, listed: Listed) -> RelayedWorker:
        assert self._shared is not None
        worker = RelayedWorker(listed, self._shared)
        self._workers[worker] = self._life.tasks.start(worker.run(), f"relay {listed.name}")
        return worker

    async def _end(self, workers: list[RelayedWorker]) -> None:
        """Their ranks leave the registry."""
        await self._life.tasks.stop([self._workers.pop(worker) for worker in workers])

    async def _follow(self, every: Listed) -> None:
        """A worker for each instance of an endpoint, as they come and go."""
        assert self._shared is not None and self._shared.instances is not None
        running: dict[int, RelayedWorker] = {}
        left_out: set[int] = set()
        while True:
            found = await self._shared.instances.at(every.endpoint)
            alone, others = one_on_each(found)
            for number in sorted(others - left_out):
                logger.warning(
                    "instance %d of %s is not relayed: expected a host with one instance, as one address "
                    "of events is all that is known of it, got %r",
                    number,
                    every.endpoint,
                    found[number],
                )
            left_out = others
            async with self._changing:
                await self._end([running.pop(number) for number in list(running) if number not in alone])
                for number in alone.keys() - running.keys():
                    running[number] = self._begin(every.of_instance(number, alone[number]))
            await asyncio.sleep(TICK_S)

    async def leave(self) -> None:
        async with self._changing:
            await self._life.tasks.stop(self._following)
        await self._end(list(self._workers))

    async def end(self) -> None:
        await self.leave()
        await asyncio.to_thread(self._host.stopping, PLUGINS_END_S)
        await self._transport.close()
        if self._runtime is not None:
            self._runtime.shutdown()  # type: ignore[attr-defined]
        await self._server.stop()

    def _families(self) -> Iterator[Metric]:
        yield from families(self._workers)
