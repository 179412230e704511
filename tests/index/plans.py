"""Plans of any kind, and what they say by brute force: every boundary, every group, every block of it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Collection, Sequence

from vswa_plugin.index.plans import ScorePlan
from vswa_plugin.index.python_table import PythonTable
from vswa_plugin.index.tables import KernelTable, Table
from vswa_plugin.wire.events import Rank

GROUPS = 3
#: Several words of a mask, and both ends of one.
BITS = [0, 1, 2, 63, 64, 150]
RANKS: list[Rank | None] = [Rank(number) for number in range(BITS[-1] + 1)]
ALL = sum(1 << bit for bit in BITS)


def needed_blocks(plan: ScorePlan, group: int, boundary: int) -> list[int]:
    stride = plan.strides[group] if plan.strides else 1
    end = boundary * plan.step // stride
    chunk = plan.chunks[group] if plan.chunks else None
    needs = plan.at_end if plan.at_end and boundary == plan.boundaries else plan.trailing
    trailing = needs[group]
    if chunk:
        needed = [block for block in range(end) if block // chunk == end // chunk]
    else:
        needed = [block for block in range(end) if trailing is None or block >= end - trailing]
    return [*needed, end] if plan.after and plan.after[group] else needed


def brute_force(plan: ScorePlan, hashes: Sequence[int], held: Sequence[Collection[int]]) -> int:
    """What one rank scores that holds ``held[group]``."""

    def is_held(group: int, block: int) -> bool:
        position = (block + 1) * (plan.strides[group] if plan.strides else 1) - 1
        return position < len(hashes) and hashes[position] in held[group]

    for boundary in range(min(plan.boundaries, len(hashes) // plan.step), 0, -1):
        needed = [needed_blocks(plan, group, boundary) for group in range(GROUPS)]
        if any(needed) and all(is_held(group, block) for group in range(GROUPS) for block in needed[group]):
            return max(0, min(boundary * plan.unit, plan.limit))
    return 0


def scores_of_both(
    python: PythonTable, kernel: KernelTable | None, hashes: Sequence[int], plan: ScorePlan, wanted: int
) -> dict[Rank, int]:
    """What both tables say, which must be the same."""
    tables: list[tuple[Table, Sequence[int]]] = [(python, hashes)]
    if kernel is not None:
        tables += [(kernel, hashes), (kernel, array("Q", hashes))]
    scores = [table.score(names, plan, wanted, RANKS) for table, names in tables]
    assert all(each == scores[0] for each in scores), (plan, scores)
    return scores[0]


def dice_plan(dice: random.Random, units: int, deepest_need: int) -> ScorePlan:
    """Any plan for prompts of about so many units."""
    step = dice.choice([1, 1, 2, 3, 4, 6])
    boundaries = dice.randrange(units // step + 3)

    def each(number: Callable[[], int | None]) -> tuple[int | None, ...]:
        return tuple(number() for _ in range(GROUPS))

    def need() -> int | None:
        return dice.choice([None, dice.randrange(deepest_need), dice.randrange(deepest_need)])

    trailing, unit = each(need), dice.randint(1, 5)
    limit = dice.randrange(boundaries * unit + 2)
    if step == 1 and dice.random() < 0.5:
        return ScorePlan(boundaries, trailing, dice.choice([None, each(need)]), unit, limit, False)
    divisors = [stride for stride in range(1, step + 1) if step % stride == 0]
    strides = tuple(dice.choice(divisors) for _ in range(GROUPS))
    chunks = each(lambda: dice.choice([None, 1 + dice.randrange(deepest_need)]))
    after = tuple(dice.randrange(2) for _ in range(GROUPS))
    return ScorePlan(
        *(boundaries, trailing, None, unit, limit, False, step),
        strides=dice.choice([strides, () if step == 1 else strides]),
        chunks=dice.choice([(), chunks]),
        after=dice.choice([(), after]),
    )
