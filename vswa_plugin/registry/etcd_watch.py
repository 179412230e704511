"""Watching a prefix of etcd without losing an event, whatever ends the stream.

List, then stream from the next revision on. A stream that ends, for whatever reason (restart,
compaction, fail-over, lost permission), and one that is silent while a listing shows changes, is
followed by another listing, whose differences are what went missing.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from vswa_plugin.errors import VswaError
from vswa_plugin.registry._etcd3_client import Batch, Connection, Deleted, Ended, Listing, Put, WatchStream
from vswa_plugin.registry.watching import RegistryState

logger = logging.getLogger(__name__)

#: How often a listing checks that the stream is not silently dead.
RECONCILE_S = 3.0
#: How far the stream may lag behind a listing.
GRACE_S = 0.5
#: Back-off while etcd is away: from, to.
RETRY_MIN_S, RETRY_MAX_S = 0.05, 0.5


async def follow(connection: Connection, prefix: str, state: RegistryState, reconcile_s: float) -> None:
    """Feed ``state`` until cancelled."""
    delay = 0.0
    while True:
        stream = _Stream(connection, prefix, state)
        try:
            await stream.run(reconcile_s)
        except VswaError as error:
            state.disconnect(str(error))
        delay = 0.0 if stream.worked else min(max(2 * delay, RETRY_MIN_S), RETRY_MAX_S)
        await asyncio.sleep(delay)


class _Stream:
    """One listing and the stream that begins there."""

    def __init__(self, connection: Connection, prefix: str, state: RegistryState) -> None:
        self._connection = connection
        self._prefix = prefix
        self._state = state
        self._items: asyncio.Queue[Batch | Ended] = asyncio.Queue()
        self._revision = 0
        self._stream: WatchStream | None = None
        self._over = False
        self.worked = False

    async def run(self, reconcile_s: float) -> None:
        """Feed the state until the stream is not to be trusted any more; raises VswaError as ``call``."""
        listing = await self._list()
        self._state.replace(listing.content)
        self._state.connect()
        self._revision = listing.revision
        loop = asyncio.get_running_loop()
        try:
            await self._connection.call(lambda client: self._open(client, loop))
            while await self._follow_until(loop.time() + reconcile_s) and await self._verify():
                self.worked = True
        finally:
            self._over = True
            if self._stream is not None:
                self._stream.close()

    def _open(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        """In the connection's thread; we may have been cancelled meanwhile."""
        self._stream = WatchStream(client, self._prefix, self._revision + 1, loop, self._items.put_nowait)
        if self._over:
            self._stream.close()

    async def _list(self) -> Listing:
        return await self._connection.call(lambda client: client.list_prefix(self._prefix))

    async def _follow_until(self, deadline: float) -> bool:
        """Apply what comes; False once the stream has ended."""
        try:
            async with asyncio.timeout_at(deadline):
                while self._apply(await self._items.get()):
                    pass
        except TimeoutError:
            return True
        return False

    def _apply(self, item: Batch | Ended) -> bool:
        if isinstance(item, Ended):
            logger.info("watch of etcd ended (%s): listing and watching again", item.reason)
            return False
        for event in item.events:
            match event:
                case Put(key, value):
                    self._state.put(key, value)
                case Deleted(key):
                    self._state.remove(key)
        self._revision = max(self._revision, item.revision)  # the greeting has none
        self.worked = True
        return True

    async def _verify(self) -> bool:
        """List; False where the listing shows that the stream has missed changes."""
        applied = self._revision
        listing = await self._list()
        if listing.revision < applied:
            logger.warning("etcd went back from revision %d to %d", applied, listing.revision)
            return False
        while not self._items.empty():
            if not self._apply(self._items.get_nowait()):
                return False
        if self._revision > listing.revision or not self._state.differs(listing.content):
            return True
        return await self._hear(listing)

    async def _hear(self, listing: Listing) -> bool:
        """Whether the stream only lagged behind ``listing``; if not, the listing is applied."""
        try:
            async with asyncio.timeout(GRACE_S):
                return self._apply(await self._items.get())
        except TimeoutError:
            logger.warning("etcd's watch was silent about changes: watching again")
            self._state.replace(listing.content)
            return False
