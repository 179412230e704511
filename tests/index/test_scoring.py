"""Both tables against brute force: any plan, any content, after any change; and both on long prompts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.index.plans import ALL, BITS, GROUPS, RANKS, brute_force, dice_plan, scores_of_both
from tests.index_helpers import KERNEL, needs_kernel
from tests.properties import examples
from vswa_plugin.index.plans import ScorePlan
from vswa_plugin.index.python_table import PythonTable
from vswa_plugin.index.tables import ALL_GROUPS, KernelTable, Table
from vswa_plugin.wire.events import Rank

UNITS = 26
_DICE = random.Random(4)
_STEM = [_DICE.getrandbits(64) for _ in range(UNITS)]
#: Two prompts that part after ten units, and one of its own, which begins with what links unused rows.
PROMPTS = [_STEM, _STEM[:10] + [_DICE.getrandbits(64) for _ in range(UNITS - 10)]]
PROMPTS.append([*range(8), 2**64 - 1, *(_DICE.getrandbits(64) for _ in range(UNITS - 9))])
NAMES = [name for prompt in PROMPTS for name in prompt]
FILLER = [_DICE.getrandbits(64) for _ in range(3_000)]
GROUP, BIT, PROMPT = st.integers(0, GROUPS - 1), st.sampled_from(BITS), st.sampled_from(PROMPTS)


class ScoringMachine(RuleBasedStateMachine):
    """Sets per rank and group say what is held; nothing of it need be closed under prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.python = PythonTable(GROUPS)
        self.kernel = None if KERNEL is None else KernelTable(KERNEL, GROUPS)
        self.tables: list[Table] = [self.python, *([self.kernel] if self.kernel else [])]
        self.held: dict[int, list[set[int]]] = {bit: [set() for _ in range(GROUPS)] for bit in BITS}

    def store(self, group: int, bit: int, hashes: list[int]) -> None:
        for table in self.tables:
            table.add(group, bit, hashes, -1)
        self.held[bit][group].update(hashes)

    def remove(self, group: int, bit: int, hashes: list[int]) -> None:
        for table in self.tables:
            table.discard(group, bit, hashes)
        self.held[bit][group].difference_update(hashes)

    @rule(prompt=PROMPT, bit=BIT, end=st.integers(1, UNITS), one_by_one=st.booleans())
    def store_prompt(self, prompt: list[int], bit: int, end: int, one_by_one: bool) -> None:
        for group in range(GROUPS):
            for hashes in [[name] for name in prompt[:end]] if one_by_one else [prompt[:end]]:
                self.store(group, bit, hashes)

    @rule(
        group=GROUP,
        bit=BIT,
        prompt=PROMPT,
        start=st.integers(0, UNITS),
        end=st.integers(0, UNITS),
        stride=st.sampled_from([1, 1, 2, 3, 4]),
        backwards=st.booleans(),
        stored=st.booleans(),
    )
    def change(
        self, group: int, bit: int, prompt: list[int], start: int, end: int, stride: int, **how: bool
    ) -> None:
        hashes = [prompt[at] for at in range(stride - 1, UNITS, stride) if start <= at < end]
        hashes = hashes[::-1] if how["backwards"] else hashes
        (self.store if how["stored"] else self.remove)(group, bit, hashes)

    @rule(prompt=PROMPT, bit=BIT, group=GROUP, at=st.integers(0, UNITS - 1))
    def store_all_but_one(self, prompt: list[int], bit: int, group: int, at: int) -> None:
        self.store_prompt(prompt, bit, UNITS, False)
        self.remove(group, bit, [prompt[at]])

    @rule(group=GROUP, bit=BIT, hashes=st.lists(st.sampled_from(NAMES), max_size=5))
    def remove_some(self, group: int, bit: int, hashes: list[int]) -> None:
        self.remove(group, bit, hashes)

    @rule(bit=BIT, group=st.integers(ALL_GROUPS, GROUPS - 1), budget=st.integers(1, 100))
    def sweep(self, bit: int, group: int, budget: int) -> None:
        for table in self.tables:
            table.rewind()
            while not table.sweep(1 << bit, budget, group):
                pass
        for held in self.held[bit] if group < 0 else [self.held[bit][group]]:
            held.clear()

    @rule(count=st.sampled_from([100, 3_000]), kept=st.sampled_from([0, 50]))
    def grow_and_shrink(self, count: int, kept: int) -> None:
        """What is kept lies between the rows of the prompts from now on."""
        self.store(0, 1, FILLER[:count])
        self.remove(0, 1, FILLER[kept:count])

    @rule(seed=st.integers(0, 2**32))
    def any_plan_scores_as_brute_force_says(self, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(8):
            hashes = dice.choice(PROMPTS)[: dice.choice([UNITS, dice.randrange(UNITS)])]
            self.scores_are_exact(hashes, dice_plan(dice, UNITS, 8), dice.choice([ALL, dice.randrange(ALL)]))

    def scores_are_exact(self, hashes: list[int], plan: ScorePlan, wanted: int) -> None:
        expected = {
            RANKS[bit]: brute_force(plan, hashes, self.held[bit]) for bit in BITS if wanted >> bit & 1
        }

        scores = scores_of_both(self.python, self.kernel, hashes, plan, wanted & ALL)
        assert {rank: tokens for rank, tokens in expected.items() if tokens} == scores, (hashes, plan)

    @invariant()
    def whole_prompts_score_as_brute_force_says(self) -> None:
        for prompt in PROMPTS:
            for plan in (_PLAIN, _MIXED):
                self.scores_are_exact(prompt, plan, ALL)

    @invariant()
    def nothing_is_wrong_inside(self) -> None:
        assert [None] * len(self.tables) == [table.check() for table in self.tables]


_PLAIN = ScorePlan(UNITS, (None, 4, 4), (None, 5, 5), 16, 16 * UNITS - 1, False)
_MIXED = ScorePlan(
    UNITS // 2, (None, 3, 2), None, 64, 64 * UNITS, False, 2, (2, 1, 1), (None, 6, None), (0, 0, 1)
)


def run(full: int) -> None:
    run_state_machine_as_test(
        ScoringMachine,
        settings=examples(full, stateful_step_count=25, suppress_health_check=list(HealthCheck)),
    )


def test_scores_of_any_plan_are_those_of_brute_force_after_every_change() -> None:
    run(50)


@pytest.mark.soak
@pytest.mark.skipif(
    "'soak' not in (config.getoption('-m') or '')", reason="runs for minutes: ask with -m soak"
)
@pytest.mark.timeout(1200)
def test_scores_of_any_plan_are_those_of_brute_force_for_minutes() -> None:
    run(3000)


# -- long prompts ----------------------------------------------------------------------------------

LONG = 1_400


def stored_long(dice: random.Random) -> tuple[list[Table], list[list[int]]]:
    """Three prompts whose blocks came in events of one size, or of any, in turns; with holes, or none."""
    tables: list[Table] = [PythonTable(GROUPS), KernelTable(_kernel(), GROUPS)]
    prompts = [[dice.getrandbits(64) for _ in range(LONG)] for _ in range(3)]
    size, holes = dice.choice([1, 3, 16, 100, 0]), dice.choice([0.0, 0.0, 0.002, 0.05])
    for bit in dice.sample(range(len(RANKS)), dice.choice([1, 5, 70])):
        ends = [dice.choice([LONG, dice.randrange(LONG)]) for _ in prompts]
        at = 0
        while at < max(ends):
            some = size or 1 + dice.randrange(40)
            for prompt, end in zip(prompts, ends, strict=True):
                for group in range(GROUPS):
                    hashes = [name for name in prompt[at : min(at + some, end)] if dice.random() >= holes]
                    for table in tables:
                        table.add(group, bit, hashes, -1)
            at += some
        size = size and dice.choice([size, 200])
    return tables, prompts


def _kernel() -> Any:
    assert KERNEL is not None
    return KERNEL


@needs_kernel
@pytest.mark.parametrize("seed", range(25))
def test_long_prompts_of_any_plan_score_alike(seed: int) -> None:
    """Longer than all that the kernel reads, looks up and joins at a time."""
    dice = random.Random(seed)
    tables, prompts = stored_long(dice)
    python, kernel = tables
    assert isinstance(python, PythonTable) and isinstance(kernel, KernelTable)
    for _ in range(4):
        for _ in range(6):
            plan = dice_plan(dice, LONG, dice.choice([4, 40, 300]))
            hashes = dice.choice(prompts)[: dice.choice([LONG, dice.randrange(LONG)])]
            scores_of_both(python, kernel, hashes, plan, (1 << len(RANKS)) - 1)
        names = [name for prompt in prompts for name in prompt]
        gone, bit = dice.sample(names, dice.choice([1, 500])), dice.randrange(len(RANKS))
        for table in tables:
            for group in range(GROUPS):
                table.discard(group, bit, gone)
            table.sweep(1 << 64, 100_000)
            table.add(0, bit, [name ^ 1 for name in gone], -1)
    assert kernel.check() is None


@needs_kernel
@pytest.mark.parametrize("words", range(1, 7))
def test_ranks_lose_what_they_lack_whatever_the_others_of_their_column_hold(words: int) -> None:
    """The same bit of every word: one holds all, the others lack a block each."""
    prompt = [_DICE.getrandbits(64) for _ in range(LONG)]
    ranks: list[Rank | None] = [Rank(number) for number in range(64 * words)]
    plan = ScorePlan(LONG, (None,), None, 1, LONG, False)
    for full in range(words):
        table = KernelTable(_kernel(), 1)
        lacking = {word: LONG if word == full else 900 + word for word in range(words)}
        for word, block in lacking.items():
            table.add(0, 64 * word + 5, prompt[:block] + prompt[block + 1 :], -1)

        expected = {ranks[64 * word + 5]: block for word, block in lacking.items()}
        assert expected == table.score(prompt, plan, (1 << len(ranks)) - 1, ranks)


@pytest.mark.parametrize("table", [PythonTable(2), *([KernelTable(KERNEL, 2)] if KERNEL else [])])
@pytest.mark.parametrize(
    "wrong",
    [
        {"trailing": (None,)},
        {"trailing": ()},
        {"trailing": (-1, None)},
        {"at_end": ()},
        {"at_end": (-1, None)},
        {"unit": 0},
        {"step": 0},
        {"strides": (1,)},
        {"strides": (0, 1)},
        {"strides": (2, 1)},
        {"step": 6, "strides": (4, 1)},
        {"chunks": (0, 1)},
        {"chunks": (1, 2, 3)},
        {"after": (2, 0)},
        {"after": (-1, 0)},
        {"at_end": (1, 1), "step": 2, "strides": (2, 2)},
        {"at_end": (1, 1), "chunks": (4, None)},
        {"at_end": (1, 1), "after": (0, 1)},
    ],
)
def test_what_is_no_plan_is_refused(table: Table, wrong: dict[str, Any]) -> None:
    plan = ScorePlan(3, (None, 2), None, 4, 12, False)
    assert {} == table.score([1, 2, 3], plan, 1, RANKS)

    with pytest.raises(ValueError, match=r"^expected "):
        table.score([1, 2, 3], plan._replace(**wrong), 1, RANKS)


@pytest.mark.parametrize("table", [PythonTable(1), *([KernelTable(KERNEL, 1)] if KERNEL else [])])
def test_a_boundary_at_which_nothing_is_needed_is_never_resumable(table: Table) -> None:
    table.add(0, 0, [1, 2, 3, 4, 5], -1)
    chunks_of_two = ScorePlan(4, (None,), None, 1, 99, False, chunks=(2,))

    assert {RANKS[0]: 3} == table.score([1, 2, 3, 4], chunks_of_two, 1, RANKS)
    assert {RANKS[0]: 3} == table.score([1, 2, 3, 4], chunks_of_two._replace(chunks=(4,)), 1, RANKS)
    assert {RANKS[0]: 4} == table.score([1, 2, 3, 4], chunks_of_two._replace(chunks=(5,)), 1, RANKS)
    assert {} == table.score([1, 2], chunks_of_two._replace(boundaries=2, chunks=(1,)), 1, RANKS)
    assert {} == table.score([1, 2], ScorePlan(2, (0,), None, 1, 99, False), 1, RANKS)
    assert {RANKS[0]: 1} == table.score([1, 2], ScorePlan(2, (1,), (0,), 1, 99, False), 1, RANKS)
    assert {RANKS[0]: 4} == table.score([1, 2, 3, 4, 5], chunks_of_two._replace(after=(1,)), 1, RANKS)
