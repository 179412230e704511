"""A reuse rule applied to what ranks hold of one prompt, boundary by boundary. Pure.

Held blocks are masks of ranks, one for each name of the prompt: ``masks[group][i]`` is about the prefix of
``i + 1`` hash units. One rank is a mask of one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import and_

from vswa_plugin.blocks.hybrid import Need
from vswa_plugin.blocks.layout import FULL, CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import RULES, ReuseRule, SearchingRule, need_of, searching
from vswa_plugin.index.tables import bits_of

Masks = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Boundaries:
    """The boundaries of a prompt, as far as its names are known.

    :param count: the deepest; 0 is always one, and needs nothing.
    """

    rule: ReuseRule
    layout: CacheLayout
    prompt_len: int
    count: int

    def need(self, group: CacheGroup, boundary: int) -> Need:
        """What ``group`` must hold at ``boundary``."""
        return need_of(self.rule, self.layout, group, boundary, self.prompt_len)

    def deepest(self, masks: Masks, wanted: int) -> dict[int, int]:
        """Rank's bit -> the deepest boundary at which it could resume; ranks without one are left out."""
        by_search = searching(self.rule, self.layout)
        if by_search is not None:
            found = {bit: self._search(by_search, masks, bit) for bit in bits_of(wanted)}
            return {bit: boundary for bit, boundary in found.items() if boundary}
        groups = [
            _GroupMasks(group, masks[index], self.layout.hash_block_size, wanted)
            for index, group in enumerate(self.layout.groups)
        ]
        found = {}
        end = self.count
        if self.rule is RULES.get(self.rule.name):  # a rule of a plugin may need less of a full group
            reaches = [each.reach() for each in groups if each.group.kind == FULL]
            end = min([end, *(reach // self.layout.block_size for reach in reaches)])
        for boundary in range(end, 0, -1):
            if not wanted:
                break
            resumable = self._resumable(groups, boundary, wanted)
            found.update(dict.fromkeys(bits_of(resumable), boundary))
            wanted &= ~resumable
        return found

    def _search(self, rule: SearchingRule, masks: Masks, bit: int) -> int:
        """The boundary for one rank."""

        def of(group: Sequence[int]) -> Callable[[int], bool]:
            return lambda unit: unit < len(group) and bool(group[unit] >> bit & 1)

        holds = {group.group_id: of(each) for group, each in zip(self.layout.groups, masks, strict=True)}
        return rule.search(self.layout, holds, self.prompt_len)

    def _resumable(self, groups: Sequence[_GroupMasks], boundary: int, wanted: int) -> int:
        evidence = False
        for each in groups:
            need = self.need(each.group, boundary)
            evidence = evidence or len(need.all_of) > 0 or need.any_of is not None
            wanted &= each.satisfying(need, wanted)
            if not wanted:
                return 0
        return wanted if evidence else 0


class _GroupMasks:
    """What one group holds of a prompt."""

    def __init__(self, group: CacheGroup, masks: Sequence[int], unit: int, wanted: int) -> None:
        self.group = group
        self._masks = masks
        self._unit = unit
        self._wanted = wanted

    @cached_property
    def _from_start(self) -> list[int]:
        """For each number of blocks, from 0 on, the ranks that hold so many; few groups need it."""
        stride = self.group.block_size // self._unit
        return list(accumulate(self._masks[stride - 1 :: stride], and_, initial=self._wanted))

    def reach(self) -> int:
        """Of a full group that needs all: tokens behind which no rank holds what it needs."""
        alive = next((i for i, mask in enumerate(self._from_start) if not mask), len(self._from_start))
        return alive * self.group.block_size  # inside the block after the last one that is held, at most

    def satisfying(self, need: Need, wanted: int) -> int:
        """Of the ranks ``wanted`` those that hold what is needed."""
        held = wanted
        if need.all_of:
            first, last = need.all_of[0] // self.group.block_size, need.all_of[-1]
            if last > len(self._masks) * self._unit:
                return 0
            if first == 1 and need.all_of.step == self.group.block_size:
                held &= self._from_start[last // self.group.block_size]
            else:
                for position in reversed(need.all_of):
                    held &= self._masks[position // self._unit - 1]
                    if not held:
                        return 0
        if need.any_of is not None:
            some = 0
            for position in need.any_of:
                if position <= len(self._masks) * self._unit:
                    some |= self._masks[position // self._unit - 1]
            held &= some
        return held


def boundaries_for(rule: ReuseRule, layout: CacheLayout, prompt_len: int, known: int) -> Boundaries:
    """The boundaries of a prompt of which the first ``known`` names are known; the rule takes ``layout``."""
    reach = known * layout.hash_block_size // layout.block_size
    return Boundaries(rule, layout, prompt_len, min(rule.boundaries(layout, prompt_len), reach))
