"""What TensorRT-LLM is asked for a request, and what is refused before it sees it; over a stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm.request import _GUIDED, SAMPLING

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


def test_without_max_tokens_the_answer_may_fill_the_context(started: Started) -> None:
    chunks = started.ask({"token_ids": list(range(150)), "stop_conditions": {}})

    assert 106 == len(tokens_of(chunks))


def test_the_docs_list_every_option_that_is_passed_on() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "tensorrt-llm.md").read_text("utf-8")

    assert [] == [name for name in (*SAMPLING, *_GUIDED) if f"`{name}`" not in docs]


REFUSED = [
    ({"token_ids": []}, "at least one token id"),
    ({"token_ids": [-1]}, r"ids in \[0, 5000\), got -1"),
    ({"token_ids": [5000]}, "got 5000 to 5000"),
    ({"token_ids": [1] * 256}, "256 tokens: expected at most 255.*shorten the prompt"),
    (
        {"token_ids": [1] * 201},
        "max_num_tokens, 200, because this worker runs without enable_chunked_prefill",
    ),
    ({"token_ids": [1], "multi_modal_data": {"image_url": []}}, "multi_modal_data: expected no images"),
    ({"token_ids": [1], "sampling_options": {"n": 2}}, "sampling_options.n: expected 1, got 2"),
    ({"token_ids": [1], "sampling_options": {"use_beam_search": True}}, "use_beam_search: expected False"),
    ({"token_ids": [1], "sampling_options": {"top_p": "x"}}, "top_p: expected a number, got 'x'"),
    ({"token_ids": [1], "output_options": {"prompt_logprobs": 1}}, "prompt_logprobs: expected none"),
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
