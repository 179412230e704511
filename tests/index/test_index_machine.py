"""The window index against a naive model after every event: pure and compiled, with room and without."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.index_helpers import BLOCK, BOTH_PATHS, LAYOUTS, NaiveIndex, needs_kernel, new_index
from tests.properties import examples
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.index import WindowIndex
from vswa_plugin.wire.events import TIERS, Cleared, Event, Moved, Rank, Removed, Stored, layout_event

RANKS = [Rank(1), Rank(1, 1), Rank(2), Rank(7)]
DEPTH = 7
#: Two prompts that part after three blocks, and one of its own; 0 and the largest hash are hashes as any.
PROMPTS = [
    [11, 12, 13, 14, 15, 16, 17],
    [11, 12, 13, 24, 25, 26, 27],
    [0, 2**64 - 1, 33, 34, 35, 36, 37],
]


class IndexMachine(RuleBasedStateMachine):
    """Compares every score, tier and block with the naive model; subclasses set what is varied."""

    kernel = False
    max_blocks: int | None = None
    other_ranks = 0

    def __init__(self) -> None:
        super().__init__()
        self.index: WindowIndex = new_index(self.kernel, self.max_blocks)
        self.naive = NaiveIndex()
        for number in range(self.other_ranks):
            self.both("join", Rank(100 + number), LAYOUTS[0])
            if number % 40 == 0:
                self.apply(Rank(100 + number), Stored(1, 0, None, tuple(PROMPTS[0])))

    def both(self, method: str, *arguments: Any) -> None:
        getattr(self.index, method)(*arguments)
        getattr(self.naive, method)(*arguments)

    def apply(self, rank: Rank, event: Event) -> None:
        self.both("apply", rank, event)

    def group(self, rank: Rank, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.naive.ranks[rank].layout.groups)).group_id

    @initialize(shared=st.sampled_from(LAYOUTS), other=st.sampled_from(LAYOUTS), data=st.data())
    def start(self, shared: CacheLayout, other: CacheLayout, data: st.DataObject) -> None:
        """Three ranks share a part, and mostly a prompt."""
        for rank, layout in zip(RANKS, [shared, shared, shared, other], strict=True):
            self.both("join", rank, layout)
            self.store_everywhere(rank, data.draw(st.sampled_from(PROMPTS)), TIERS[0])

    @rule(rank=st.sampled_from(RANKS), prompt=st.sampled_from(PROMPTS), tier=st.sampled_from(TIERS))
    def store_everywhere(self, rank: Rank, prompt: list[int], tier: str) -> None:
        if rank in self.naive.ranks:
            for group in self.naive.ranks[rank].layout.groups:
                self.apply(rank, Stored(group.group_id, 0, None, tuple(prompt), tier))

    @rule(
        rank=st.sampled_from(RANKS),
        prompt=st.sampled_from(PROMPTS),
        start=st.integers(0, DEPTH - 1),
        count=st.integers(0, DEPTH),
        what=st.sampled_from(["stored", "removed", "removed", "moved"]),
        tier=st.sampled_from(TIERS),
        data=st.data(),
    )
    def blocks(
        self, rank: Rank, prompt: list[int], start: int, count: int, what: str, tier: str, data: st.DataObject
    ) -> None:
        if rank not in self.naive.ranks:
            return
        group, hashes = self.group(rank, data), tuple(prompt[start : start + count])
        parent = prompt[start - 1] if start else None
        events = {
            "stored": Stored(group, start, parent, hashes, tier),
            "removed": Removed(group, hashes),
            "moved": Moved(group, hashes, tier),
        }
        self.apply(rank, events[what])

    @rule(rank=st.sampled_from(RANKS), one_group=st.booleans(), data=st.data())
    def clear(self, rank: Rank, one_group: bool, data: st.DataObject) -> None:
        if rank in self.naive.ranks:
            self.apply(rank, Cleared(self.group(rank, data) if one_group else None))

    @rule(rank=st.sampled_from(RANKS))
    def drop(self, rank: Rank) -> None:
        self.index.drop(rank)
        self.naive.ranks.pop(rank, None)

    @rule(rank=st.sampled_from(RANKS), layout=st.sampled_from(LAYOUTS), announced=st.booleans())
    def join(self, rank: Rank, layout: CacheLayout, announced: bool) -> None:
        if announced:
            self.apply(rank, layout_event(layout))
        else:
            self.both("join", rank, layout)

    @rule(rank=st.sampled_from(RANKS), scored=st.booleans())
    def set_scored(self, rank: Rank, scored: bool) -> None:
        if rank in self.naive.ranks:
            self.index.set_scored(rank, scored)
            self.naive.ranks[rank].scored = scored

    @rule(budget=st.integers(1, 40))
    def sweep(self, budget: int) -> None:
        self.index.sweep(budget)

    @rule()
    def dump_and_load(self) -> None:
        """Where blocks were left out, the new index has room to leave out others: so not under a limit."""
        if self.max_blocks is None:
            dumped = self.index.dump()
            self.index = type(self.index).load(dumped, kernel=self.kernel, rules=self.index._rules)
            assert dumped == self.index.dump()

    @rule(
        prompt=st.sampled_from(PROMPTS),
        blocks=st.integers(0, DEPTH),
        tail=st.integers(0, BLOCK - 1),
        model=st.sampled_from([None, "gemma", "other", "unknown"]),
    )
    def scores_are_exact(self, prompt: list[int], blocks: int, tail: int, model: str | None) -> None:
        hashes, prompt_len = prompt[:blocks], blocks * BLOCK + tail
        expected = self.naive.score(hashes, prompt_len, model)
        scores = self.index.score(hashes, prompt_len, model)

        if self.index.stats().left_out == 0:
            assert expected == scores
        assert all(tokens <= expected.get(rank, 0) for rank, tokens in scores.items())
        explained = self.index.explain(hashes, prompt_len, model)
        assert scores == {e.rank: e.cached_tokens for e in explained if e.scored and e.cached_tokens}

    @invariant()
    def whole_prompts_score_as_the_model_says(self) -> None:
        for prompt in PROMPTS:
            self.scores_are_exact(prompt, DEPTH, 0, None)

    @invariant()
    def what_is_held_is_what_was_said(self) -> None:
        complete = self.index.stats().left_out == 0
        assert sorted(self.naive.ranks) == sorted(self.index.ranks)
        for rank in self.naive.ranks:
            said, held = self.naive.ranks[rank].held, self.index.contents(rank)
            if complete:
                assert said == held
            for group, blocks in held.items():
                assert blocks.items() <= said[group].items()
            counts = {group: sum(tiers.values()) for group, tiers in self.index.blocks(rank).items()}
            assert {group: len(blocks) for group, blocks in held.items()} == counts

    @invariant()
    def nothing_is_wrong_inside(self) -> None:
        self.index.check()
        if self.max_blocks is not None:
            assert sum(self.index.stats().blocks.values()) <= self.max_blocks


def run(full: int, **varied: Any) -> None:
    machine = type("Machine", (IndexMachine,), varied)
    run_state_machine_as_test(
        machine,
        settings=examples(
            full,
            stateful_step_count=20,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("kernel", BOTH_PATHS)
def test_an_index_scores_as_a_naive_one_after_every_event(kernel: bool) -> None:
    run(50, kernel=kernel)


@pytest.mark.parametrize("kernel", BOTH_PATHS)
@pytest.mark.parametrize("max_blocks", [3, 20])
def test_a_full_index_never_scores_more_than_a_naive_one(kernel: bool, max_blocks: int) -> None:
    run(12, kernel=kernel, max_blocks=max_blocks)


@needs_kernel
@pytest.mark.parametrize("other_ranks", [63, 130])
def test_many_ranks_are_as_exact_as_few(other_ranks: int) -> None:
    run(5, kernel=True, other_ranks=other_ranks)


@pytest.mark.soak
@pytest.mark.skipif(
    "'soak' not in (config.getoption('-m') or '')", reason="runs for minutes: ask with -m soak"
)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", BOTH_PATHS)
def test_an_index_scores_as_a_naive_one_for_minutes(kernel: bool) -> None:
    run(1000, kernel=kernel)
    run(300, kernel=kernel, max_blocks=10)
    run(100, kernel=kernel, other_ranks=130)
