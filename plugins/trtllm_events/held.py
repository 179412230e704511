"""What one window of manager V1 holds, in the order in which the engine evicts it. Pure.

Since release candidates of spring 2026 V1 evicts any block, the one that was released longest ago first, and
announces it only where the window holds the block before it. An *orphan*, whose predecessor is gone, leaves
without an event. What is known bounds what can still be there: the window's blocks are no more than the
engine has, and nothing that was released before an evicted block is left.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection

from vswa_plugin.engine import EngineHash

from .prefixes import Prefix, Prefixes


class Held:
    """Blocks of one window, by the name that the engine gave them there.

    :param capacity: blocks that the engine has for this window, of all tiers; None: unknown.
    """

    def __init__(self, prefixes: Prefixes, capacity: int | None = None) -> None:
        self.capacity = capacity
        self._prefixes = prefixes
        #: Name -> its prefix; None while that is not known.
        self._blocks: dict[EngineHash, Prefix | None] = {}
        self._names: dict[Prefix, EngineHash] = {}
        # A block's place in the order of eviction: the later it was released, the larger.
        self._released: dict[EngineHash, int] = {}
        self._clock = 0
        #: The latest place of a block whose eviction was announced since :meth:`settle`; 0: none was.
        self._evicted = 0
        #: Blocks that slid out before they were stored -> place: they take up room until they are evicted.
        self._unstored: dict[Prefix, int] = {}
        # Orphans, the one that leaves first on top. Entries of blocks that were released again, or that are
        # no orphans any more, are skipped when they come up.
        self._orphans: list[tuple[int, EngineHash]] = []

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: EngineHash) -> bool:
        return name in self._blocks

    @property
    def unsettled(self) -> bool:
        """Whether orphans may have left before blocks whose eviction was announced."""
        return self._evicted > 0

    def clear(self) -> None:
        self._evicted = 0
        self._blocks.clear()
        self._names.clear()
        self._released.clear()
        self._unstored.clear()
        self._orphans.clear()

    def prefix_of(self, name: EngineHash | None) -> Prefix | None:
        return None if name is None else self._blocks.get(name)

    def name_of(self, prefix: Prefix) -> EngineHash | None:
        """The name of a prefix in this window; None: the window does not hold it."""
        return self._names.get(prefix)

    def add(self, name: EngineHash, prefix: Prefix | None) -> None:
        """The engine has stored a block; ``prefix`` is None while it is not known which."""
        if self._blocks.get(name) is None:
            self._blocks[name] = prefix
            if prefix is not None:
                former = self._names.get(prefix)
                if former is None:
                    prefix.holders += 1
                else:  # it has left without an event: what is held is not stored again
                    del self._blocks[former], self._released[former]
                self._names[prefix] = name
                self._unstored.pop(prefix, None)
        self._release(name)

    def release(self, prefixes: list[Prefix], computed: Collection[Prefix] = ()) -> None:
        """A sequence has let go of these, in this order.

        :param computed: those that it has computed itself: where the window does not hold one of them, it has
            slid out before it was stored. What else is not held is passed over.
        """
        for prefix in prefixes:
            name = self._names.get(prefix)
            if name is not None:
                self._release(name)
            elif prefix in computed:
                self._clock += 1
                self._unstored.pop(prefix, None)
                self._unstored[prefix] = self._clock

    def remove(self, name: EngineHash, *, silently: bool) -> list[Prefix]:
        """The engine has evicted a block: what has left with it.

        :param silently: orphans leave without an event, so those that were before it have left.
        """
        released = self._released.get(name)
        if released is None:
            return []
        if silently:
            self._evicted = max(self._evicted, released)
        lost: list[Prefix] = []
        self._drop(name, lost)
        return lost

    def settle(self, path: set[Prefix]) -> list[Prefix]:
        """Drop the orphans that were released before what was evicted, but for those on ``path``.

        The sequence for which room was made had claimed these before.
        """
        lost: list[Prefix] = []
        claimed: list[tuple[int, EngineHash]] = []
        while self._orphans and self._orphans[0][0] < self._evicted:
            if self._blocks.get(self._orphans[0][1]) in path:
                claimed.append(heapq.heappop(self._orphans))
            else:
                self._drop_orphan(lost)
        for each in claimed:
            heapq.heappush(self._orphans, each)
        while self._first_unstored() < self._evicted:
            del self._unstored[next(iter(self._unstored))]
        self._evicted = 0
        return lost

    def drop(self, prefix: Prefix) -> list[Prefix]:
        """The engine uses that block for something else, without an event."""
        lost: list[Prefix] = []
        name = self._names.get(prefix)
        if name is not None:
            self._drop(name, lost)
        return lost

    def overflow(self) -> list[Prefix]:
        """Orphans that must have left, because the window would hold more than the engine has blocks."""
        lost: list[Prefix] = []
        if self.capacity is None:
            self._unstored.clear()
            return lost
        while len(self._blocks) + len(self._unstored) > self.capacity and (self._orphans or self._unstored):
            if not self._orphans or self._first_unstored() < self._orphans[0][0]:
                del self._unstored[next(iter(self._unstored))]
            else:
                self._drop_orphan(lost)
        return lost

    def _first_unstored(self) -> float:
        """The place of the one that leaves first."""
        return next(iter(self._unstored.values()), math.inf)

    def _release(self, name: EngineHash) -> None:
        self._clock += 1
        self._released[name] = self._clock
        self._note_orphan(name)

    def _note_orphan(self, name: EngineHash) -> None:
        if not self._is_orphan(name):
            return
        heapq.heappush(self._orphans, (self._released[name], name))
        if len(self._orphans) > 64 + 2 * len(self._blocks):
            self._orphans = [(self._released[each], each) for each in self._blocks if self._is_orphan(each)]
            heapq.heapify(self._orphans)

    def _is_orphan(self, name: EngineHash) -> bool:
        prefix = self._blocks.get(name)
        return prefix is not None and prefix.parent is not None and prefix.parent not in self._names

    def _drop_orphan(self, lost: list[Prefix]) -> None:
        """Take the first entry; drop its block where it still stands for an orphan."""
        released, name = heapq.heappop(self._orphans)
        if self._released.get(name) == released and self._is_orphan(name):
            self._drop(name, lost)

    def _drop(self, name: EngineHash, lost: list[Prefix]) -> None:
        prefix = self._blocks.pop(name)
        del self._released[name]
        if prefix is None or self._names.get(prefix) != name:
            return
        del self._names[prefix]
        lost.append(prefix)
        for child in prefix.children:
            child_name = self._names.get(child)
            if child_name is not None:
                self._note_orphan(child_name)
        prefix.holders -= 1
        self._prefixes.prune(prefix)
