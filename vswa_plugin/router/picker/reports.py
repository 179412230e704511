"""What the workers report as reused, compared with what was promised: a picker does not see the answers.

The report of a request is published when its engine is done, and so may come before its stream here ends or
after. Workers that others run report nothing: their requests are counted as unreported.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from vswa_plugin.router.promises import Promises
from vswa_plugin.router.reservations import Reservation
from vswa_plugin.wire.events import Rank, ReuseReport

#: How long the report of a request that has ended is waited for.
WAIT_S = 30.0
#: More requests are not compared.
MOST = 65_536


class _Waited(msgspec.Struct):
    reservation: Reservation
    ended_at: float | None = None


class Reports:
    """Requests whose report has not come. Event loop only.

    :param clock: monotonic seconds.
    """

    def __init__(self, promises: Promises, clock: Callable[[], float]) -> None:
        self._promises = promises
        self._clock = clock
        self._open: dict[str, _Waited] = {}
        #: Those that have ended, the first first.
        self._ended: OrderedDict[str, _Waited] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open) + len(self._ended)

    def expect(self, reservation: Reservation) -> None:
        """A request goes to its workers: its id at the worker is that of the reservation."""
        if len(self) < MOST:
            self._open[reservation.selection_id] = _Waited(reservation)

    def received(self, rank: Rank, report: ReuseReport) -> None:
        """A worker reports; of a request of another chooser, or from another rank, this does nothing."""
        waited = self._open.get(report.request_id) or self._ended.get(report.request_id)
        if waited is None or waited.reservation.computes.rank != rank:
            return
        self.forget(report.request_id)
        waited.reservation.computed()  # where another worker generates, it is free of the prompt by now
        self._compare(waited.reservation, report.cached_tokens)

    def ended(self, request_id: str) -> None:
        """The request's answer has come to its end."""
        self.expire()
        if (waited := self._open.pop(request_id, None)) is not None:
            waited.ended_at = self._clock()
            self._ended[request_id] = waited

    def forget(self, request_id: str) -> None:
        """The request was not served to its end: nothing is compared."""
        self._open.pop(request_id, None)
        self._ended.pop(request_id, None)

    def expire(self) -> None:
        """Count as unreported what has ended long ago."""
        now = self._clock()
        while self._ended:
            request_id, first = next(iter(self._ended.items()))
            assert first.ended_at is not None
            if now - first.ended_at < WAIT_S:
                return
            del self._ended[request_id]
            self._compare(first.reservation, None)

    def _compare(self, reservation: Reservation, cached_tokens: int | None) -> None:
        size, live = reservation.block_size, reservation.live
        self._promises.compare(reservation.computes, size, live, cached_tokens)
