"""Routing simulations: the queue, the policies, the numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswa_plugin.blocks.layout import Naming
from vswa_plugin.engine.contract import RawEvent
from vswa_plugin.engine.predicted import Prompt
from vswa_plugin.errors import ConfigError
from vswa_plugin.simulation.costs import CostModel
from vswa_plugin.simulation.policies import ByCost, Routed, Unaware, whole_blocks
from vswa_plugin.simulation.simulation import Simulation, Totals
from vswa_plugin.simulation.sweep import percentile
from vswa_plugin.simulation.workloads import Arrival, Request

SIZE = 4
NAMING = Naming(SIZE, SIZE)


class Endless:
    """A rank that keeps every prompt and has room for ``room`` requests."""

    event_format = "none"

    def __init__(self, room: int = 1 << 30, longest: int = 1 << 30) -> None:
        self.room = room
        self.longest = longest
        self.kept: list[tuple[int, ...]] = []
        self.log: list[str] = []

    def fits(self, prompt_len: int, output_len: int) -> bool:
        return prompt_len + output_len <= self.longest

    def would_reuse(self, prompt: Sequence[int]) -> int:
        shared = 0
        for kept in self.kept:
            same = next((i for i, (a, b) in enumerate(zip(kept, prompt, strict=False)) if a != b), len(kept))
            shared = max(shared, min(same, len(prompt) - 1))
        return shared

    def open(self, prompt: Sequence[int], output_len: int) -> Served | None:
        if not self.room:
            return None
        self.room -= 1
        return Served(self, tuple(prompt), self.would_reuse(prompt))

    def take_events(self) -> list[RawEvent]:
        return []


class Served:
    def __init__(self, rank: Endless, prompt: tuple[int, ...], cached_tokens: int) -> None:
        self.cached_tokens = cached_tokens
        self._rank = rank
        self._prompt = prompt

    def compute_prompt(self) -> None:
        self._rank.kept.append(self._prompt)
        self._rank.log.append(f"computed {self._prompt[0]}")

    def finish(self, output: Sequence[int]) -> None:
        self._rank.room += 1
        self._rank.log.append(f"ended {self._prompt[0]}")


def prompt(first: int, length: int = 8) -> tuple[int, ...]:
    return (first, *range(1, length))


def arrivals(*given: tuple[float, int]) -> list[Arrival]:
    """At that time, a prompt that begins with that token; 8 tokens, 3 of output."""
    return [Arrival(at, Request(prompt(first), (0, 0, 0))) for at, first in given]


#: A second per token, ten until the last one.
SECONDS = CostModel(fixed_s=0, per_token_s=1, per_pair_s=0, per_output_token_s=5)


def simulated(ranks: Sequence[Any], requests: Sequence[Arrival], policy: Any = None) -> Totals:
    return Simulation(ranks, policy or Unaware(len(ranks), None), SECONDS, NAMING).run(requests)


# -- the simulation ----------------------------------------------------------------------------------


def test_a_rank_computes_one_prompt_after_the_other_and_reuses_what_is_computed() -> None:
    rank = Endless()
    totals = simulated([rank], arrivals((0, 100), (1, 200), (2, 100)))

    # 8 s; then 8 s from 8 on; then 1 token from 16 on.
    assert [8, 15, 15] == totals.ttft_s
    assert ["computed 100", "computed 200", "computed 100"] == [w for w in rank.log if w[0] == "c"]
    assert (24, 7, 17) == (totals.prompt_tokens, totals.cached_tokens, totals.computed_tokens)
    assert ([17.0], 27.0) == (totals.busy_s, totals.end_s)


def test_generation_goes_on_beside_the_next_prompt() -> None:
    rank = Endless()
    simulated([rank], arrivals((0, 100), (0, 200)))

    assert ["computed 100", "computed 200", "ended 100", "ended 200"] == rank.log


def test_without_room_a_prompt_waits_until_a_request_ends_and_nobody_overtakes_it() -> None:
    rank = Endless(room=1)
    totals = simulated([rank], arrivals((0, 100), (0, 200), (0, 300)))

    assert [8, 26, 44] == totals.ttft_s
    assert ["computed 100", "ended 100", "computed 200"] == rank.log[:3]


def test_a_request_larger_than_a_cache_is_counted_and_left_out() -> None:
    requests = [Arrival(0, Request(prompt(9, 30), (0,))), *arrivals((1, 100))]
    totals = simulated([Endless(longest=20)], requests)

    assert (1, 1, 8, 8) == (totals.requests, totals.refused, totals.prompt_tokens, totals.new_tokens)


def test_what_was_computed_somewhere_before_counts_as_recomputed() -> None:
    totals = simulated([Endless(), Endless()], arrivals((0, 100), (50, 100), (100, 100)))

    # New: 8 tokens, and each time the last one; the second rank had never seen the prompt.
    assert (10, 17, 7) == (totals.new_tokens, totals.computed_tokens, totals.recomputed_tokens)


class Parts(Endless):
    """Reuses parts of blocks too: all of its first prompt."""

    def open(self, prompt: Sequence[int], output_len: int) -> Served | None:
        served = super().open(prompt, output_len)
        if served is not None and self.kept:
            served.cached_tokens = 7
        return served


def test_a_part_of_a_block_that_was_reused_was_not_new() -> None:
    requests = [Arrival(0, Request(prompt(1), (0,))), Arrival(20, Request((*range(90, 97), 5), (0,)))]
    totals = simulated([Parts()], requests)

    assert (9, 9, 0) == (totals.computed_tokens, totals.new_tokens, totals.recomputed_tokens)


class Promises(Unaware):
    """Promises what it is told to."""

    def __init__(self, *promised: int) -> None:
        super().__init__(1, None)
        self.promised = list(promised)
        self.told_of: list[tuple[str, int]] = []

    def route(self, key: int, prompt: Prompt, truth: Sequence[int]) -> Routed:
        return Routed(0, self.promised.pop(0), False)

    def first_token(self, key: int) -> None:
        self.told_of.append(("first token", key))

    def ended(self, key: int) -> None:
        self.told_of.append(("ended", key))


def test_a_promise_may_be_true_when_made_and_not_when_its_turn_comes() -> None:
    policy = Promises(5, 0, 7)
    totals = simulated([Endless()], arrivals((0, 100), (1, 100), (30, 100)), policy)

    assert (12, 14, 7) == (totals.promised, totals.cached_tokens, totals.kept)
    assert (2, 1) == (totals.true_promises, totals.kept_promises)
    assert 0 == totals.agreed
    assert [("first token", 0), ("first token", 1), ("ended", 0), ("ended", 1)] == policy.told_of[:4]


# -- policies ----------------------------------------------------------------------------------------


def test_round_robin_takes_turns_and_random_is_the_seeds() -> None:
    told = Prompt(prompt(1), ())
    robin = Unaware(3, None)

    assert [0, 1, 2, 0] == [robin.route(n, told, ()).rank for n in range(4)]
    first, second = (Unaware(5, random.Random(4)) for _ in range(2))
    drawn = [first.route(n, told, ()).rank for n in range(50)]
    assert drawn == [second.route(n, told, ()).rank for n in range(50)]
    assert set(range(5)) == set(drawn)


def test_the_oracle_goes_where_the_most_is_cached_unless_it_is_busy() -> None:
    oracle = ByCost(3, None, NAMING, random.Random(0))
    hashes = (11, 12, 13, 14)

    assert Routed(1, 12, True) == oracle.route(0, Prompt(range(17), hashes), (0, 12, 4))
    # Now 100 blocks are held there.
    assert 1 == oracle.route(1, Prompt(range(400), tuple(range(100, 199))), (0, 396, 0)).rank
    assert 2 == oracle.route(2, Prompt(range(17), (21, 22, 23, 24)), (0, 12, 4)).rank


class Fixed:
    """Believes that a rank holds so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def feed(self, raw: RawEvent) -> None:
        pass

    def predict(self, prompt: Prompt) -> int:
        return self.tokens

    def sent(self, prompt: Prompt) -> None:
        pass


