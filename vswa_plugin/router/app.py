"""Wiring and life of one router: connect, follow the workers, show their models, serve, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import Any

import msgspec

from vswa_plugin.dynamo.client import namespaced_sequence_hashes, shut_down
from vswa_plugin.dynamo.runtime import connect
from vswa_plugin.errors import VswaError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.program.status import Status
from vswa_plugin.registry import Registry
from vswa_plugin.registry.opening import reach, reach_discovery
from vswa_plugin.router.args import RouterArgs
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.following import fleet_of
from vswa_plugin.router.forward import Forwarder
from vswa_plugin.router.http.metrics import Counted, RouterMetrics
from vswa_plugin.router.http.server import RouterServer
from vswa_plugin.router.models import Models
from vswa_plugin.router.promises import Accuracy
from vswa_plugin.router.replicas.exchange import Replicas
from vswa_plugin.wire.events import Rank
from vswa_plugin.wire.transport import Transport

logger = logging.getLogger(__name__)

#: How long NATS and etcd may take to appear when a router starts.
CONNECT_TIMEOUT_S = 30.0
#: How long the first request waits for the snapshots of the workers that are there already.
SETTLE_S = 2.0


class RouterFailed(VswaError):
    """The router cannot go on: exit code 1, so that whoever runs it restarts it."""


class Router:
    """One router from its checked arguments to its exit code."""

    def __init__(self, args: RouterArgs, host: PluginHost, registry: Registry) -> None:
        self._args = args
        self._registry = registry
        transport = Transport(args.nats_server, f"vswa router {args.endpoint}")
        self.replicas = Replicas(transport, args.namespace)
        self.fleet = fleet_of(args, host, registry, transport)
        self.accuracy = Accuracy()
        self.decider = Decider(
            self.fleet.index, args.weights, namespaced_sequence_hashes, host.selection_hooks()
        )
        self.forwarder = Forwarder(self.decider, self.accuracy, self._live)
        self.status = Status()
        counted = Counted(
            self.decider,
            self.accuracy,
            lambda: (pool for model in self.forwarder.models.values() for pool in model.pools),
            lambda: msgspec.structs.asdict(self.forwarder.stats),
            replicas=self.replicas.load,
        )
        metrics = RouterMetrics(self.fleet, counted)
        self.server = RouterServer(self.fleet, namespaced_sequence_hashes, self.status, metrics)
        self._models: Models | None = None
        self._runtime: Any = None
        self._following: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT (0) or until something fails (raises)."""
        stop = self._stop_signal()
        starting = asyncio.create_task(self._start(), name="start")
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                logger.info("stopping before the start was complete")
                return 0
            await starting
            await self._until_stopped(stopping)
            await self._drain(stop)
            return 0
        finally:
            for task in (starting, stopping):
                task.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)
            await self._end()

    async def _start(self) -> None:
        """Connect, take in what the workers hold, then show their models."""
        logger.info("connecting to the registry, %s", self._registry)
        await reach(self._registry, CONNECT_TIMEOUT_S)
        await reach_discovery(CONNECT_TIMEOUT_S)
        logger.info("connecting to NATS at %s", self._args.nats_server)
        await self.fleet.start(CONNECT_TIMEOUT_S)
        await self.replicas.start()
        exact = await self.fleet.settled(SETTLE_S)
        logger.info(
            "%d workers in the registry%s",
            len(self.fleet.entries),
            "" if exact else ", not all of them known yet",
        )
        self._runtime = connect()
        args, entries = self._args, self.fleet.entries
        self._models = Models(
            self._runtime,
            entries,
            args.endpoint,
            self.forwarder,
            only=args.served_model_name,
            book=self.replicas.load.book,
            silent=self._silent,
        )
        self._following = asyncio.create_task(self._models.follow(), name="follow the workers")
        if args.http.port is not None:
            await self.server.start(args.http.host, args.http.port)
        self.status.ready = True

    def _live(self, rank: Rank) -> bool:
        view = self.fleet.subscriber.view(rank)
        return view is not None and view.state(asyncio.get_running_loop().time()) == "live"

    def _silent(self, rank: Rank) -> bool:
        view = self.fleet.subscriber.view(rank)
        return view is None or view.silent

    def _stop_signal(self) -> asyncio.Event:
        """Set by SIGTERM or SIGINT; again while draining: drain no longer."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        return stop

    async def _until_stopped(self, stopping: asyncio.Task[bool]) -> None:
        """Return on the stop signal; raise RouterFailed when Dynamo's runtime or the following has ended."""
        assert self._models is not None and self._following is not None
        while not stopping.done():
            watched = (stopping, self._following, *self._models.serving)
            await asyncio.wait(watched, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            if self._following.done():
                raise RouterFailed("the workers are followed no more") from self._following.exception()
            if any(task.done() for task in self._models.serving):
                raise RouterFailed("Dynamo's runtime ended unasked; was etcd away for longer than its lease?")

    async def _drain(self, stop: asyncio.Event) -> None:
        assert self._models is not None and self._following is not None
        logger.info("stopping: no new requests, waiting for %d under way", self.forwarder.in_flight)
        stop.clear()
        self.status.ready = False
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        await self._models.hide()
        draining = asyncio.create_task(self.forwarder.drain(self._args.drain_timeout_s))
        again = asyncio.create_task(stop.wait())
        await asyncio.wait((draining, again), return_when=asyncio.FIRST_COMPLETED)
        if self.forwarder.in_flight:
            logger.warning("%d requests are cancelled: not done in time", self.forwarder.in_flight)
        for task in (draining, again):
            task.cancel()

    async def _end(self) -> None:
        """Give everything back, whatever was reached."""
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._following
        await self.server.stop()
        await self.replicas.stop()
        await self.fleet.stop()
        if self._runtime is not None:
            await shut_down(self._runtime, self._models.endpoints() if self._models else ())
