"""Requests that ask for what an evaluation or a sampling client means, and must get it or be refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import vswa_plugins.tensorrt_llm.request
from vswa_plugins.gemma3_cpu.model.sampling import SamplingParams, parse_sampling
from vswa_plugins.gemma3_cpu.serving.request import Limits, parse_request

from tests.gemma3_engine_helpers import prompt_of, request_for, running_engine, tokens_of
from tests.gemma3_engine_helpers import small as small
from vswa_plugin.errors import InvalidRequest
from vswa_plugin.worker.handler import RequestHandler

LIMITS = Limits(context_length=512, pool_tokens=512, vocab_size=4096)


def refusal_of(request: dict[str, Any]) -> str:
    """Why gemma3_cpu does not take it; empty where it does."""
    try:
        parse_request(request, LIMITS)
    except InvalidRequest as error:
        return str(error)
    return ""


async def answered(directory: Path, *requests: dict[str, Any]) -> list[list[int] | str]:
    """Tokens of each answer, or why it was refused, by a worker's handler in front of the engine."""
    answers: list[list[int] | str] = []
    async with running_engine(directory) as engine:
        handler = RequestHandler(engine, "small", 1, None)
        for number, request in enumerate(requests):
            gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            try:
                answers.append(tokens_of([c async for c in handler.handle(request, f"r{number}", gone)]))
            except InvalidRequest as error:
                answers.append(str(error))
    return answers


# -- the prompt's own log probabilities ------------------------------------------------------------------
# A completion with echo and logprobs comes to the worker as prompt_logprobs.


@pytest.mark.parametrize("asked", [0, 1, 5])
def test_log_probabilities_of_the_prompt_are_refused_by_an_engine_that_has_none(asked: int) -> None:
    request = request_for([300, 301, 302], output_options={"logprobs": 1, "prompt_logprobs": asked})

    assert "prompt_logprobs" in refusal_of(request)


def test_a_worker_refuses_log_probabilities_of_the_prompt_and_serves_the_next_request(small: Path) -> None:
    prompt = prompt_of(20)
    refused, served = asyncio.run(
        answered(
            small,
            request_for(prompt, output_options={"prompt_logprobs": 1}),
            request_for(prompt, output_options={"prompt_logprobs": None}),
        )
    )

    assert 4 == len(served)
    assert isinstance(refused, str)
    assert "prompt_logprobs" in refused


def test_log_probabilities_of_the_answer_are_served() -> None:
    assert "" == refusal_of(request_for([300, 301], output_options={"logprobs": 1, "prompt_logprobs": None}))


def test_an_answer_of_no_tokens_is_refused() -> None:
    assert "max_tokens" in refusal_of(request_for([300, 301], max_tokens=0))


@pytest.mark.parametrize("asked", [0, 1, 5])
def test_log_probabilities_of_the_prompt_are_refused_by_the_plugin_for_tensorrt_llm(asked: int) -> None:
    limits = vswa_plugins.tensorrt_llm.request.Limits(
        context_length=512, max_prompt=None, vocab_size=None, mode="agg", ranks=1
    )
    request = request_for([300, 301, 302], output_options={"prompt_logprobs": asked})

    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        vswa_plugins.tensorrt_llm.request.parse_request(request, limits)


# -- what means to sample --------------------------------------------------------------------------------

ASKS_TO_SAMPLE: list[dict[str, Any]] = [
    {"top_p": 0.95},
    {"top_k": 50},
    {"seed": 1},
    {"top_p": 0.9, "seed": 2},
]


def sampling_of(**options: Any) -> SamplingParams:
    return parse_sampling(options, {})


@pytest.mark.parametrize("options", ASKS_TO_SAMPLE, ids=str)
def test_an_option_of_sampling_without_a_temperature_means_a_temperature_of_one(
    options: dict[str, Any],
) -> None:
    assert sampling_of(**options, temperature=1.0) == sampling_of(**options, temperature=None)


@pytest.mark.parametrize("options", ASKS_TO_SAMPLE, ids=str)
def test_a_temperature_of_zero_takes_the_likeliest_token_whatever_else_is_asked(
    options: dict[str, Any],
) -> None:
    assert 0.0 == sampling_of(**options, temperature=0).temperature


@pytest.mark.parametrize("options", ASKS_TO_SAMPLE, ids=str)
def test_a_temperature_that_is_given_is_the_one_that_is_used(options: dict[str, Any]) -> None:
    assert 0.5 == sampling_of(**options, temperature=0.5).temperature


def test_a_request_that_asks_for_nothing_takes_the_likeliest_token() -> None:
    assert 0.0 == sampling_of().temperature


def test_seeds_without_a_temperature_give_answers_that_repeat_and_differ(small: Path) -> None:
    seeds = [1, 1, 2, 3, 4]
    answers = asyncio.run(
        answered(small, *(request_for(prompt_of(20), 12, sampling_options={"seed": seed}) for seed in seeds))
    )

    assert answers[0] == answers[1]
    assert 1 < len({tuple(answer) for answer in answers})


def test_seeds_with_a_temperature_give_answers_that_repeat_and_differ(small: Path) -> None:
    asked = [{"seed": seed, "temperature": 1.0} for seed in (1, 1, 2, 3, 4)]
    answers = asyncio.run(
        answered(small, *(request_for(prompt_of(20), 12, sampling_options=options) for options in asked))
    )

    assert answers[0] == answers[1]
    assert 1 < len({tuple(answer) for answer in answers})
