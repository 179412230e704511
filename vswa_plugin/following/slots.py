"""Places for requests to publishers: a few at a time, so that many gaps at once do not flood the broker.

Ranks that answered their last request go before those that did not, and a request that has waited for a while
gives its place up: it costs the broker nothing more. So ranks that never answer keep no others waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """:param count: places.
    :param patience_s: seconds for which a request may hold one.
    """

    def __init__(self, count: int, patience_s: float) -> None:
        self._free = count
        self._patience_s = patience_s
        self._waiting: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())

    @asynccontextmanager
    async def one(self, *, first: bool) -> AsyncIterator[None]:
        """Wait for a place, and give it back at the end, or before that when patience is over.

        :param first: before those for whom this is false.
        """
        await self._take(first)
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._give_back()

        timer = asyncio.get_running_loop().call_later(self._patience_s, give_back)
        try:
            yield
        finally:
            timer.cancel()
            give_back()

    async def _take(self, first: bool) -> None:
        if self._free:
            self._free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting[not first].append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._give_back()  # it was given just now
            raise

    def _give_back(self) -> None:
        for queue in self._waiting:
            while queue:
                place = queue.popleft()
                if not place.done():
                    place.set_result(None)
                    return
        self._free += 1
