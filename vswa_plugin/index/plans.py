"""What a reuse rule asks of a prompt, once per prompt length: as numbers, or boundary by boundary. Pure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.reuse import RULES, Needs, ReuseRule


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """How prompts of one length are scored by numbers alone.

    :param boundaries: the deepest boundary, in blocks.
    :param trailing: per group, blocks needed before a boundary; None: all.
    :param at_end: the same at the deepest boundary, where that is the end of the prompt; None: no such one.
    :param unit: a boundary b is reported as min(b * unit, limit).
    :param asks_tokens: what is reported are boundaries; the rule turns them into tokens.
    """

    boundaries: int
    trailing: tuple[int | None, ...]
    at_end: tuple[int | None, ...] | None
    unit: int
    limit: int
    asks_tokens: bool


def plan_for(rule: ReuseRule, layout: CacheLayout, prompt_len: int) -> ScorePlan | None:
    """The plan for prompts of ``prompt_len`` tokens; None: the rule must be called for each boundary."""
    needs = rule.needs(layout, prompt_len)
    boundaries = rule.boundaries(layout, prompt_len)
    if needs is None or not _needs_something(needs):
        return None
    size = layout.block_size
    at_end = needs.at_prompt_end if boundaries * size == prompt_len else None
    # The built-in rules count whole blocks up to the last token but one; asking costs more than the walk.
    if rule is RULES.get(rule.name):
        return ScorePlan(boundaries, needs.trailing, at_end, size, prompt_len - 1, False)
    return ScorePlan(boundaries, needs.trailing, at_end, 1, sys.maxsize, True)


def _needs_something(needs: Needs) -> bool:
    """A boundary at which no group needs a block is never resumable; leave that to the general way."""
    return any(n != 0 for n in needs.trailing) and any(n != 0 for n in needs.at_prompt_end)


@dataclass(frozen=True, slots=True)
class Boundaries:
    """The same asked for at every boundary: ``first_needed[group][boundary]``."""

    count: int
    first_needed: tuple[tuple[int, ...], ...]

    def resumable(self, boundary: int, run_starts: Sequence[Sequence[int]]) -> bool:
        """Whether every group holds what it needs; see :func:`run_starts`."""
        return any(first[boundary] < boundary for first in self.first_needed) and all(
            starts[boundary] <= first[boundary]
            for starts, first in zip(run_starts, self.first_needed, strict=True)
        )

    def deepest(self, run_starts: Sequence[Sequence[int]]) -> int:
        return next((b for b in range(self.count, 0, -1) if self.resumable(b, run_starts)), 0)


def boundaries_for(rule: ReuseRule, layout: CacheLayout, prompt_len: int, known_blocks: int) -> Boundaries:
    """All boundaries of a prompt of which the sequence hashes of ``known_blocks`` are known."""
    count = min(rule.boundaries(layout, prompt_len), known_blocks)
    return Boundaries(
        count,
        tuple(
            tuple(rule.first_needed(group, boundary, prompt_len) for boundary in range(count + 1))
            for group in layout.groups
        ),
    )


def run_starts(held: Sequence[bool]) -> list[int]:
    """For each boundary, where the run of held blocks that ends there starts: at itself, if there is none."""
    starts = [0]
    for block, is_held in enumerate(held):
        starts.append(starts[-1] if is_held else block + 1)
    return starts
