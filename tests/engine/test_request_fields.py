"""Fields of a Dynamo request: what is read, and what is said of what cannot be."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.test_decide import A, Setting
from vswa_plugin.engine.requests import (
    Fields,
    dp_rank,
    outside,
    prefill_result,
    reads_cache,
    temperature,
    token_ids,
    unchecked_token_ids,
)
from vswa_plugin.errors import InvalidRequest


def of_tokens(value: Any) -> Fields:
    return Fields({"token_ids": value})


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read()
    return str(caught.value)


def test_values_are_read_with_their_types() -> None:
    stop = Fields({"stop": {"max_tokens": 3, "ids": (1, 2), "word": "x"}}).object("stop")

    assert 3 == stop.integer("max_tokens", None, low=3)
    assert [1, 2] == stop.ids("ids")
    assert "x" == stop.text("word")


@pytest.mark.parametrize("data", [{}, dict.fromkeys(["n", "ids", "word", "in", "dp_rank", "prefill_result"])])
def test_missing_and_null_mean_the_default_which_is_not_checked(data: dict[str, None]) -> None:
    fields = Fields(data)

    assert [-1, None] == [fields.integer("n", -1, low=0), fields.integer("n", None, low=0)]
    assert [] == fields.ids("ids")
    assert fields.text("word") is None
    assert {} == fields.object("in").data
    assert dp_rank(fields, 1, "") is None
    assert {} == prefill_result(fields, "agg").data


def test_an_empty_text_is_none() -> None:
    assert Fields({"lora_name": ""}).text("lora_name") is None


WRONG: list[tuple[Any, Callable[[Fields], object], str]] = [
    (0, lambda f: f.integer("v", 1, low=1), "in.v: expected an integer of at least 1, got 0"),
    ("3", lambda f: f.integer("v", None, low=1), "in.v: expected an integer of at least 1, got '3'"),
    (True, lambda f: f.integer("v", None, low=0), "in.v: expected an integer of at least 0, got True"),
    (5, lambda f: f.text("v"), "in.v: expected a string, got int"),
    ([], lambda f: f.object("v"), "in.v: expected an object, got list"),
    ("12", lambda f: f.ids("v"), "in.v: expected a list of token ids, got str"),
    ([1, "2"], lambda f: f.ids("v"), "in.v: expected a list of token ids, got something else among them"),
    ([1, True], lambda f: f.ids("v"), "in.v: expected a list of token ids, got something else among them"),
]


@pytest.mark.parametrize(("value", "read", "message"), WRONG)
def test_a_value_that_cannot_be_used_is_named_with_what_was_expected_and_what_came(
    value: Any, read: Callable[[Fields], object], message: str
) -> None:
    fields = Fields({"in": {"v": value}}).object("in")

    assert message == refusal(lambda: read(fields))


def test_a_request_that_is_no_object_is_refused() -> None:
    assert "request: expected an object, got list" == refusal(lambda: Fields([]))


@pytest.mark.parametrize("pack", [bytes, bytearray])
def test_packed_token_ids_are_unsigned_and_little_endian(pack: Callable[[bytes], object]) -> None:
    tokens = [0, 1, 262_143, (1 << 32) - 1]
    packed = of_tokens(pack(struct.pack("<4I", *tokens)))

    assert tokens == list(unchecked_token_ids(packed)) == token_ids(packed, 5)


@pytest.mark.parametrize("given_", [[5, 6], (5, 6), array("i", [5, 6])])
def test_a_sequence_of_integers_is_a_prompt(given_: Any) -> None:
    assert [5, 6] == token_ids(of_tokens(given_), 3)


def test_the_prompt_is_the_requests_own_no_more() -> None:
    sent = [1, 2]
    token_ids(of_tokens(sent), 9).append(3)

    assert [1, 2] == sent


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "token_ids: expected at least one token id, got none"),
        ([], "token_ids: expected at least one token id, got none"),
        (b"", "token_ids: expected at least one token id, got none"),
        (b"abc", "token_ids: expected 4 bytes per token, got 3 bytes"),
        ("abc", "token_ids: expected a list of integers, got str"),
        (7, "token_ids: expected a list of integers, got int"),
        ({1: 2}, "token_ids: expected a list of integers, got dict"),
        ([[1], [2]], "token_ids: expected a list of integers, got something else"),
        ([1, 2.0], "token_ids: expected a list of integers, got something else"),
        ([1, True], "token_ids: expected a list of integers, got something else"),
        (
            [1] * 8,
            "prompt of 8 tokens: expected at most 7, so that one token of the answer fits the context of 8 "
            "tokens; shorten the prompt",
        ),
    ],
)
def test_what_is_no_prompt_that_fits_is_refused(value: Any, message: str) -> None:
    assert message == refusal(lambda: token_ids(of_tokens(value), 8))


def test_no_token_id_stands_in_a_refusal() -> None:
    assert "4711" not in refusal(lambda: token_ids(of_tokens([4711, "4711"]), 8))


def test_a_prompt_that_is_not_checked_may_hold_anything_and_be_missing() -> None:
    assert 1 == len(unchecked_token_ids(of_tokens(["a"])))
    assert 0 == len(unchecked_token_ids(of_tokens(None)))
    assert "token_ids: expected 4 bytes per token" in refusal(lambda: unchecked_token_ids(of_tokens(b"abc")))


@given(tokens=st.lists(st.integers(-2, 12), min_size=1, max_size=6), size=st.integers(1, 10))
def test_ids_outside_the_vocabulary_are_told_by_their_range(tokens: list[int], size: int) -> None:
    all_known = all(token in range(size) for token in tokens)

    assert ("" if all_known else f"{min(tokens)} to {max(tokens)}") == outside(tokens, size)


def test_where_the_vocabulary_is_not_known_ids_have_32_bits() -> None:
    assert ["", "0 to 4294967296", "-1 to 3"] == [
        outside(tokens, None) for tokens in ([0, (1 << 32) - 1], [0, 1 << 32], [-1, 3])
    ]


def test_each_rank_can_be_asked_for() -> None:
    assert [0, 1] == [dp_rank(Fields({"dp_rank": rank}), 2, "") for rank in (0, 1)]


@pytest.mark.parametrize("rank", [-1, 2, True, "1", 1.0])
def test_what_is_no_rank_of_this_worker_is_refused_with_the_reason(rank: Any) -> None:
    routing = Fields({"routing": {"dp_rank": rank}}).object("routing")

    assert f"nvext.dp_rank: expected a rank in [0, 1], got {rank!r}; it has 2" == refusal(
        lambda: dp_rank(routing, 2, "it has 2")
    )


def test_only_a_decode_worker_goes_on_from_a_prefill_worker() -> None:
    request = Fields({"prefill_result": {"disaggregated_params": {"a": 1}}})

    assert {"a": 1} == prefill_result(request, "decode").object("disaggregated_params").data
    for mode in ("agg", "prefill"):
        assert f"prefill_result: expected none in mode {mode}; only a worker with --mode decode" in refusal(
            lambda mode=mode: prefill_result(request, mode)  # type: ignore[misc]
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"routing": [1]}, "routing: expected an object, got list"),
        ({"routing": {"cache_salt": 5}}, "cache_salt: expected a string, got int"),
        ({"routing": {"lora_name": 5}}, "routing.lora_name: expected a string, got int"),
        ({"tokens": b"abc"}, "token_ids: expected 4 bytes per token, got 3 bytes"),
        ({"tokens": 7}, "token_ids: expected a list of integers, got int"),
    ],
)
def test_the_router_refuses_in_the_same_words(changed: dict[str, Any], message: str) -> None:
    assert message == refusal(lambda: Setting().decide(**changed))


@pytest.mark.parametrize(
    ("request_", "reads"),
    [
        ({}, True),
        ({"output_options": {"prompt_logprobs": None, "logprobs": 3}, "extra_args": None}, True),
        ({"output_options": {"prompt_logprobs": 0}}, False),
        ({"output_options": {"prompt_logprobs": 1}}, False),
        ({"extra_args": {"sampling_options": {"skip_reading_prefix_cache": True}}}, False),
        ({"extra_args": {"skip_reading_prefix_cache": True}}, False),
        ({"sampling_options": {"skip_reading_prefix_cache": True}}, False),
        ({"sampling_options": {"skip_reading_prefix_cache": False}}, True),
    ],
)
def test_a_request_that_switches_the_cache_off_is_promised_nothing(
    request_: dict[str, Any], reads: bool
) -> None:
    setting = Setting()
    setting.holds(A, sliding=range(8), whole=range(8))

    assert reads == reads_cache(Fields(request_))
    assert reads == (setting.decide(request=request_).cached_tokens > 0)


def test_a_temperature_is_meant_where_another_option_of_sampling_is_given() -> None:
    assert [1.0] * 4 == [temperature({name: 1}) for name in ("top_p", "top_k", "min_p", "seed")]
    assert [None, 0, 0.5] == [
        temperature(options)
        for options in ({"top_p": None}, {"temperature": 0, "seed": 1}, {"temperature": 0.5})
    ]
