"""What a reuse rule asks of a prompt, once per prompt length: as numbers, or boundary by boundary. Pure."""

from __future__ import annotations

import sys
from typing import NamedTuple

from vswa_plugin.blocks import hybrid
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.reuse import RULES, Needs, ReuseRule


class ScorePlan(NamedTuple):
    """How prompts of one length are scored by numbers alone.

    Positions in the prompt are counted in hash units: ``hashes[i]`` names the prefix of i + 1 units. Boundary
    b (1 to ``boundaries``) lies at b * ``step`` units. Block j of a group of stride s is named by
    ``hashes[(j + 1) * s - 1]``, so that n = b * step / s of its blocks lie before boundary b. The step is a
    multiple of every stride. A boundary at which no group needs a block is never resumable. Where fewer
    hashes are given than the boundaries need, those boundaries count whose blocks all have one.

    :param boundaries: the deepest boundary.
    :param trailing: per group, how many of the last blocks before a boundary it needs; None: all.
    :param at_end: the same at the deepest boundary, where that is the end of the prompt; None: no such one.
        Only where step and strides are 1, and no group has a chunk or needs blocks after the boundary.
    :param unit: a boundary b is reported as min(b * unit, limit).
    :param asks_tokens: what is reported are boundaries; the rule turns them into tokens.
    :param step: units from one boundary to the next.
    :param strides: per group, units of one block; empty: 1 for each group.
    :param chunks: per group, None or C > 0: it needs the blocks from n // C * C up to the boundary, whatever
        its ``trailing`` is; empty: None for each group.
    :param after: per group 1 if it also needs the block directly after the boundary, else 0; empty: 0 for
        each group.
    """

    boundaries: int
    trailing: tuple[int | None, ...]
    at_end: tuple[int | None, ...] | None
    unit: int
    limit: int
    asks_tokens: bool
    step: int = 1
    strides: tuple[int, ...] = ()
    chunks: tuple[int | None, ...] = ()
    after: tuple[int, ...] = ()


def check_plan(plan: ScorePlan, groups: int) -> None:
    """Raise ValueError for a plan that is none for so many groups; the kernel refuses the same."""
    given = [plan.trailing, *filter(None, (plan.strides, plan.chunks, plan.after))]
    given += [] if plan.at_end is None else [plan.at_end]
    if any(len(numbers) != groups for numbers in given):
        raise ValueError(f"expected tuples of {groups} numbers, one for each group, got {given}")
    strides = plan.strides or (1,)
    if plan.step < 1 or plan.unit < 1:
        raise ValueError(f"expected a step and a unit of at least 1, got {plan.step} and {plan.unit}")
    if min(strides) < 1 or any(plan.step % stride for stride in strides) or not {0, 1}.issuperset(plan.after):
        raise ValueError("expected strides that divide the step, and one block after at most")
    if min((n for n in (*plan.trailing, *(plan.at_end or ())) if n is not None), default=0) < 0:
        raise ValueError("expected numbers of at least 0")
    if min((chunk for chunk in plan.chunks if chunk is not None), default=1) < 1:
        raise ValueError("expected numbers of at least 1")
    if plan.at_end is not None and (plan.step > 1 or any(plan.chunks) or any(plan.after)):
        raise ValueError("expected at_end only with blocks of one unit, no chunks and none after")


def plan_for(rule: ReuseRule, layout: CacheLayout, prompt_len: int) -> ScorePlan | None:
    """The plan for prompts of ``prompt_len`` tokens; None: the rule must be called for each boundary."""
    needs = rule.needs(layout, prompt_len)
    if needs is None or not _needs_something(needs):
        return None
    boundaries, size = rule.boundaries(layout, prompt_len), layout.block_size
    # The built-in rules count whole blocks up to the last token but one; asking costs more than the walk.
    asks_tokens = rule is not RULES.get(rule.name) or hybrid.shortens(layout)
    plan = ScorePlan(
        boundaries,
        needs.trailing,
        None,
        1 if asks_tokens else size,
        sys.maxsize if asks_tokens else prompt_len - 1,
        asks_tokens,
    )
    at_end = needs.at_prompt_end if boundaries * size == prompt_len else None
    if layout.plain and not any(needs.chunks) and not any(needs.after):
        return plan._replace(at_end=at_end)
    if at_end not in (None, needs.trailing):
        return None  # the table knows that of plain needs only
    unit = layout.hash_block_size
    return plan._replace(
        step=size // unit,
        strides=tuple(group.block_size // unit for group in layout.groups),
        chunks=needs.chunks,
        after=needs.after,
    )


def _needs_something(needs: Needs) -> bool:
    """A boundary at which no group needs a block is never resumable; leave that to the general way."""
    return any(n != 0 for n in needs.trailing) and any(n != 0 for n in needs.at_prompt_end)
