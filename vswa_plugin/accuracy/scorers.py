"""Ways to predict how much of a prompt an engine will reuse: ours, and what others do. No I/O.

Those that read events get them as a router does, from the wire, and look their blocks up in a
:class:`~vswa_plugin.index.WindowIndex`; what differs is which groups they keep apart. All are given the
engine's last-token rule, so that what separates them is what they know of windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from vswa_plugin.accuracy.forecasting import Forecasting
from vswa_plugin.blocks.hybrid import resumption_of
from vswa_plugin.blocks.layout import FULL, CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.reuse import RULES, ReuseRule, rule_named
from vswa_plugin.engine.contract import BlocksStored, Node
from vswa_plugin.engine.predicted import Prompt, Scorer
from vswa_plugin.index import Explanation, WindowIndex
from vswa_plugin.wire.events import Cleared, Event, Layout, Moved, Rank, Removed, Stored

__all__ = [
    "built_in_scorers",
]

EXACT = "exact"
#: Requests after which the approximate scorer forgets a prompt.
DEFAULT_TTL = 100
_RANK = Rank(0)


class _OfTheWire:
    """Base of scorers that do not use the token ids of stored blocks."""

    def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        """Do nothing: these scorers know blocks by their sequence hashes."""


class Exact(_OfTheWire):
    """Every group apart, by the engine's own rule: what this project's router does."""

    name = EXACT

    def __init__(self, rules: Mapping[str, ReuseRule] = RULES) -> None:
        self._index = WindowIndex(rules=rules)

    def begin(self, layout: CacheLayout) -> None:
        self._index.apply(_RANK, _announced(layout, layout.groups))

    def apply(self, event: Event) -> None:
        self._index.apply(_RANK, event)

    def predict(self, prompt: Prompt) -> int:
        return _score(self._index, prompt)

    def explain(self, prompt: Prompt) -> Explanation:
        """Which blocks of the prompt each group holds."""
        return self._index.explain(prompt.sequence_hashes, len(prompt.token_ids))[0]


class AlwaysZero(_OfTheWire):
    """Promises nothing: what a share of exact promises has to be compared with where little is reused."""

    name = "always 0"

    def begin(self, layout: CacheLayout) -> None:
        """Do nothing: it needs no layout."""

    def apply(self, event: Event) -> None:
        """Do nothing: it uses no events."""

    def predict(self, prompt: Prompt) -> int:
        return 0


class GlobalOnly(_OfTheWire):
    """The groups with global attention only, as Dynamo and its like do today; else the largest window's."""

    name = "global only"

    def __init__(self, rules: Mapping[str, ReuseRule] = RULES) -> None:
        self._index = WindowIndex(rules=rules)
        self._kept: frozenset[int] = frozenset()

    def begin(self, layout: CacheLayout) -> None:
        groups = _widest(layout)
        self._kept = frozenset(group.group_id for group in groups)
        self._index.apply(_RANK, _announced(layout, groups))

    def apply(self, event: Event) -> None:
        group_id = _group_id(event)
        if group_id is None or group_id in self._kept:
            self._index.apply(_RANK, event)

    def predict(self, prompt: Prompt) -> int:
        return _score(self._index, prompt)


class MixedGroups(_OfTheWire):
    """One set of blocks for all groups: what becomes of an index that does not look at the group id."""

    name = "mixed groups"

    def __init__(self, rules: Mapping[str, ReuseRule] = RULES) -> None:
        self._index = WindowIndex(rules=rules)

    def begin(self, layout: CacheLayout) -> None:
        size = math.lcm(*(group.block_size for group in layout.groups))
        mixed = _announced(layout, [CacheGroup(0, None, size)])
        if not layout.plain:
            where = Resumption(size, layout.hash_block_size, lookahead=layout.lookahead)
            mixed = msgspec.structs.replace(mixed, resumption=where)
        self._index.apply(_RANK, mixed)

    def apply(self, event: Event) -> None:
        self._index.apply(_RANK, msgspec.structs.replace(event, group_id=0))

    def predict(self, prompt: Prompt) -> int:
        return _score(self._index, prompt)


