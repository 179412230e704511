"""Sampling: pure functions from logits to a token."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.model.sampling import (
    SamplingParams,
    candidates,
    make_rng,
    parse_sampling,
    penalize,
    sample,
)

from tests.properties import examples
from vswa_plugin.errors import InvalidRequest

VOCAB = 40

# Few distinct values, so that ties are common.
logits_strategy = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.floats(-20, 20, width=32)), min_size=VOCAB, max_size=VOCAB
).map(lambda values: np.array(values, dtype=np.float32))


def spread(size: int = VOCAB, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 3


def kept_by_brute_force(logits: np.ndarray[Any, Any], params: SamplingParams) -> list[int]:
    """Candidates, one rule after the other, over Python lists."""
    weights = [math.exp((float(v) - float(max(logits))) / params.temperature) for v in logits]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        total, reached, kept = sum(weights[i] for i in order), 0.0, []
        for i in order:
            kept.append(i)
            reached += weights[i]
            if reached >= params.top_p * total * (1 - 1e-12):
                break
        order = kept
    return [i for i in order if weights[i] >= params.min_p * max(weights)]


@given(
    logits_strategy,
    st.floats(0.1, 3),
    st.integers(0, VOCAB + 5),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_candidates_are_those_of_the_rules_applied_one_after_the_other(
    logits: np.ndarray[Any, Any], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature, top_p, top_k, min_p)

    ids, weights = candidates(logits, params)

    expected = kept_by_brute_force(logits, params)
    # A sum that meets top_p to the last bit may be rounded either way.
    assert abs(len(expected) - len(ids)) <= 1
    assert set(ids.tolist()) <= set(expected) or set(expected) <= set(ids.tolist())
    assert (weights > 0).all() or temperature < 0.2


def test_the_nucleus_is_found_when_it_is_wider_than_the_head_that_is_sorted_first() -> None:
    flat = np.zeros(5000, dtype=np.float32)

    ids, _ = candidates(flat, SamplingParams(temperature=1.0, top_p=0.5))

    assert 2500 == len(ids)


def test_min_p_keeps_the_tokens_that_meet_it() -> None:
    ids, _ = candidates(np.array([5, 1, 5, 0], dtype=np.float32), SamplingParams(1.0, min_p=1.0))

    assert [0, 2] == ids.tolist()


def test_top_k_takes_the_lower_token_ids_where_logits_are_equal() -> None:
    ids, _ = candidates(np.array([1, 5, 5, 5, 0], dtype=np.float32), SamplingParams(1.0, top_k=2))

    assert [1, 2] == ids.tolist()


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(0.9, top_k=1), SamplingParams(0.9, top_p=0)]
)
def test_greedy_is_the_likeliest_token(params: SamplingParams) -> None:
    logits = spread()

    assert int(logits.argmax()) == sample(logits, params, make_rng(0)).token


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    rng = make_rng(7)

    drawn = Counter(sample(logits, SamplingParams(1.0), rng).token for _ in range(4000))

    assert [0.5, 0.3, 0.2] == pytest.approx([drawn[i] / 4000 for i in range(3)], abs=0.03)


def test_a_low_temperature_sharpens_and_a_tiny_one_is_greedy() -> None:
    logits = spread()

    drawn = {sample(logits, SamplingParams(1e-300), make_rng(seed)).token for seed in range(20)}

    assert {int(logits.argmax())} == drawn


@pytest.mark.parametrize("seed", [0, 1, -5, 2**63])
def test_the_same_seed_draws_the_same_tokens(seed: int) -> None:
    logits = spread(200)
    params = SamplingParams(1.5)
    one, two = make_rng(seed), make_rng(seed)

    first = [sample(logits, params, one).token for _ in range(30)]

    assert first == [sample(logits, params, two).token for _ in range(30)]
    assert len(set(first)) > 3


def test_banned_tokens_are_never_drawn() -> None:
    logits = np.array([9, 8, 0, 0], dtype=np.float32)

    assert 2 == sample(logits, SamplingParams(), make_rng(0), banned={0, 1}).token
    drawn = {sample(logits, SamplingParams(2.0), make_rng(i), banned={0, 1}).token for i in range(50)}
    assert {2, 3} == drawn
    assert 9.0 == logits[0]


def test_penalties_touch_the_tokens_that_were_seen() -> None:
    logits = np.array([2, -2, 4, 1], dtype=np.float32)
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)

    adjusted = penalize(logits, params, prompt=[0, 1], output=[2, 2])

    # Prompt tokens are only repeated; generated ones also present, and twice.
    assert [1.0, -4.0, 2.0 - 0.5 - 0.5, 1.0] == adjusted.tolist()
    assert [2, -2, 4, 1] == logits.tolist()


def test_log_probabilities_are_the_models_own() -> None:
    logits = np.log(np.array([0.5, 0.2, 0.2, 0.1], dtype=np.float32))
    params = SamplingParams(frequency_penalty=2.0, logprobs=3)

    sampled = sample(logits, params, make_rng(0), output=[0, 0])

    assert 1 == sampled.token
    assert math.log(0.2) == pytest.approx(sampled.logprob)
    assert [0, 1, 2] == [token for token, _ in sampled.top]
    assert [math.log(0.5), math.log(0.2), math.log(0.2)] == pytest.approx([p for _, p in sampled.top])
    assert () == sample(logits, SamplingParams(logprobs=0), make_rng(0)).top


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        sample(np.array([0, np.nan], dtype=np.float32), SamplingParams(), make_rng(0))


def test_none_means_default_and_zero_logprobs_is_asked_for() -> None:
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "n", "repetition_penalty")

    assert SamplingParams() == parse_sampling(dict.fromkeys(names), {"logprobs": None})
    assert 0 == parse_sampling({}, {"logprobs": 0}).logprobs


def test_values_are_read() -> None:
    given_values = {"temperature": 1, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "seed": -3}

    assert SamplingParams(1.0, 0.9, 0, 0.1, seed=-3) == parse_sampling(given_values, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: expected a number of at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature: expected a number"),
        ({"temperature": True}, "got True"),
        ({"top_p": 1.5}, r"top_p: expected a number in \[0, 1\], got 1.5"),
        ({"top_k": 1.5}, "top_k: expected an integer of at least -1, got 1.5"),
        ({"min_p": "x"}, r"min_p: expected a number in \[0, 1\], got 'x'"),
        ({"presence_penalty": 3}, r"presence_penalty: expected a number in \[-2, 2\]"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0, got 0"),
        ({"seed": "a"}, "seed: expected an integer, got 'a'"),
    ],
)
def test_a_value_out_of_range_names_the_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_sampling(options, {})


def test_too_many_logprobs_name_the_range() -> None:
    with pytest.raises(InvalidRequest, match=r"logprobs: expected an integer in \[0, 20\], got 21"):
        parse_sampling({}, {"logprobs": 21})


EXTREME = st.sampled_from([5e-324, 1e-300, 1e-5, 0.5, 1.0, 2.0, 1e5, 1e300, 1.7e308])


@given(
    st.fixed_dictionaries(
        {"temperature": st.one_of(st.none(), st.just(0), EXTREME)},
        optional={
            "repetition_penalty": EXTREME,
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "top_p": st.sampled_from([0, 5e-324, 0.5, 1]),
            "top_k": st.sampled_from([-1, 0, 1, 2, 2**70]),
            "min_p": st.sampled_from([0, 5e-324, 1]),
            "seed": st.sampled_from([0, -1, 2**70]),
        },
    )
)
@examples(300)
def test_whatever_a_client_may_ask_for_a_token_is_drawn_and_its_log_probability_is_finite(
    options: dict[str, Any],
) -> None:
    logits = np.array([-30.0, 0.0, 2.0, 30.0], dtype=np.float32)
    params = parse_sampling(options, {"logprobs": 2})

    with np.errstate(all="raise", under="ignore"):
        drawn = sample(logits, params, make_rng(params.seed), [0, 1], [2, 2, 3])

    assert drawn.token in range(4)
    assert drawn.logprob is not None and math.isfinite(drawn.logprob)
