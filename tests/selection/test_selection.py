"""What a candidate costs and which is chosen: Dynamo's formula, fed with exact cached tokens."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswa_plugin.errors import ConfigError, InvalidRequest
from vswa_plugin.selection import (
    Candidate,
    Constraints,
    Load,
    NoCandidate,
    Scored,
    Weights,
    adjusted,
    booked_prefill,
    choose,
    eligible,
    overridden,
    scored,
)
from vswa_plugin.wire.events import Rank

A, B, C = Rank(1), Rank(2), Rank(3, 1)
PREFILL_ROUTER = {"overlap_score_credit": 0, "assume_kv_reuse": False, "track_prefill_tokens": False}


def cost(
    candidate: Candidate,
    prompt_len: int,
    weights: Weights | None = None,
    taints: dict[str, float] | None = None,
) -> float:
    return scored([candidate], prompt_len, 16, weights or Weights(), taints)[0].cost


def cold(prompt_len: int, **changes: Any) -> Candidate:
    return Candidate(A, new_blocks=prompt_len // 16, **changes)


@pytest.mark.parametrize(
    ("prompt_len", "candidate", "expected"),
    [
        # Logged by Dynamo's own router, 1.6.1.
        (337, cold(337), 42.0625),
        (338, cold(338), 42.125),
        (339, cold(339, cached_tokens=320), 22.1875),
        (5, Candidate(A, load=Load(21, 337, 1)), 42.375),
        (320, Candidate(A, load=Load(21, 0, 1), new_blocks=20), 61.0),
    ],
)
def test_costs_are_those_that_dynamo_logs(prompt_len: int, candidate: Candidate, expected: float) -> None:
    assert cost(candidate, prompt_len) == expected


def test_tokens_cached_inside_a_block_are_credited_too() -> None:
    assert cost(cold(64, cached_tokens=63), 64) == 1 / 16 + 4


def test_blocks_in_slower_tiers_are_credited_by_their_own_weights() -> None:
    candidate = cold(160, cached_tokens=128, host_blocks=4, disk_blocks=2)

    assert cost(candidate, 160) == 10 - (2 + 0.75 * 4 + 0.25 * 2) + 10
    assert cost(candidate, 160, Weights(overlap_score_credit=0)) == 10 - (0.75 * 4 + 0.25 * 2) + 10


def test_a_credit_above_what_is_to_compute_makes_nothing_negative() -> None:
    assert cost(cold(160, cached_tokens=159), 160, Weights(overlap_score_credit=5)) == 10


def test_the_prefill_part_can_be_scaled_and_each_active_request_can_cost() -> None:
    candidate = cold(160, load=Load(7, 32, 3))

    assert cost(candidate, 160, Weights(prefill_load_scale=2)) == 2 * 12 + 17
    assert cost(candidate, 160, Weights(decode_active_request_weight=1.5)) == 12 + 17 + 4.5


def test_without_prompt_tokens_the_credit_goes_against_the_blocks_that_are_held() -> None:
    candidate = cold(160, cached_tokens=64, load=Load(7, 32, 3))
    weights = Weights(track_prefill_tokens=False)

    assert cost(candidate, 160, weights) == 17 - 4
    assert cost(candidate, 160, Weights(track_prefill_tokens=False, overlap_score_credit=0)) == 17
    assert booked_prefill(candidate, 160, 16, weights) == 0


def test_a_fading_credit_leaves_the_least_loaded_rank_its_own() -> None:
    weights = Weights(overlap_score_credit_decay=1)
    idle = cold(160, cached_tokens=80, load=Load(0, 160, 1))
    busy = Candidate(B, 80, load=Load(0, 480, 1), new_blocks=10)
    first, second = scored([idle, busy], 160, 16, weights)

    assert first.cost == 20 - 5 + 10
    assert second.cost == pytest.approx(40 - 5 / (1 + 320 / 16 / 10) + 10)


def test_preferred_taints_attract_and_repel() -> None:
    marked = Candidate(A, new_blocks=21, taints=frozenset({"z0"}))

    assert cost(marked, 337, taints={"z0": 1.0}) == pytest.approx(19.63988507732524)
    assert cost(marked, 337, taints={"z0": -1.0}) == pytest.approx(42.0625 * math.exp(math.tanh(1)))
    assert cost(marked, 337, taints={"other": 9.0}) == 42.0625


def test_what_is_booked_is_what_must_be_computed_or_loaded() -> None:
    assert booked_prefill(cold(160, cached_tokens=100), 160, 16, Weights()) == 60
    slow = cold(160, cached_tokens=96, host_blocks=4, disk_blocks=2)
    assert booked_prefill(slow, 160, 16, Weights()) == 160 - (0.75 * 64 + 0.25 * 32)


def test_a_prefix_that_the_rank_computes_for_another_request_counts_as_cached() -> None:
    second = Candidate(A, in_flight_tokens=160, load=Load(11, 176, 1), new_blocks=1)

    assert cost(second, 176) == 2 + 12
    assert cost(second, 176, Weights(in_flight_credit=0.5)) == 12 + 12
    for ignoring in (Weights(in_flight_credit=0), Weights(overlap_score_credit=0)):
        assert cost(second, 176, ignoring) == 22 + 12
    assert booked_prefill(second, 176, 16, Weights()) == 16
    assert booked_prefill(second, 176, 16, Weights(in_flight_credit=0)) == 176


candidates = st.builds(
    Candidate,
    rank=st.builds(Rank, st.integers(0, 5), st.integers(0, 1)),
    cached_tokens=st.integers(0, 400),
    host_blocks=st.integers(0, 3),
    disk_blocks=st.integers(0, 3),
    load=st.builds(Load, st.integers(0, 90), st.integers(0, 900), st.integers(0, 9)),
    new_blocks=st.integers(0, 25),
)
weights_ = st.builds(
    Weights,
    overlap_score_credit=st.floats(0, 2),
    overlap_score_credit_decay=st.floats(0, 2),
    prefill_load_scale=st.floats(0, 3),
    host_cache_hit_weight=st.floats(0, 1),
    disk_cache_hit_weight=st.floats(0, 1),
    decode_active_request_weight=st.floats(0, 2),
    track_prefill_tokens=st.booleans(),
)


@given(st.lists(candidates, min_size=1, max_size=5), st.integers(1, 500), weights_)
def test_costs_equal_the_formula_written_out(
    given_candidates: list[Candidate], prompt_len: int, w: Weights
) -> None:
    least = min(c.load.prefill_tokens for c in given_candidates)
    for each in scored(given_candidates, prompt_len, 16, w):
        c = each.candidate
        excess = (c.load.prefill_tokens - least) / 16 / math.ceil(prompt_len / 16)
        decay = 1 / (1 + w.overlap_score_credit_decay * excess) if w.track_prefill_tokens else 1
        device = max(0.0, c.cached_tokens / 16 - c.host_blocks - c.disk_blocks)
        credit = w.overlap_score_credit * decay * device
        credit += w.host_cache_hit_weight * c.host_blocks + w.disk_cache_hit_weight * c.disk_blocks
        decode = c.load.blocks + c.new_blocks
        if w.track_prefill_tokens:
            raw = (c.load.prefill_tokens + prompt_len) / 16
            expected = w.prefill_load_scale * max(0, raw - credit) + decode
        else:
            expected = max(0, decode - credit) if w.overlap_score_credit > 0 else decode

        assert each.cost == pytest.approx(expected + w.decode_active_request_weight * c.load.requests)


def priced(*costs: float) -> list[Scored]:
    return [Scored(Candidate(Rank(number)), each) for number, each in enumerate(costs)]


def test_the_cheapest_is_chosen_and_equals_at_random() -> None:
    rng = random.Random(7)
    chosen = Counter(choose(priced(3, 1, 2, 1), 0, rng).rank.worker_id for _ in range(2_000))

    assert set(chosen) == {1, 3}
    assert 900 < chosen[1] < 1_100
    assert choose(priced(3, 1, 2), 0, rng).rank == Rank(1)


def test_a_temperature_draws_by_cost_over_the_range_of_costs() -> None:
    rng = random.Random(7)
    chosen = Counter(choose(priced(10, 20, 30), 0.5, rng).rank.worker_id for _ in range(20_000))
    chances = [math.exp(-share / 0.5) for share in (0, 0.5, 1)]

    for worker_id, chance in enumerate(chances):
        assert chosen[worker_id] / 20_000 == pytest.approx(chance / sum(chances), abs=0.015)
    assert set(Counter(choose(priced(5, 5), 1, rng).rank for _ in range(100))) == {Rank(0), Rank(1)}


def test_plugins_can_add_to_costs() -> None:
    assert [each.cost for each in adjusted(priced(1, 2), {Rank(0): 5.0, Rank(9): 1.0})] == [6, 2]


@pytest.mark.parametrize(
    ("constraints", "expected"),
    [
        (Constraints(), [A, B, C]),
        (Constraints(worker_id=2), [B]),
        (Constraints(dp_rank=1), [C]),
        (Constraints(allowed=frozenset({1, 3})), [A, C]),
        (Constraints(required_taints=frozenset({"x"})), [A, C]),
        (Constraints(allowed=frozenset({1, 2}), required_taints=frozenset({"x", "y"})), [A]),
    ],
)
def test_only_ranks_that_fit_are_candidates(constraints: Constraints, expected: list[Rank]) -> None:
    taints = {1: frozenset({"x", "y"}), 3: frozenset({"x"})}

    assert list(eligible([A, B, C], constraints, taints)) == expected


@pytest.mark.parametrize(
    ("constraints", "error", "message"),
    [
        (
            Constraints(worker_id=9),
            InvalidRequest,
            "backend_instance_id: expected a rank .* fits 9, got .*: 1.0",
        ),
        (Constraints(worker_id=1, dp_rank=1), InvalidRequest, "dp_rank: .* got .*: 1.0$"),
        (Constraints(allowed=frozenset()), NoCandidate, "allowed_worker_ids"),
        (Constraints(required_taints=frozenset({"zz"})), NoCandidate, r"required_taints: .* fits zz, got"),
        (
            Constraints(allowed=frozenset(range(50, 10_000))),
            NoCandidate,
            r"fits 50, 51, 52, 53, 54, 55, 56, 57 \.\.\., got .*: 1.0, \S+, \S+$",
        ),
    ],
)
def test_a_request_that_nobody_fits_is_refused_with_the_wish_that_nobody_meets(
    constraints: Constraints, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        eligible([A, B, C], constraints, {})


def test_without_workers_nobody_is_chosen() -> None:
    with pytest.raises(NoCandidate, match="no worker serves this model"):
        eligible([], Constraints(), {})


def test_a_request_can_bring_its_own_knobs() -> None:
    base = Weights(router_temperature=0.3)
    override = {"overlap_score_credit": 0.5, "router_temperature": 1, "assume_kv_reuse": False}

    assert overridden(base, override) == Weights(
        overlap_score_credit=0.5, router_temperature=1, assume_kv_reuse=False
    )
    assert overridden(base, None) is base
    assert overridden(base, {"overlap_score_credit": None}) == base


def test_the_deprecated_weight_means_what_it_means_in_dynamo() -> None:
    assert overridden(Weights(), {"overlap_score_weight": 2}) == Weights(prefill_load_scale=2)
    assert overridden(Weights(), {"overlap_score_weight": 0}) == Weights(
        prefill_load_scale=0, overlap_score_credit=0
    )


def test_what_the_prefill_router_puts_on_every_request_is_not_followed() -> None:
    base = Weights()

    assert overridden(base, PREFILL_ROUTER) == base
    assert overridden(base, {**PREFILL_ROUTER, "router_temperature": 0.5}) == Weights(router_temperature=0.5)
    assert overridden(base, {**PREFILL_ROUTER, "overlap_score_credit": 0.5}) != base
    assert overridden(base, {"overlap_score_credit": 0}) != base


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"router_temperature": -1}, "router_temperature: expected a finite number"),
        ({"overlap_score_credit": "much"}, r"router_config_override: .*overlap_score_credit"),
        ({"router_temprature": 1}, r"unknown knob 'router_temprature': did you mean 'router_temperature'"),
        ({"assume_kv_reuse": 3}, "assume_kv_reuse"),
    ],
)
def test_knobs_that_cannot_be_used_refuse_the_request(override: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        overridden(Weights(), override)


def test_knobs_of_the_router_itself_are_checked() -> None:
    with pytest.raises(
        ConfigError, match=r"host_cache_hit_weight: expected a finite number, 0 or more .*, got nan"
    ):
        Weights(host_cache_hit_weight=math.nan).check()
