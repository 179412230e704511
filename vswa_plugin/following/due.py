"""Views by deadline: the moment at which the passing of time alone changes the state of a view. Pure.

A heartbeat only postpones the deadline of its view; the queue notices when the former deadline has passed. So
a heartbeat costs nothing here, and a tick looks at each rank once in the time that the rank may be silent.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vswa_plugin.following.view import View


class Due:
    """A queue of views, each in it once at most."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, View]] = []
        #: The entry of the heap that counts for a view: a later :meth:`add` replaces an earlier one.
        self._valid: dict[View, int] = {}
        self._numbers = count()

    def add(self, view: View) -> None:
        """Schedule ``view`` for its :attr:`View.due` in place of any earlier deadline; infinity: never."""
        self._valid.pop(view, None)
        if view.due < math.inf:
            number = next(self._numbers)
            self._valid[view] = number
            heapq.heappush(self._heap, (view.due, number, view))

    def discard(self, view: View) -> None:
        """Take ``view`` out of the queue."""
        self._valid.pop(view, None)

    def take(self, now: float) -> Iterator[View]:
        """Take out the views whose deadline, as it was when they were added, has passed; add them again."""
        passed: list[View] = []
        while self._heap and self._heap[0][0] < now:
            _, number, view = heapq.heappop(self._heap)
            if self._valid.get(view) == number:
                del self._valid[view]
                passed.append(view)
        return iter(passed)
