"""One router: what is wired to what, and what it does in each part of its life."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from vswa_plugin.dynamo.client import namespaced_sequence_hashes, shut_down
from vswa_plugin.dynamo.runtime import connect
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.subscriber import SubscriberOptions
from vswa_plugin.forecast import Forecasts
from vswa_plugin.host.host import PluginHost
from vswa_plugin.program.life import PLUGINS_END_S, Life, Program
from vswa_plugin.registry import Registry
from vswa_plugin.registry.opening import reach, reach_discovery
from vswa_plugin.router.args import RouterArgs
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.forward import Forwarder
from vswa_plugin.router.http.answers import choice_answers
from vswa_plugin.router.http.metrics import Counted, RouterMetrics
from vswa_plugin.router.http.server import RouterServer
from vswa_plugin.router.models import Models
from vswa_plugin.router.promises import Promises
from vswa_plugin.router.replicas.exchange import Replicas
from vswa_plugin.router.watched import books_for, index_for
from vswa_plugin.wire.transport import Transport

logger = logging.getLogger(__name__)

#: How long NATS and etcd may take to appear when a router starts.
CONNECT_TIMEOUT_S = 30.0
#: How long the first request waits for the snapshots of the workers that are there already.
SETTLE_S = 2.0


class Router(Program):
    """One router, which forwards the requests itself."""

    def __init__(self, args: RouterArgs, host: PluginHost, registry: Registry, life: Life) -> None:
        self._args = args
        self._host = host
        self._registry = registry
        transport = Transport(args.nats_server, f"vswa router {args.endpoint}")
        self.replicas = Replicas(transport, args.namespace, life.tasks)
        forecasts = Forecasts(host.reuse_rules()) if args.promise == "forecast" else None
        self.fleet = Fleet(
            transport,
            registry,
            namespace=args.namespace,
            options=SubscriberOptions(view=args.view),
            index=index_for(host),
            tasks=life.tasks,
            forecasts=forecasts,
        )
        self.decider = Decider(
            self.fleet.index,
            args.weights,
            namespaced_sequence_hashes,
            host.selection_hooks(),
            forecasts=forecasts,
        )
        self.promises = Promises(self.decider.recent.reported)
        self.forwarder = Forwarder(self.decider, self.promises, self.fleet.subscriber.live)
        counted = Counted(
            self.decider,
            self.promises,
            lambda: (pool for model in self.forwarder.models.values() for pool in model.pools),
            self.forwarder.counts,
            replicas=self.replicas.load,
        )
        metrics = RouterMetrics("router", self.fleet, counted, host.metrics)
        self.server = RouterServer(
            self.fleet,
            namespaced_sequence_hashes,
            life.status,
            metrics,
            token=args.http.token,
            explain_choice=lambda prompt: choice_answers(self.decider, self.forwarder.models, prompt),
        )
        self._tasks = life.tasks
        self._models: Models | None = None
        self._runtime: Any = None
        self._following: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        return self.forwarder.in_flight

    async def start(self) -> None:
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
            book=books_for(self._host, self.replicas.load.book),
            silent=self.fleet.subscriber.silent,
            tasks=self._tasks,
        )
        self._following = self._tasks.start(self._models.follow(), "follow the workers")
        if args.http.port is not None:
            await self.server.start(args.http.host, args.http.port)

    async def leave(self) -> None:
        assert self._models is not None and self._following is not None
        await self._tasks.stop([self._following])
        await self._models.hide()

    async def drain(self) -> None:
        await self.forwarder.drain(self._args.drain_timeout_s)

    async def end(self) -> None:
        if self._following is not None:
            await self._tasks.stop([self._following])
        await self.server.stop()
        await asyncio.to_thread(self._host.stopping, PLUGINS_END_S)
        await self.replicas.stop()
        await self.fleet.stop()
        if self._runtime is not None:
            await shut_down(self._runtime, self._models.endpoints() if self._models else ())
