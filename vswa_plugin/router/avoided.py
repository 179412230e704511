"""Workers that were lost a moment ago: they are chosen only where there is no other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vswa_plugin.errors import Unavailable

logger = logging.getLogger(__name__)

#: How long a worker that could not serve a request is chosen only where there is no other.
AVOID_S = 5.0


class AvoidedWorkers:
    """Worker id -> until when it is avoided, in seconds of the event loop. Event loop only."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}

    def now(self) -> Mapping[int, float]:
        """Those that are still avoided."""
        if self._until:
            now = asyncio.get_running_loop().time()
            self._until = {worker: until for worker, until in self._until.items() if until > now}
        return self._until

    def forget(self, worker_id: int) -> None:
        """The worker has gone."""
        self._until.pop(worker_id, None)

    @contextmanager
    def if_lost(self, worker_id: int) -> Iterator[None]:
        """Avoid the worker for a while where what is done with it raises Unavailable."""
        try:
            yield
        except Unavailable as error:
            self.lost(worker_id, str(error))
            raise

    def lost(self, worker_id: int, reason: str) -> None:
        """Avoid the worker for a while."""
        if worker_id not in self._until:
            logger.warning("worker %d is avoided for %.0f s: %s", worker_id, AVOID_S, reason)
        self._until[worker_id] = asyncio.get_running_loop().time() + AVOID_S
