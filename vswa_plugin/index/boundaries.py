"""A reuse rule applied to what ranks hold of one prompt, boundary by boundary. Pure.

Held blocks are masks of ranks, one for each name of the prompt: ``masks[group][i]`` is about the prefix of
``i + 1`` hash units. One rank is a mask of one bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import and_

from vswa_plugin.blocks.hybrid import Need
from vswa_plugin.blocks.layout import FULL, CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import ReuseRule, check_applicable, need_of

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
        groups = [
            _GroupMasks(group, masks[index], self.layout.hash_block_size, wanted)
            for index, group in enumerate(self.layout.groups)
        ]
        found: dict[int, int] = {}
        end = min([self.count, *(each.reach() // self.layout.block_size for each in groups)])
        for boundary in range(end, 0, -1):
            if not wanted:
                break
            resumable = self._resumable(groups, boundary, wanted)
            found.update(dict.fromkeys(_bits(resumable), boundary))
            wanted &= ~resumable
        return found

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
        stride = group.block_size // unit
        #: Ranks that hold a block and all before it.
        self._from_start = list(accumulate(masks[stride - 1 :: stride], and_, initial=wanted))

    def reach(self) -> int:
        """Tokens behind which no rank holds all that a full group needs; no bound for other groups."""
        size = self.group.block_size
        if self.group.kind != FULL:
            return (len(self._masks) + 1) * self._unit
        alive = next((i for i, mask in enumerate(self._from_start) if not mask), len(self._from_start))
        return alive * size  # inside the block after the last one that is held, at most

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
    """The boundaries of a prompt of which the first ``known`` names are known.

    :raises ConfigError: the rule cannot be applied to ``layout``.
    """
    check_applicable(rule, layout)
    rule.needs(layout, prompt_len)
    reach = known * layout.hash_block_size // layout.block_size
    return Boundaries(rule, layout, prompt_len, min(rule.boundaries(layout, prompt_len), reach))


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
