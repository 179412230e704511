"""This router among those of the same workers: what they share of their load, over NATS."""

from __future__ import annotations

import asyncio
import logging
import random

from vswa_plugin.errors import ConnectError
from vswa_plugin.router.replicas.load import INTERVAL_S, SharedLoad
from vswa_plugin.tasks import Tasks
from vswa_plugin.wire.events import VERSION
from vswa_plugin.wire.subjects import check_name
from vswa_plugin.wire.transport import Transport

logger = logging.getLogger(__name__)


class Replicas:
    """Thin: :class:`SharedLoad` decides what is sent and what it means.

    :param namespace: of the workers; None: all. Messages from routers of other namespaces are not received.
    :param tasks: where its tasks are watched.
    """

    def __init__(
        self,
        transport: Transport,
        namespace: str | None,
        tasks: Tasks | None = None,
        *,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._wanted = asyncio.Event()
        self.load = SharedLoad(random.getrandbits(63), self._wanted.set)
        self._transport = transport
        self._prefix = f"vswa.v{VERSION}.{check_name('namespace', namespace or 'all')}.routers"
        self._interval_s = interval_s
        self._watched = tasks if tasks is not None else Tasks()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False

    async def start(self) -> None:
        """Begin to share load with other routers; the transport must be connected. Raises ConnectError."""
        await self._transport.subscribe(f"{self._prefix}.*.load", self._receive)
        await self._transport.flush()
        self._tasks = [
            self._watched.start(self._tick_forever(), "share load, in time"),
            self._watched.start(self._send_forever(), "share load"),
        ]

    async def stop(self) -> None:
        """Send that this router ends; the transport stays open."""
        self._stopped = True
        await self._watched.stop(self._tasks)
        if self._tasks:
            await self._send(self.load.farewell())

    async def _receive(self, on_subject: str, payload: bytes) -> None:
        """Each router has a subject of its own: the broker's permissions decide who may publish there."""
        if not self._stopped:
            sender = on_subject.removeprefix(f"{self._prefix}.").removesuffix(".load")
            self.load.receive(payload, asyncio.get_running_loop().time(), sender)

    async def _tick_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.load.tick(loop.time(), self._transport.connected, self._interval_s)
            await asyncio.sleep(self._interval_s)

    async def _send_forever(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            for payload in self.load.take():
                await self._send(payload)

    async def _send(self, payload: bytes) -> None:
        """What cannot be sent is lost: the next digest makes up for it."""
        stats = self.load.stats
        if not self._transport.connected:
            stats.send_errors += 1
            return
        try:
            await self._transport.publish(f"{self._prefix}.{self.load.router:x}.load", payload)
        except ConnectError as error:
            stats.send_errors += 1
            if stats.send_errors == 1:
                logger.warning("load is not shared (further ones are only counted): %s", error)
            return
        stats.sent += 1
        stats.bytes_sent += len(payload)
