"""Requests whose results come later: what was known when the engine matched them. Pure.

A router predicts a request where it arrives; its engine matches it some time after that, and the events of
what changed meanwhile may come later still, where an engine is asked for them now and then. A trace bounds
the moment of the match from both sides. It is not before the arrival. It is not after the first token; and
as engines report in order, however late, events from before it come before those of the first
block that was computed for the request, and before those of requests that arrived after the first token.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from vswa_plugin.accuracy.exceptions import LAG, exception_of
from vswa_plugin.accuracy.scorers import Exact
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.reuse import ReuseRule
from vswa_plugin.engine.predicted import Prompt
from vswa_plugin.index import Explanation
from vswa_plugin.wire.events import Cleared, Event, Layout, Moved, Removed, Stored


class _Moment(NamedTuple):
    """After an event that changed what is held of the prompt.

    :param events: of the trace until then.
    :param stored: sequence hashes that the event announced as stored.
    """

    events: int
    explanation: Explanation
    stored: frozenset[int]


class Waiting:
    """One request, predicted at its arrival.

    :param explanation: of our own prediction, at the arrival.
    """

    def __init__(
        self, line: int, prompt: Prompt, predicted: dict[str, int], explanation: Explanation
    ) -> None:
        self.line = line
        self.prompt = prompt
        self.predicted = predicted
        self._arrival = explanation
        self._names = frozenset(prompt.sequence_hashes)
        self._moments: list[_Moment] = []

    def follow(self, events: int, wire_events: Sequence[Event], exact: Exact) -> None:
        """Note what a router would predict after one more engine event.

        :param events: of the trace until now.
        """
        stored: set[int] = set()
        changed = False
        for event in wire_events:
            match event:
                case Layout() | Cleared():
                    changed = True
                case Stored() | Removed() | Moved():
                    if not self._names.isdisjoint(event.sequence_hashes):
                        changed = True
                        if isinstance(event, Stored):
                            stored.update(event.sequence_hashes)
        if changed:
            self._moments.append(_Moment(events, exact.explain(self.prompt), frozenset(stored)))

    def explained(
        self, rule: ReuseRule, layout: CacheLayout, actual: int, seen: int, end: float
    ) -> str | None:
        """Why ``actual`` tokens were reused though something else was predicted; None: nothing explains it.

        :param seen: events before the first token.
        :param end: the event from which on all are later than the match; infinity where none is known.
        """
        length, size = len(self.prompt.token_ids), layout.block_size
        at_arrival = exception_of(rule, layout, self._arrival, length, actual)
        if at_arrival is not None:
            return at_arrival
        unit = layout.hash_block_size
        before = self._own_store(self.prompt.sequence_hashes[actual // unit : (actual + size) // unit], end)
        moments = [each.explanation for each in self._moments if each.events <= seen or each.events < before]
        if any(each.cached_tokens // size == actual // size for each in moments):
            return LAG
        kinds = (exception_of(rule, layout, each, length, actual) for each in moments)
        return next((kind for kind in kinds if kind is not None), None)

    def _own_store(self, computed: Sequence[int], end: float) -> float:
        """The last event before ``end`` that announced what it computed first; ``end``: none did.

        :param computed: names in its first block, or common multiple of blocks, that was not reused.
        """
        for moment in reversed(self._moments):
            if moment.events < end and not moment.stored.isdisjoint(computed):
                return moment.events
        return end


class Arrivals:
    """When each block was first asked for, and so which events are of requests that came later."""

    def __init__(self) -> None:
        #: Sequence hash -> events before the first request that had it.
        self._first_request: dict[int, int] = {}
        #: Events that stored a block that was asked for later than all before, and when it was.
        self._events: list[int] = []
        self._latest: list[int] = []

    def arrive(self, events: int, prompt: Prompt) -> None:
        for each in prompt.sequence_hashes:
            self._first_request.setdefault(each, events)

    def follow(self, events: int, wire_events: Sequence[Event]) -> None:
        """Note the wire events that the engine event with that number led to."""
        names = (name for event in wire_events if isinstance(event, Stored) for name in event.sequence_hashes)
        first = max((self._first_request.get(name, 0) for name in names), default=0)
        if first > (self._latest[-1] if self._latest else 0):
            self._events.append(events)
            self._latest.append(first)

    def end(self, seen: int) -> float:
        """The first event of a request that arrived after more than ``seen`` events; infinity: none yet."""
        index = bisect_right(self._latest, seen)
        return self._events[index] if index < len(self._events) else math.inf
