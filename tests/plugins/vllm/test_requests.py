"""Dynamo's requests as vLLM runs them."""

from __future__ import annotations

from typing import Any

import pytest
from vswa_plugins.vllm.grouping import Layer, cache_groups
from vswa_plugins.vllm.request import Limits, VllmRequest, parse_request

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import Fields, reads_cache
from vswa_plugin.errors import InvalidRequest

LAYOUT = CacheLayout(cache_groups([Layer(None)], 4), "vllm", "gemma")
LIMITS = Limits(context_length=100, vocab_size=1000, ranks=2, layout=LAYOUT)
PROMPT = [1, 2, 3]


def parsed(limits: Limits = LIMITS, **fields: Any) -> VllmRequest:
    return parse_request({"token_ids": PROMPT, **fields}, limits)


def sampling(**fields: Any) -> dict[str, Any]:
    return parsed(**fields).sampling


def refusal(**fields: Any) -> str:
    with pytest.raises(InvalidRequest) as refused:
        parsed(**fields)
    return str(refused.value)


def test_a_plain_request_is_greedy_and_as_long_as_fits() -> None:
    made = parsed()

    assert PROMPT == made.prompt
    assert {"detokenize": False, "temperature": 0.0, "max_tokens": 97} == made.sampling
    assert (None, None, None, None, 0) == (
        made.guided,
        made.cache_salt,
        made.lora_name,
        made.dp_rank,
        made.priority,
    )


def test_sampling_options_have_vllms_names() -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "presence_penalty": 0.5,
             "frequency_penalty": 0.4, "repetition_penalty": 1.1}  # fmt: skip

    assert given.items() <= sampling(sampling_options=given).items()


def test_another_option_of_sampling_says_that_sampling_is_meant() -> None:
    assert 1.0 == sampling(sampling_options={"top_p": 0.9})["temperature"]


def test_the_answer_fits_the_context() -> None:
    assert 97 == sampling(stop_conditions={"max_tokens": 1_000})["max_tokens"]
    assert (5, 5) == tuple(
        sampling(stop_conditions={"max_tokens": 5, "min_tokens": 9})[name]
        for name in ("max_tokens", "min_tokens")
    )


def test_all_kinds_of_stop_tokens_end_the_answer() -> None:
    stop = {"stop_token_ids": [5], "stop_token_ids_visible": [6], "stop_token_ids_hidden": [7]}

    assert [4, 5, 6, 7] == sampling(stop_conditions=stop, eos_token_ids=[4])["stop_token_ids"]


def test_where_the_end_of_the_sequence_is_ignored_other_stop_tokens_still_end_the_answer() -> None:
    stop = {"stop_token_ids": [5], "stop_token_ids_hidden": [4], "ignore_eos": True}
    made = sampling(stop_conditions=stop, eos_token_ids=[4])

    assert ([5], True) == (made["stop_token_ids"], made["ignore_eos"])


@pytest.mark.parametrize("count", [0, 3])
def test_log_probabilities_are_as_many_as_wanted(count: int) -> None:
    assert count == sampling(output_options={"logprobs": count})["logprobs"]


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_args": {"skip_reading_prefix_cache": True}},
        {"extra_args": {"sampling_options": {"skip_reading_prefix_cache": True}}},
        {"sampling_options": {"skip_reading_prefix_cache": True}},
    ],
    ids=str,
)
def test_a_request_that_reads_no_cache_is_one_for_router_and_engine_alike(fields: dict[str, Any]) -> None:
    """The router promises nothing by the same function, so what it promised and what vLLM does agree."""
    assert not reads_cache(Fields({"token_ids": PROMPT, **fields}))
    assert sampling(**fields)["skip_reading_prefix_cache"] is True


def test_any_other_request_reads_the_cache() -> None:
    for fields in ({}, {"extra_args": {"skip_reading_prefix_cache": False}}):
        assert reads_cache(Fields({"token_ids": PROMPT, **fields}))
        assert "skip_reading_prefix_cache" not in sampling(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_args": {"kv_cache_report_mode": "full"}},
        {"extra_args": {"sampling_options": {"extra_args": {"kv_cache_report_mode": "full"}}}},
        {"extra_args": {"sampling_options": {"kv_cache_report_mode": "full"}}},
        {"sampling_options": {"extra_args": {"kv_cache_report_mode": "full"}}},
    ],
    ids=str,
)
def test_nothing_makes_the_engine_announce_blocks_that_it_does_not_hold(fields: dict[str, Any]) -> None:
    assert "expected" in refusal(**fields)


def test_salt_adapter_and_rank_are_those_of_the_routing() -> None:
    made = parsed(routing={"cache_salt": "s", "lora_name": "l", "dp_rank": 1})

    assert ("s", "l", 1) == (made.cache_salt, made.lora_name, made.dp_rank)
    assert "s" == parsed(extra_args={"nvext": {"cache_salt": "s"}}).cache_salt


def test_priorities_are_higher_first_for_dynamo_and_lower_first_for_vllm() -> None:
    ordered = Limits(100, 1000, 1, LAYOUT, priorities=True)

    assert -3 == parsed(ordered, routing={"priority": 3}).priority
    assert 0 == parsed(routing={"priority": 3}).priority, "where vLLM orders by arrival"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"json": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"regex": "a|b"}, {"regex": "a|b"}),
        ({"choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"grammar": "root ::= x"}, {"grammar": "root ::= x"}),
        ({"structural_tag": {"type": "x"}}, {"structural_tag": '{"type": "x"}'}),
        ({"json": "{}", "whitespace_pattern": " "}, {"json": "{}", "whitespace_pattern": " "}),
        ({"json": None, "json_object": False}, None),
    ],
)
def test_an_answer_may_be_guided_in_one_way(given: dict[str, Any], expected: object) -> None:
    assert expected == parsed(sampling_options={"guided_decoding": given}).guided


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": [1, 2, 1000]}, "token_ids: expected ids in [0, 1000), got 1 to 1000"),
        ({"token_ids": list(range(100))}, "prompt of 100 tokens: expected at most 99"),
        (
            {"multi_modal_data": {"image_url": [{"Url": "x"}]}},
            "messages (multi_modal_data): expected no images",
        ),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds: expected no prompt embeddings"),
        ({"output_options": {"prompt_logprobs": 1}}, "prompt_logprobs (or echo): expected none"),
        ({"sampling_options": {"n": 2}}, "n: expected 1"),
        ({"sampling_options": {"temperature": "hot"}}, "temperature: expected a number"),
        ({"sampling_options": {"top_p": True}}, "top_p: expected a number"),
        (
            {"sampling_options": {"guided_decoding": {"regex": "a", "grammar": "b"}}},
            "expected one way to guide",
        ),
        ({"routing": {"dp_rank": 2}}, "nvext.dp_rank: expected a rank in [0, 1]"),
        ({"prefill_result": {"disaggregated_params": {"a": 1}}}, "expected none"),
        ({"stop_conditions": {"max_tokens": 0}}, "max_tokens: expected an integer of at least 1"),
        ({"output_options": {"logprobs": -1}}, "logprobs: expected an integer of at least 0"),
    ],
)
def test_what_can_never_be_served_is_refused_by_the_clients_name(
    fields: dict[str, Any], message: str
) -> None:
    assert message in refusal(**fields)
