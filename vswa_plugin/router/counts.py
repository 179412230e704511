"""Requests counted: how many are under way, and how the others ended. Draining waits for those under way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from vswa_plugin.errors import RequestError, Unavailable

logger = logging.getLogger(__name__)


class ForwardStats(msgspec.Struct):
    """Counters since start.

    :param unavailable: requests whose worker was lost: the frontend tries once more.
    :param prefill_retries: prompts that were given to another prefill worker because the first was lost.
    """

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    refused: int = 0
    unavailable: int = 0
    prefill_retries: int = 0


class RequestCounts:
    """The requests of one router. Event loop only."""

    def __init__(self) -> None:
        self.stats = ForwardStats()
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def under_way(self) -> int:
        return self._under_way

    def began(self) -> None:
        """One request more is under way."""
        self.stats.requests += 1
        self._under_way += 1
        self._idle.clear()

    def ended(self, finished: bool) -> None:
        """One request is under way no more; ``finished``: its client has got the last chunk."""
        self.stats.finished += finished
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()

    @contextmanager
    def failures(self, request_id: str) -> Iterator[None]:
        """Count how the request fails, if it does."""
        try:
            yield
        except Unavailable:
            self.stats.unavailable += 1
            raise
        except RequestError as error:
            self.stats.refused += 1
            logger.info("request %s refused: %s", request_id, error)
            raise

    async def idle(self, timeout_s: float) -> bool:
        """Wait until no request is under way; False where some still are after the time-out."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