class MinOfLastBoundaries(_OfTheWire):
    """The deepest boundary that each group would allow by itself, and of these the least.

    Too high where that one is no boundary of the other groups.
    """

    name = "min of last boundaries"

    def __init__(self, rules: Mapping[str, ReuseRule] = RULES) -> None:
        self._rules = rules
        self._indexes: dict[int, WindowIndex] = {}

    def begin(self, layout: CacheLayout) -> None:
        self._indexes = {group.group_id: WindowIndex(rules=self._rules) for group in layout.groups}
        for group in layout.groups:
            self._indexes[group.group_id].apply(_RANK, _announced(layout, [group]))

    def apply(self, event: Event) -> None:
        group_id = _group_id(event)
        for index in self._indexes.values() if group_id is None else [self._indexes[group_id]]:
            index.apply(_RANK, event)

    def predict(self, prompt: Prompt) -> int:
        return min(_score(index, prompt) for index in self._indexes.values())


class Approximate(_OfTheWire):
    """No events: a prompt sent here before is taken to be cached, until so many requests have passed.

    :param ttl: in requests; a prompt that comes again begins anew.
    """

    def __init__(self, ttl: int = DEFAULT_TTL, rules: Mapping[str, ReuseRule] = RULES) -> None:
        self.name = f"approximate (TTL {ttl})"
        self._ttl = ttl
        self._rules = rules
        self._layout: CacheLayout | None = None
        self._requests = 0
        #: Sequence hash -> number of the last request that had it, oldest first.
        self._last: dict[int, int] = {}

    def begin(self, layout: CacheLayout) -> None:
        self._layout = layout

    def apply(self, event: Event) -> None:
        """Do nothing: this scorer uses no events."""

    def predict(self, prompt: Prompt) -> int:
        assert self._layout is not None, "begin comes first"
        self._requests += 1
        self._expire()
        hashes = prompt.sequence_hashes
        known = next((i for i, each in enumerate(hashes) if each not in self._last), len(hashes))
        known_blocks = known * self._layout.hash_block_size // self._layout.block_size
        for each in hashes:
            self._last.pop(each, None)
            self._last[each] = self._requests
        rule = rule_named(self._layout.rule, self._rules)
        boundary = min(known_blocks, rule.boundaries(self._layout, len(prompt.token_ids)))
        return rule.tokens(self._layout, boundary, len(prompt.token_ids))

    def _expire(self) -> None:
        while self._last:
            oldest = next(iter(self._last))
            if self._requests - self._last[oldest] <= self._ttl:
                return
            del self._last[oldest]


def built_in_scorers(
    rules: Mapping[str, ReuseRule] = RULES, ttl: int = DEFAULT_TTL, blocks: int | None = None
) -> list[Scorer]:
    """New ones, ours first.

    :param blocks: of the engine's cache, where that is known.
    """
    return [
        Exact(rules),
        Forecasting(rules, blocks),
        GlobalOnly(rules),
        MixedGroups(rules),
        MinOfLastBoundaries(rules),
        AlwaysZero(),
        Approximate(ttl, rules),
    ]


def _score(index: WindowIndex, prompt: Prompt) -> int:
    return index.score(prompt.sequence_hashes, len(prompt.token_ids)).get(_RANK, 0)


def _announced(layout: CacheLayout, groups: Sequence[CacheGroup]) -> Layout:
    where = layout.resumption if layout.plain else resumption_of(layout)
    return Layout(tuple(groups), layout.rule, layout.hash_scheme, layout.model, None, where)


def _widest(layout: CacheLayout) -> list[CacheGroup]:
    """Groups of full attention; else those of the largest window, as if they were; else all."""
    kept = [group for group in layout.groups if group.kind == FULL]
    widest = max((group.window_size for group in layout.groups if group.window_size is not None), default=0)
    if not kept and widest:
        kept = [
            CacheGroup(group.group_id, None, group.block_size)
            for group in layout.groups
            if group.window_size == widest
        ]
    return kept or list(layout.groups)


def _group_id(event: Event) -> int | None:
    """The group that an event is about; None: all."""
    match event:
        case Stored() | Removed() | Moved() | Cleared():
            return event.group_id
        case _:
            return None
