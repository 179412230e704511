"""What TensorRT-LLM is asked for a request, and what is refused before it sees it; over a stand-in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm.fields import FIELDS, GUIDED, NOT_SET, SAMPLING
from vswa_plugins.tensorrt_llm.request import Limits, parse_request

from tests.tensorrt_llm_helpers import Started, asked, tokens_of
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin
from tests.tensorrt_llm_package import SamplingParams as TheirSampling
from vswa_plugin.errors import InvalidRequest


@pytest.fixture
def started(standin: None, model: Path) -> Iterator[Started]:
    made = Started(model)
    yield made
    made.engine.stop()


def test_sampling_options_are_passed_on_by_their_names(started: Started) -> None:
    options = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "seed": 7,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "n": 1,
        "guided_decoding": {"choice": ["a+", "b"], "backend": None},
    }
    request = asked([1, 2, 3], 4, sampling_options=options, eos_token_ids=[1])
    request["stop_conditions"]["min_tokens"] = 2
    started.ask(request | {"priority": 0.9, "routing": {"cache_salt": "s"}})
    given = started.llm.requests[0].arguments

    expected = TheirSampling(
        temperature=0.7,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        seed=7,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        max_tokens=4,
        min_tokens=2,
        stop_token_ids=[1],
        detokenize=False,
        guided_decoding=given["sampling_params"].guided_decoding,
    )
    assert expected == given["sampling_params"]
    assert r"(a\+|b)" == expected.guided_decoding.regex
    assert (0.9, "s") == (given["priority"], given["cache_salt"])


@pytest.mark.parametrize("option", ["top_p", "top_k", "min_p", "seed"])
def test_an_option_of_sampling_without_a_temperature_means_one_of_one(started: Started, option: str) -> None:
    """The engine alone would be greedy with a seed or min_p."""
    for options in ({option: 1}, {option: 1, "temperature": 0.0}, {}):
        started.ask(asked([1, 2, 3], 2, sampling_options=options))

    assert [1.0, 0.0, None] == [
        each.arguments["sampling_params"].temperature for each in started.llm.requests
    ]


def test_a_structural_tag_is_passed_on_as_text(started: Started) -> None:
    tag = {"type": "structural_tag", "format": {"type": "any_text"}}
    for given in (tag, json.dumps(tag)):
        options = {"guided_decoding": {"structural_tag": given, "regex": None}}
        started.ask(asked([1, 2, 3], 2, sampling_options=options))

    guides = [each.arguments["sampling_params"].guided_decoding for each in started.llm.requests]
    assert [tag, tag] == [json.loads(guide.structural_tag) for guide in guides]


#: Parameters of ``SamplingParams``, of TensorRT-LLM's sources (tensorrt_llm/sampling_params.py).
THEIRS = """
end_id pad_id max_tokens bad bad_token_ids stop stop_token_ids include_stop_str_in_output embedding_bias
logits_processor apply_batched_logits_processor n best_of use_beam_search top_k top_p top_p_min
top_p_reset_ids top_p_decay seed temperature min_tokens beam_search_diversity_rate repetition_penalty
presence_penalty frequency_penalty length_penalty early_stopping no_repeat_ngram_size min_p beam_width_array
logprobs prompt_logprobs return_context_logits return_generation_logits exclude_input_from_output
return_encoder_output return_perf_metrics additional_model_outputs lookahead_config guided_decoding ignore_eos
detokenize add_special_tokens truncate_prompt_tokens skip_special_tokens spaces_between_special_tokens
"""


def test_each_sampling_parameter_is_set_by_a_request_or_named_with_the_reason() -> None:
    ours = {*SAMPLING.values(), "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos"}
    ours |= {"detokenize", "logprobs", "guided_decoding"}
    theirs = set(THEIRS.split())

    assert theirs == ours | set(NOT_SET)
    assert set() == ours & set(NOT_SET)
    assert {field.name for field in dataclasses.fields(TheirSampling)} <= theirs


def test_without_max_tokens_the_answer_may_fill_the_context(started: Started) -> None:
    chunks = started.ask({"token_ids": list(range(150)), "stop_conditions": {}})

    assert 106 == len(tokens_of(chunks))


def test_the_docs_list_every_option_that_is_passed_on() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "tensorrt-llm.md").read_text("utf-8")

    assert [] == [name for name in (*SAMPLING, *GUIDED) if f"`{name}`" not in docs]


REFUSED = [
    ({"token_ids": []}, "at least one token id"),
    ({"token_ids": [-1]}, r"ids in \[0, 5000\), got -1"),
    ({"token_ids": [5000]}, "got 5000 to 5000"),
    ({"token_ids": [1] * 256}, "256 tokens: expected at most 255.*shorten the prompt"),
    (
        {"token_ids": [1] * 201},
        "max_num_tokens, 200, because this worker runs without enable_chunked_prefill",
    ),
    (
        {"token_ids": [1], "multi_modal_data": {"image_url": []}},
        r"\(multi_modal_data\): expected no images",
    ),
    ({"token_ids": [1], "sampling_options": {"n": 2}}, "n: expected 1: .*, got 2"),
    ({"token_ids": [1], "sampling_options": {"use_beam_search": True}}, "use_beam_search: expected false"),
    ({"token_ids": [1], "sampling_options": {"top_p": "x"}}, "top_p: expected a number, got 'x'"),
    (
        {"token_ids": [1], "output_options": {"prompt_logprobs": 1}},
        r"\(or echo\): expected none",
    ),
    (
        {"token_ids": [1], "sampling_options": {"guided_decoding": {"regex": "a", "choice": ["b"]}}},
        "^guided_regex and guided_choice: expected one way to guide the answer, got 2",
    ),
    (
        {"token_ids": [1], "sampling_options": {"guided_decoding": {"json": {}, "backend": "x"}}},
        "^guided_decoding_backend: expected none",
    ),
    ({"token_ids": [1], "routing": {"dp_rank": 1}}, r"dp_rank: expected a rank in \[0, 0\], got 1"),
    ({"token_ids": [1], "routing": {"lora_name": "x"}}, "unknown adapter 'x'.*Known: none"),
    (
        {"token_ids": [1], "stop_conditions": {"max_tokens": 0}},
        "max_tokens: expected an integer of at least 1",
    ),
    ({"token_ids": [1], "prefill_result": {"disaggregated_params": {}}}, "expected none in mode agg"),
]


@pytest.mark.parametrize(("request_", "words"), REFUSED)
def test_a_request_that_cannot_be_served_is_refused_before_the_engine_sees_it(
    started: Started, request_: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        started.ask(request_)

    assert [] == started.llm.requests


USED: dict[str, Any] = {
    "token_ids": [302],
    "eos_token_ids": [3],
    "priority": 0.9,
    "stop_conditions.max_tokens": 5,
    "stop_conditions.min_tokens": 2,
    "stop_conditions.stop_token_ids": [7],
    "stop_conditions.stop_token_ids_visible": [8],
    "stop_conditions.stop_token_ids_hidden": [9],
    "stop_conditions.ignore_eos": True,
    **{f"sampling_options.{name}": 0.7 for name in SAMPLING},
    "sampling_options.include_stop_str_in_output": True,
    **{f"sampling_options.guided_decoding.{kind}": "x" for kind in GUIDED},
    "sampling_options.guided_decoding.choice": ["x"],
    "output_options.logprobs": 2,
    "routing.dp_rank": 1,
    "routing.cache_salt": "s",
    "routing.lora_name": "l",
    "extra_args.nvext.cache_salt": "s",
    "prefill_result.disaggregated_params": {"a": 1},
}


@pytest.mark.parametrize("path", [path for path, use in FIELDS.uses.items() if use.use == "used"])
def test_a_field_that_is_used_changes_what_is_run(path: str) -> None:
    limits = Limits(context_length=512, max_prompt=None, vocab_size=None, mode="decode", ranks=2)
    base: dict[str, Any] = {
        "token_ids": [300, 301],
        "eos_token_ids": [2],
        "stop_conditions": {"max_tokens": 4},
    }
    details = "prefill_result.prompt_tokens_details"
    given: dict[str, Any] = {"cached_tokens": 1} if path == details else USED[path]
    *sections, last = path.split(".")
    request = dict(base)
    if path == details:
        base["prefill_result"] = {"disaggregated_params": {"a": 1}}
        request = {**base, "prefill_result": {**base["prefill_result"], last: given}}
    else:
        inner = request
        for section in sections:
            inner[section] = dict(inner.get(section) or {})
            inner = inner[section]
        inner[last] = given

    assert parse_request(base, limits) != parse_request(request, limits)