def test_a_policy_that_believes_wrongly_does_not_agree_with_the_oracle() -> None:
    views = [Fixed(0), Fixed(16)]
    wrong = ByCost(2, views, NAMING, random.Random(0))

    assert Routed(1, 16, False) == wrong.route(0, Prompt(range(20), (1, 2, 3, 4, 5)), (12, 0))
    assert Routed(1, 16, True) == wrong.route(1, Prompt(range(20), (1, 2, 3, 4, 5)), (0, 16))


def test_blocks_that_a_request_under_way_holds_cost_nothing_more() -> None:
    oracle = ByCost(2, None, NAMING, random.Random(0))
    shared = tuple(range(100, 110))
    first = oracle.route(0, Prompt(range(40), shared), (4, 0)).rank
    oracle.first_token(0)

    # What is held there already is not held twice: dearer on the other rank, though nearly all is cached.
    assert 0 == first
    assert 0 == oracle.route(1, Prompt(range(44), (*shared, 200)), (40, 36)).rank


def test_load_is_forgotten_when_a_request_ends() -> None:
    oracle = ByCost(2, None, NAMING, random.Random(0))
    first = oracle.route(0, Prompt(range(40), tuple(range(10))), (4, 0)).rank
    oracle.first_token(0)
    oracle.ended(0)

    assert 0 == first
    assert 0 == oracle.route(1, Prompt(range(40), tuple(range(50, 60))), (4, 0)).rank


# -- numbers -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_the_least_value_that_enough_are_not_above(values: list[int], share: float) -> None:
    ordered = sorted(values)
    enough = [v for v in ordered if sum(each <= v for each in ordered) >= share * len(ordered) - 1e-9]

    assert enough[0] == percentile(ordered, share)


def test_prefill_grows_with_what_is_computed_and_with_what_is_before_it() -> None:
    cost = CostModel(fixed_s=1, per_token_s=10, per_pair_s=100, per_output_token_s=2)

    assert 1 + 40 + 1_000 == cost.prefill_s(4, 0)
    assert 1 + 20 + 100 * (1 * 3 + 1 * 4) == cost.prefill_s(4, 2)
    assert 1 == cost.prefill_s(4, 4)
    assert (0, 8) == (cost.decode_s(1), cost.decode_s(5))
    with pytest.raises(ConfigError, match="per_pair_s: expected a finite number"):
        CostModel(per_pair_s=-1).check()


def test_the_default_costs_are_those_that_were_published() -> None:
    """Milliseconds of NVIDIA's benchmarking guide; see costs.py."""
    cost = CostModel()

    assert [47.77, 406.77] == [pytest.approx(1e3 * cost.prefill_s(n, 0), rel=0.002) for n in (500, 5_000)]
    assert pytest.approx((18.91 + 18.58) / 2, rel=0.005) == 1e3 * cost.decode_s(2)


def test_prompts_are_counted_by_the_names_at_the_ends_of_whole_blocks() -> None:
    prompt = Prompt(range(21), tuple(range(10)))

    assert tuple(range(10)) == whole_blocks(prompt, Naming(2, 2))
    assert (3, 7) == whole_blocks(prompt, Naming(8, 2))
