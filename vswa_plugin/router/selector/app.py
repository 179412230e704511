"""A router that only selects: it shows no model, forwards nothing and needs no Dynamo runtime.

Its workers are seen by Dynamo's frontend themselves (``--register frontend``); a gateway asks ``/select`` and
pins the request with the headers that it is told.
"""

from __future__ import annotations

import asyncio
import logging

from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.subscriber import SubscriberOptions
from vswa_plugin.forecast import Forecasts
from vswa_plugin.host.host import PluginHost
from vswa_plugin.program.life import PLUGINS_END_S, Life, Program
from vswa_plugin.registry import Registry
from vswa_plugin.registry.opening import reach
from vswa_plugin.router.args import SELECTOR_PORT, RouterArgs
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.http.answers import choice_answers
from vswa_plugin.router.http.metrics import Counted, RouterMetrics
from vswa_plugin.router.http.server import RouterServer
from vswa_plugin.router.promises import Promises
from vswa_plugin.router.replicas.exchange import Replicas
from vswa_plugin.router.selector.choices import GatewayChoices
from vswa_plugin.router.watched import books_for, index_for
from vswa_plugin.wire.transport import Transport

logger = logging.getLogger(__name__)

#: How long NATS and the registry may take to appear.
CONNECT_TIMEOUT_S = 30.0
#: How long the first answer waits for the snapshots of the workers that are there already.
SETTLE_S = 2.0


class Selector(Program):
    """One selector."""

    def __init__(self, args: RouterArgs, host: PluginHost, registry: Registry, life: Life) -> None:
        self._http = args.http
        self._host = host
        #: Of the HTTP API, once it is served.
        self.port = 0
        self._registry = registry
        transport = Transport(args.nats_server, "vswa selector")
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
        counted = Counted(
            decider,
            self.promises,
            self.choices.pools,
            reservations=self.choices.reservations,
            replicas=self.replicas.load,
        )
        self.server = RouterServer(
            self.fleet,
            namespaced_sequence_hashes,
            life.status,
            RouterMetrics("selector", self.fleet, counted, host.metrics),
            self.choices,
            args.http.token,
            explain_choice=lambda prompt: choice_answers(decider, self.choices.models(), prompt),
        )

    async def start(self) -> None:
        """Connect, take in what the workers hold, and serve."""
        await reach(self._registry, CONNECT_TIMEOUT_S)
        await self.fleet.start(CONNECT_TIMEOUT_S)
        await self.replicas.start()
        exact = await self.fleet.settled(SETTLE_S)
        port = SELECTOR_PORT if self._http.port is None else self._http.port
        self.port = await self.server.start(self._http.host, port)
        logger.info(
            "%d workers in the registry%s",
            len(self.fleet.entries),
            "" if exact else ", not all of them known yet",
        )

    async def end(self) -> None:
        """Other routers are told that nothing is reserved here any more."""
        await self.server.stop()
        await asyncio.to_thread(self._host.stopping, PLUGINS_END_S)
        await self.replicas.stop()
        await self.fleet.stop()
