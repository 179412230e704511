"""How vLLM searches for what it reuses where groups of several kinds give up a block. Pure.

The kinds of groups are looked up one after another, each no deeper than the one before has found. Where one
finds less, all are looked up again. A block is given up only once at a length, so that in a later turn a kind
may go without it. That makes the result depend on the order, and no list of blocks that a boundary needs says
it. Where there is one group, or a full kind and another, one turn is all, and hybrid.py says what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from vswa_plugin.blocks.layout import FULL, RECURRENT, CacheGroup, CacheLayout, Resumption

#: Whether a group holds the hash unit of that index, by group id.
Holds = Mapping[int, Callable[[int], bool]]


class Kind(NamedTuple):
    """Groups that are looked up together, because they are alike."""

    group: CacheGroup
    ids: tuple[int, ...]


def kinds_of(layout: CacheLayout) -> list[Kind]:
    """The kinds of the groups, in the order in which they are looked up: a full one first."""
    found: dict[CacheGroup, list[int]] = {}
    for group in layout.groups:
        alike = msgspec.structs.replace(group, group_id=0)
        found.setdefault(alike, []).append(group.group_id)
    kinds = [Kind(group, tuple(ids)) for group, ids in found.items()]
    return sorted(kinds, key=lambda kind: kind.group.kind != FULL)


def looks_once(layout: CacheLayout) -> bool:
    """Whether the engine is content with one turn."""
    kinds = kinds_of(layout)
    return len(layout.groups) == 1 or (len(kinds) == 2 and kinds[0].group.kind == FULL)


def searches(layout: CacheLayout) -> bool:
    """Whether what is reused depends on the order of the engine's search.

    With a lookahead vLLM gives up no block, so that this does not arise.
    """
    drops = any(group.drops_last for group in layout.groups)
    return drops and not layout.lookahead and not looks_once(layout)


def found_by_turns(layout: CacheLayout, where: Resumption, holds: Holds, prompt_len: int) -> int:
    """Tokens that are reused, as far as the search goes."""
    search = _Search(where, holds, prompt_len)
    return search.by_turns(kinds_of(layout))


class _Search:
    def __init__(self, where: Resumption, holds: Holds, prompt_len: int) -> None:
        self._where, self._holds = where, holds
        self._unit = where.hash_block_size
        self._most = max(0, prompt_len - 1)
        #: Behind the last token that a block which is given up may contain.
        self._named = prompt_len // self._unit * self._unit
        self._peek = min(self._named, self._most) if where.spare_last else self._named

    def by_turns(self, kinds: Sequence[Kind]) -> int:
        length, given_up, whole = self._most, set[Kind](), self._most
        while True:
            current = length
            for kind in kinds:
                if kind.group.kind == FULL:
                    if length == self._most:  # what a full kind holds from the start is looked up once
                        whole = current = self._longest(kind, current, kind.group.drops_last)
                        given_up |= {kind} if kind.group.drops_last else set()
                    current = min(current, whole)
                    continue
                drops = kind.group.drops_last and kind not in given_up
                found = self._longest(kind, current, drops)
                if drops:
                    given_up.add(kind)
                elif found < current:
                    given_up.clear()
                current = found
            if current >= length:
                return length
            length = current

    def _longest(self, kind: Kind, most: int, drops: bool) -> int:
        """The most tokens, up to ``most``, of which the kind holds what it needs."""
        group, size = kind.group, kind.group.block_size
        if drops and group.kind != RECURRENT:
            fine = self._where.partial and group.kind == FULL
            most = min(most + (self._unit if fine else size), self._peek)
        match group.kind:
            case "recurrent":
                return self._state(kind, most)
            case "sliding":
                return self._window(kind, most, drops)
            case "chunked":
                assert group.chunk_size is not None
                return self._run(kind, most // group.chunk_size * group.chunk_size, most)
            case _:
                return self._whole(kind, most, drops)

    def _whole(self, kind: Kind, most: int, drops: bool) -> int:
        size = kind.group.block_size
        length = self._run(kind, 0, most)
        if self._where.partial:
            inside = range(
                min(most, length + size - self._unit) // self._unit * self._unit, length, -self._unit
            )
            length = next((end for end in inside if self._held(kind, end)), length)
        if drops and length:
            length -= min(self._where.alignment, size)
        return self._aligned(length)

    def _state(self, kind: Kind, most: int) -> int:
        step = self._where.alignment
        ends = range(most // step * step, 0, -step)
        return next((end for end in ends if self._held(kind, end)), 0)

    def _window(self, kind: Kind, most: int, drops: bool) -> int:
        """From the end, the first run of blocks that is long enough, or reaches the start."""
        group, size = kind.group, kind.group.block_size
        assert group.window_size is not None
        needed = max(1, -(-(group.window_size - 1) // size) + drops)
        run, start = 0, most // size * size
        for end in range(start, 0, -size):
            if not self._held(kind, end):
                run = 0
            elif run or self._aligned(resumed := end - size * drops) == resumed:
                run += 1
                if run == needed:
                    start = end - size
                    break
        else:
            start = 0
        end = start + run * size
        if start == 0 and run < needed:  # fewer than are needed, from the start on
            end = self._aligned(end)
        return self._aligned(max(0, end - size * drops))

    def _run(self, kind: Kind, start: int, most: int) -> int:
        size = kind.group.block_size
        end = start
        while end + size <= most and self._held(kind, end + size):
            end += size
        return end

    def _held(self, kind: Kind, end: int) -> bool:
        return end <= self._named and all(self._holds[each](end // self._unit - 1) for each in kind.ids)

    def _aligned(self, length: int) -> int:
        return length - length % self._where.alignment
