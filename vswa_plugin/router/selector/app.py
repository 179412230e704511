"""A router that only selects: it shows no model, forwards nothing and needs no Dynamo runtime.

Its workers are seen by Dynamo's frontend themselves (``--register frontend``); a gateway asks ``/select`` and
pins the request with the headers that it is told.
"""

from __future__ import annotations

import asyncio
import logging
import signal

from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.host.host import PluginHost
from vswa_plugin.program.status import Status
from vswa_plugin.registry import Registry
from vswa_plugin.registry.opening import reach
from vswa_plugin.router.args import SELECTOR_PORT, RouterArgs
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.following import fleet_of
from vswa_plugin.router.http.metrics import Counted, RouterMetrics
from vswa_plugin.router.http.server import RouterServer
from vswa_plugin.router.promises import Accuracy
from vswa_plugin.router.replicas.exchange import Replicas
from vswa_plugin.router.selector.choices import Selection
from vswa_plugin.wire.transport import Transport

logger = logging.getLogger(__name__)

#: How long NATS and the registry may take to appear.
CONNECT_TIMEOUT_S = 30.0
#: How long the first answer waits for the snapshots of the workers that are there already.
SETTLE_S = 2.0


class Selector:
    """One selector from its checked arguments to its exit code."""

    def __init__(self, args: RouterArgs, host: PluginHost, registry: Registry) -> None:
        self._http = args.http
        self._registry = registry
        transport = Transport(args.nats_server, "vswa selector")
        self.fleet = fleet_of(args, host, registry, transport)
        self.replicas = Replicas(transport, args.namespace)
        self.accuracy = Accuracy()
        decider = Decider(self.fleet.index, args.weights, namespaced_sequence_hashes, host.selection_hooks())
        self.selection = Selection(
            self.fleet, decider, namespaced_sequence_hashes, self.accuracy, self.replicas.load.book
        )
        counted = Counted(
            decider,
            self.accuracy,
            self.selection.pools,
            reservations=self.selection.reservations,
            replicas=self.replicas.load,
        )
        self.status = Status()
        self.server = RouterServer(
            self.fleet,
            namespaced_sequence_hashes,
            self.status,
            RouterMetrics(self.fleet, counted),
            self.selection,
        )

    async def start(self) -> int:
        """Connect, take in what the workers hold, and serve; the port."""
        await reach(self._registry, CONNECT_TIMEOUT_S)
        await self.fleet.start(CONNECT_TIMEOUT_S)
        await self.replicas.start()
        exact = await self.fleet.settled(SETTLE_S)
        port = SELECTOR_PORT if self._http.port is None else self._http.port
        bound = await self.server.start(self._http.host, port)
        logger.info(
            "%d workers in the registry%s",
            len(self.fleet.entries),
            "" if exact else ", not all of them known yet",
        )
        self.status.ready = True
        return bound

    async def stop(self) -> None:
        """Other routers are told that nothing is reserved here any more."""
        self.status.ready = False
        await self.server.stop()
        await self.replicas.stop()
        await self.fleet.stop()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT (0) or until the start fails (raises)."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        starting = asyncio.create_task(self.start(), name="start")
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                await stopping
            return 0
        finally:
            for task in (starting, stopping):
                task.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)
            await self.stop()
