"""The picker as a program: what is wired to what, and what happens in each part of its life."""

from __future__ import annotations

import asyncio
import logging
import time

from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.dynamo.preprocess import Preprocessor
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.subscriber import SubscriberOptions
from vswa_plugin.forecast import Forecasts
from vswa_plugin.host.host import PluginHost
from vswa_plugin.program.addresses import check_address
from vswa_plugin.program.life import PLUGINS_END_S, Life, Program
from vswa_plugin.registry import Registry
from vswa_plugin.registry.opening import reach
from vswa_plugin.router.args import RouterArgs
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.http.answers import choice_answers
from vswa_plugin.router.http.metrics import Counted, RouterMetrics
from vswa_plugin.router.http.server import RouterServer
from vswa_plugin.router.picker.args import PickerArgs
from vswa_plugin.router.picker.destinations import Destinations
from vswa_plugin.router.picker.exchange import MAX_BODY_BYTES, Gateway
from vswa_plugin.router.picker.grpc_server import GrpcServer
from vswa_plugin.router.picker.messages import PROCESS_METHOD
from vswa_plugin.router.picker.models import ShownModels
from vswa_plugin.router.picker.picker import Picker
from vswa_plugin.router.picker.reports import Reports
from vswa_plugin.router.picks import PickerCounts
from vswa_plugin.router.promises import Promises
from vswa_plugin.router.replicas.exchange import Replicas
from vswa_plugin.router.selector.choices import GatewayChoices
from vswa_plugin.router.watched import books_for, index_for
from vswa_plugin.wire.transport import Transport

logger = logging.getLogger(__name__)

#: How long NATS and the registry may take to appear.
CONNECT_TIMEOUT_S = 30.0
#: How long the first choice waits for the snapshots of the workers that are there already.
SETTLE_S = 2.0


class PickerProgram(Program):
    """One picker."""

    def __init__(
        self, args: RouterArgs, picker: PickerArgs, host: PluginHost, registry: Registry, life: Life
    ) -> None:
        self._args = args
        self._picker_args = picker
        self._host = host
        self._registry = registry
        self._tasks = life.tasks
        transport = Transport(args.nats_server, "vswa picker")
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
        self.replicas = Replicas(transport, args.namespace, life.tasks)
        decider = Decider(
            self.fleet.index,
            args.weights,
            namespaced_sequence_hashes,
            host.selection_hooks(),
            forecasts=forecasts,
        )
        self.promises = Promises(decider.recent.reported)
        books = books_for(host, self.replicas.load.book)
        self.choices = GatewayChoices(self.fleet, decider, namespaced_sequence_hashes, self.promises, books)
        self.preprocessor = Preprocessor(life.tasks)
        self.reports = Reports(self.promises, time.monotonic)
        self.fleet.subscriber.on_report = self.reports.received
        self.picker = Picker(
            self.choices,
            self.preprocessor,
            namespaced_sequence_hashes,
            self.reports,
            PickerCounts(),
            picker.ttl_s,
        )
        self.gateway = Gateway(self.picker, Destinations(picker.destinations))
        # A message has one body in it, and little besides.
        self.grpc = GrpcServer(PROCESS_METHOD, self.gateway.opened, MAX_BODY_BYTES + (1 << 20))
        #: Of gRPC, once it is served.
        self.port = 0
        self._models = ShownModels(self.preprocessor, self.choices.groups)
        counted = Counted(
            decider,
            self.promises,
            self.choices.pools,
            reservations=self.choices.reservations,
            replicas=self.replicas.load,
            picker=self.picker.counts,
        )
        self.server = RouterServer(
            self.fleet,
            namespaced_sequence_hashes,
            life.status,
            RouterMetrics("picker", self.fleet, counted, host.metrics),
            self.choices,
            args.http.token,
            self.preprocessor,
            explain_choice=lambda prompt: choice_answers(decider, self.choices.models(), prompt),
        )

    @property
    def in_flight(self) -> int:
        return self.picker.counts.under_way

    async def start(self) -> None:
        """Connect, take in what the workers hold, read their models, and serve."""
        host, port = self._picker_args.host, self._picker_args.port
        check_address(host, port)
        await reach(self._registry, CONNECT_TIMEOUT_S)
        await self.fleet.start(CONNECT_TIMEOUT_S)
        await self.replicas.start()
        await self.preprocessor.start()
        exact = await self.fleet.settled(SETTLE_S)
        await self._models.update()
        if self._picker_args.destinations:
            await self.gateway.destinations.look_up()
            self._tasks.start(self.gateway.destinations.follow(), "look up the frontends")
        self._tasks.start(self._models.follow(), "follow the workers")
        if self._args.http.port is not None:
            await self.server.start(self._args.http.host, self._args.http.port)
        self.port = await self.grpc.start(host, port, self._picker_args.context())
        logger.info(
            "serving Envoy on %s:%d; %d workers in the registry%s",
            host,
            self.port,
            len(self.fleet.entries),
            "" if exact else ", not all of them known yet",
        )

    async def leave(self) -> None:
        """Envoy asks another picker, or does without; requests under way are followed to their end."""
        self.grpc.leave()

    async def drain(self) -> None:
        try:
            async with asyncio.timeout(self._args.drain_timeout_s):
                await self.gateway.idle()
        except TimeoutError:
            return

    async def end(self) -> None:
        """Other routers learn that nothing is reserved here any more."""
        await self.grpc.stop()
        await self.server.stop()
        await asyncio.to_thread(self._host.stopping, PLUGINS_END_S)
        await self.preprocessor.stop()
        await self.replicas.stop()
        await self.fleet.stop()
