"""Whose turn it is: views by the moment at which time alone will change what they are. Pure.

A heartbeat only moves its view's moment; the queue learns of that when the old moment comes. So a heartbeat
costs nothing here, and a rank takes a step of a tick once in the time that it may be silent.
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
        """Let ``view`` come at its :attr:`View.due`, and at no other moment; infinity: not at all."""
        self._valid.pop(view, None)
        if view.due < math.inf:
            number = next(self._numbers)
            self._valid[view] = number
            heapq.heappush(self._heap, (view.due, number, view))

    def discard(self, view: View) -> None:
        """It comes no more."""
        self._valid.pop(view, None)

    def take(self, now: float) -> Iterator[View]:
        """The views whose moment has passed, also those that were heard of meanwhile; add them again."""
        passed: list[View] = []
        while self._heap and self._heap[0][0] < now:
            _, number, view = heapq.heappop(self._heap)
            if self._valid.get(view) == number:
                del self._valid[view]
                passed.append(view)
        return iter(passed)
