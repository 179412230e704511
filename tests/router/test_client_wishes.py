"""Whatever a client says about routing: a choice with a finite cost, or a refusal that is its own fault."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Naming
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.errors import ConfigError, InvalidRequest, RequestError
from vswa_plugin.index import WindowIndex
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.disagg import prefill_request
from vswa_plugin.router.pools import Pool
from vswa_plugin.router.wishes import RoutingConstraints
from vswa_plugin.selection import MAX_WEIGHT, Candidate, LoadBook, Override, Scored, Weights, choose
from vswa_plugin.wire.events import Rank, Stored

BLOCK = 32
RANKS = (Rank(7), Rank(7, 1), Rank(8))
TAINTS = {7: frozenset({"gold", "old"}), 8: frozenset({"gold"})}
CACHED = [2] * 3 * BLOCK
OWN_ID = 99


def decider(weights: Weights, seed: int) -> tuple[Decider, LoadBook]:
    """Three ranks, of which one holds the first three blocks of the prompt."""
    index = WindowIndex()
    for rank in RANKS:
        index.join(rank, CacheLayout((CacheGroup(0, None, BLOCK),), "trtllm_v2", "m"))
    hashes = tuple(namespaced_sequence_hashes(CACHED, BLOCK))
    index.apply(RANKS[0], Stored(0, 0, None, hashes))
    return Decider(index, weights, namespaced_sequence_hashes, rng=random.Random(seed)), LoadBook(BLOCK)


EXTREME = st.one_of(
    st.sampled_from(
        [0, 1, -1, 5e-324, 1e-320, 1e-5, 1e9, 1.0000001e9, 1e308, 1.7e308, 2**63, 2**64, 10**400]
    ),
    st.floats(),
    st.integers(),
)
ODD = st.one_of(
    st.none(), st.booleans(), EXTREME, st.text(), st.lists(EXTREME, max_size=2), st.just({"a": 1})
)
#: Names that exist, each with what fits it and with what does not.
OVERRIDES = st.dictionaries(
    st.sampled_from([*Override.__struct_fields__, "router_temprature"]), st.one_of(EXTREME, ODD), max_size=5
)
SOUND_OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        name: st.floats(0, MAX_WEIGHT)
        for name in (
            "overlap_score_credit",
            "prefill_load_scale",
            "overlap_score_weight",
            "router_temperature",
        )
    }
    | {"assume_kv_reuse": st.booleans(), "track_prefill_tokens": st.booleans()},
)
#: Numbers that JSON can carry, of which most are out of range.
LARGE_OVERRIDES = st.dictionaries(
    st.sampled_from(
        ["overlap_score_credit", "prefill_load_scale", "overlap_score_weight", "router_temperature"]
    ),
    st.sampled_from([0.0, 5e-324, 1e-320, 1.0, 1e9, 1e154, 1e300, 1e308, 1.7e308]),
    min_size=1,
)
WORKERS = st.one_of(st.sampled_from([7, 8, OWN_ID]), ODD)
LABELS = st.one_of(st.sampled_from(["gold", "old"]), st.text(max_size=3))
CONSTRAINTS = st.fixed_dictionaries(
    {},
    optional={
        "required_taints": st.one_of(st.lists(LABELS, max_size=2), ODD),
        "preferred_taints": st.one_of(st.dictionaries(LABELS, EXTREME, max_size=4), ODD),
        "avoided_taints": ODD,
    },
)
ROUTING = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("backend_instance_id", "prefill_worker_id", "decode_worker_id"), WORKERS),
        **dict.fromkeys(("dp_rank", "prefill_dp_rank"), st.one_of(st.integers(-1, 2), ODD)),
        "allowed_worker_ids": st.one_of(st.lists(WORKERS, max_size=3), ODD),
        "routing_constraints": st.one_of(CONSTRAINTS, ODD),
        **dict.fromkeys(("cache_salt", "lora_name"), st.one_of(st.text(), st.just("\ud800"), ODD)),
        **dict.fromkeys(
            ("priority", "priority_jump", "strict_priority", "expected_output_tokens", "unknown"), ODD
        ),
    },
)
TOKENS = st.one_of(
    st.integers(0, 300).map(lambda more: [*CACHED, *[5] * more]), st.lists(ODD, max_size=3), ODD
)
REQUESTS = st.fixed_dictionaries(
    {"token_ids": TOKENS},
    optional={
        "routing": st.one_of(ROUTING, ODD),
        "router_config_override": st.one_of(SOUND_OVERRIDES, OVERRIDES, ODD),
        "mm_routing_info": ODD,
        "multi_modal_data": ODD,
        "output_options": ODD,
        "extra_args": ODD,
    },
)
CONFIGURED = st.builds(
    Weights,
    **{
        name: st.one_of(st.just(getattr(Weights(), name)), st.floats(0, MAX_WEIGHT))
        for name in (
            "overlap_score_credit",
            "overlap_score_credit_decay",
            "prefill_load_scale",
            "in_flight_credit",
        )
    },
    transfer_credit=st.sampled_from([0.0, 1.0, MAX_WEIGHT]),
    router_temperature=st.sampled_from([0.0, 5e-324, 1e-3, 1.0, MAX_WEIGHT]),
)


@given(
    st.lists(REQUESTS, min_size=1, max_size=4),
    CONFIGURED,
    st.sampled_from(["agg", "prefill", "decode"]),
    st.integers(0, 99),
)
@examples(400)
def test_it_is_obeyed_at_a_finite_cost_or_refused_and_booked_nowhere(
    requests: list[dict[str, Any]], weights: Weights, phase: str, seed: int
) -> None:
    by, book = decider(weights.check(), seed)
    pool = Pool("m", Naming(BLOCK, BLOCK), book, RANKS, TAINTS, phase)
    decided = 0
    for request in requests:
        try:
            decision = by.decide(pool, request, own_id=OWN_ID)
        except RequestError as error:
            assert str(error)
        else:
            decided += 1
            assert math.isfinite(decision.cost)
            assert decision.rank in RANKS

    loads = [book.load(rank) for rank in RANKS]
    assert decided == sum(load.requests for load in loads)
    assert all(load.prefill_tokens >= 0 for load in loads)


@given(st.one_of(SOUND_OVERRIDES, LARGE_OVERRIDES), CONFIGURED, st.integers(0, 99))
@examples(200)
def test_an_override_is_obeyed_in_its_range_and_refused_by_name_outside_whatever_is_configured(
    override: dict[str, Any], weights: Weights, seed: int
) -> None:
    by, book = decider(weights.check(), seed)
    too_large = any(not isinstance(value, bool) and value > MAX_WEIGHT for value in override.values())
    for _ in range(3):
        request = {"token_ids": [*CACHED, *[5] * 99], "router_config_override": override}
        try:
            cost = by.decide(Pool("m", Naming(BLOCK, BLOCK), book, RANKS, TAINTS), request).cost
        except InvalidRequest as error:
            assert too_large, error
            assert str(error).startswith("router_config_override.")
        else:
            assert not too_large
            assert math.isfinite(cost)


@pytest.mark.parametrize("value", [1.0000001e9, 1e308, -1.0, math.inf, math.nan])
def test_a_knob_out_of_its_range_is_refused_by_name_in_requests_and_in_the_configuration(
    value: float,
) -> None:
    for name in ("overlap_score_credit", "prefill_load_scale", "overlap_score_weight", "router_temperature"):
        by, book = decider(Weights(), 0)
        request = {"token_ids": CACHED, "router_config_override": {name: value}}
        with pytest.raises(
            InvalidRequest, match=rf"router_config_override\.{name}: expected .* at most 1e\+09"
        ):
            by.decide(Pool("m", Naming(BLOCK, BLOCK), book, RANKS), request)
    with pytest.raises(ConfigError, match=r"router_temperature: expected a finite number"):
        Weights(router_temperature=value).check()


@pytest.mark.parametrize(
    ("wishes", "named"),
    [
        (
            {"router_config_override": {"router_temprature": 1.0}},
            "router_config_override: unknown knob 'router_temprature'",
        ),
        (
            {"routing": {"routing_constraints": {"prefered_taints": {"gold": 1.0}}}},
            "routing: .*`prefered_taints`",
        ),
        (
            {"routing": {"routing_constraints": {"preferred_taints": {"gold": math.inf}}}},
            "preferred_taints.*'gold'",
        ),
        ({"routing": {"cache_salt": "\ud800"}}, "cache_salt or lora_name: expected text"),
        ({"routing": {"cache_salt": 5}}, "cache_salt: expected a string, got int"),
    ],
)
def test_a_wish_that_cannot_be_read_is_refused_by_its_name(wishes: dict[str, Any], named: str) -> None:
    by, book = decider(Weights(), 0)

    with pytest.raises(InvalidRequest, match=named):
        by.decide(Pool("m", Naming(BLOCK, BLOCK), book, RANKS), {"token_ids": CACHED, **wishes})


def test_every_wish_of_dynamos_constraints_is_known() -> None:
    assert ("required_taints", "preferred_taints") == RoutingConstraints.__struct_fields__


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5),
    st.floats(0, allow_nan=False),
    st.integers(0, 99),
)
@examples(300)
def test_any_finite_costs_and_any_temperature_give_a_choice(
    costs: list[float], temperature: float, seed: int
) -> None:
    """Plugins may add what they like to the costs."""
    candidates = [Scored(Candidate(Rank(number)), cost) for number, cost in enumerate(costs)]

    assert choose(candidates, temperature, random.Random(seed)) in candidates


@pytest.mark.parametrize("part", ["stop_conditions", "routing"])
def test_a_part_that_is_no_object_is_refused_where_the_request_is_split_in_two_phases(part: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{part}: expected an object, got str"):
        prefill_request({"token_ids": CACHED, part: "x"}, RANKS[0])
