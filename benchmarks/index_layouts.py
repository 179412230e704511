"""Layouts of more groups, and of block sizes that differ: what bench_index.py scores besides two windows.

Tables are asked directly, with the plan of a prompt whose end is not the end of a block. Dynamo's tree holds
the blocks of the group with global attention, and no others.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from index_sides import EVENT, PROMPTS_A_CASE, RANKS, Chain, Dynamo, by_event, in_turns, interleaved, load

from vswa_plugin.blocks.kernel import load_kernel
from vswa_plugin.index.plans import ScorePlan
from vswa_plugin.index.python_table import PythonTable
from vswa_plugin.index.tables import KernelTable, Table

CASES = ("all", "none", "no sliding")
_ALL_RANKS = (1 << len(RANKS)) - 1


@dataclass(frozen=True)
class Groups:
    """Numbers of a plan, and prompts of so many hash units. The first group has global attention."""

    name: str
    unit_tokens: int
    units: int
    step: int
    strides: tuple[int, ...]
    trailing: tuple[int | None, ...]

    @property
    def plan(self) -> ScorePlan:
        tokens = self.unit_tokens * self.step
        boundaries = self.units // self.step
        return ScorePlan(
            boundaries, self.trailing, None, tokens, boundaries * tokens, False, self.step, self.strides
        )


LAYOUTS = (
    Groups("full, sliding 512 and 1024, all /32", 32, 4096, 1, (1, 1, 1), (None, 16, 32)),
    Groups("full /16, 5 x sliding 512 /32", 16, 4096, 2, (1, *[2] * 5), (None, *[16] * 5)),
    Groups(
        "full /256, 3 x sliding 128 /64, sliding 8 /4, sliding 128 /8",
        *(4, 32_768, 64),
        (64, 16, 16, 16, 1, 2),
        (None, 2, 2, 2, 2, 16),
    ),
)


class Ours:
    """A table, and the hashes of all units of a prompt."""

    def __init__(self, name: str, table: Table, groups: Groups) -> None:
        self.name = name
        self.table = table
        self.plan = groups.plan

    def query(self, hashes: Sequence[int]) -> Callable[[], Any]:
        names = array("Q", hashes)
        return lambda: self.table.score(names, self.plan, _ALL_RANKS, list_of_ranks)


list_of_ranks: list[Any] = list(RANKS)


def layout_rows(dice: random.Random, rounds: int) -> Iterator[dict[str, Any]]:
    for groups in LAYOUTS:
        for case in CASES:
            yield {"layout": groups.name, "case": case, "us": _measured(groups, case, dice, rounds)}


def _measured(groups: Groups, case: str, dice: random.Random, rounds: int) -> dict[str, float]:
    prompts = [[dice.getrandbits(64) for _ in range(groups.units)] for _ in range(PROMPTS_A_CASE)]
    chains = [
        Chain.of([dice.getrandbits(64) for _ in prompt[:: groups.strides[0]]], None) for prompt in prompts
    ]
    dynamo, count, kernel = Dynamo(), len(groups.strides), load_kernel()
    sides: list[Ours] = [Ours("python", PythonTable(count), groups)]
    if kernel is not None:
        sides.append(Ours("kernel", KernelTable(kernel, count), groups))
    if case != "none":
        for rank in range(len(RANKS)):
            load(
                [dynamo],
                interleaved([by_event(chain, rank, EVENT if rank == 0 else 128) for chain in chains]),
            )
            _store(sides, groups, prompts, rank, sliding=case == "all")
    scores = [side.query(prompts[0])() for side in sides]
    if any(score != scores[0] for score in scores) or bool(scores[0]) != (case == "all"):
        raise AssertionError(f"{groups.name}, {case}: compiled and pure scores differ, or are no scores")

    def query(side: Dynamo | Ours, number: int) -> Callable[[], Any]:
        if isinstance(side, Dynamo):
            return side.query(chains[number % len(chains)], len(chains[0].blocks))
        return side.query(prompts[number % len(prompts)])

    both: list[Dynamo | Ours] = [dynamo, *sides]
    return in_turns(both, query, rounds)


def _store(
    sides: Sequence[Ours], groups: Groups, prompts: Sequence[list[int]], rank: int, *, sliding: bool
) -> None:
    """As events bring it: of each group in turn the blocks of some boundaries, the prompts taking turns."""
    units = (EVENT if rank == 0 else 128) * groups.strides[0]
    for start in range(0, groups.units, units):
        for prompt in prompts:
            for group, stride in enumerate(groups.strides if sliding else groups.strides[:1]):
                for side in sides:
                    side.table.add(group, rank, prompt[start + stride - 1 : start + units : stride], -1)
