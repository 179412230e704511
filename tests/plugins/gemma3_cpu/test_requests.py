"""Fields of a request that gemma3_cpu says to use change what it runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.serving.fields import FIELDS
from vswa_plugins.gemma3_cpu.serving.request import Limits, parse_request

from tests.gemma3_engine_helpers import prompt_of, request_for, running_engine, tokens_of
from tests.gemma3_engine_helpers import small as small
from tests.plugins.gemma3_cpu.test_transfer_params import GOOD

LIMITS = Limits(
    context_length=512,
    pool_tokens=512,
    vocab_size=4096,
    eos_ids=frozenset({1}),
    mode="decode",
    data_parallel_size=2,
)
BASE = request_for([300, 301], eos_token_ids=[2], sampling_options={"temperature": 0.5})
#: A value other than the default for each field that is used.
GIVEN: dict[str, Any] = {
    "token_ids": [302],
    "eos_token_ids": [3],
    "stop_conditions.max_tokens": 5,
    "stop_conditions.min_tokens": 2,
    "stop_conditions.stop_token_ids": [7],
    "stop_conditions.stop_token_ids_visible": [8],
    "stop_conditions.stop_token_ids_hidden": [9],
    "stop_conditions.ignore_eos": True,
    "sampling_options.temperature": 0.7,
    "sampling_options.top_p": 0.9,
    "sampling_options.top_k": 5,
    "sampling_options.min_p": 0.1,
    "sampling_options.seed": 3,
    "sampling_options.presence_penalty": 0.5,
    "sampling_options.frequency_penalty": 0.5,
    "sampling_options.repetition_penalty": 1.5,
    "sampling_options.guided_decoding.json": {"type": "object"},
    "sampling_options.guided_decoding.regex": "a",
    "sampling_options.guided_decoding.choice": ["a"],
    "sampling_options.guided_decoding.grammar": 'root ::= "a"',
    "output_options.logprobs": 2,
    "routing.dp_rank": 1,
    "routing.cache_salt": "s",
    "prefill_result.disaggregated_params": GOOD,
}
USED = [path for path, use in FIELDS.uses.items() if use.use == "used"]


def with_field(path: str, value: Any) -> dict[str, Any]:
    section, _, key = path.rpartition(".")
    if not section:
        return {**BASE, path: value}
    outer, _, inner = section.partition(".")
    body = {inner: {key: value}} if inner else {key: value}
    return {**BASE, outer: {**(BASE.get(outer) or {}), **body}}


@pytest.mark.parametrize("path", USED)
def test_a_field_that_is_used_changes_what_is_run(path: str) -> None:
    assert parse_request(BASE, LIMITS) != parse_request(with_field(path, GIVEN[path]), LIMITS)


@pytest.mark.parametrize("path", [path for path, use in FIELDS.uses.items() if use.use == "ignored"])
def test_a_field_that_is_ignored_changes_nothing(path: str) -> None:
    if path.startswith(
        ("extra_args.nvext.", "routing.", "stop_conditions.", "sampling_options.", "output_options.")
    ):
        section, _, key = path.rpartition(".")
        outer, _, inner = section.partition(".")
        body = {inner: {key: 1}} if inner else {**(BASE.get(outer) or {}), key: 1}
        request = {**BASE, outer: body}
    else:
        request = {**BASE, path: 1} if "." not in path else BASE

    assert parse_request(BASE, LIMITS) == parse_request(request, LIMITS)


@pytest.mark.parametrize("kind", ["stop_token_ids", "stop_token_ids_visible", "stop_token_ids_hidden"])
def test_each_kind_of_stop_token_ends_the_answer_with_it(small: Path, kind: str) -> None:
    """Which of them the text shows is the frontend's affair."""
    prompt = prompt_of(20)

    async def answers() -> list[list[int]]:
        async with running_engine(small) as engine:
            free = tokens_of([each async for each in engine.generate(request_for(prompt, 12))])
            stop = {kind: [free[3]]}
            return [
                free,
                tokens_of(
                    [each async for each in engine.generate(request_for(prompt, 12, stop_conditions=stop))]
                ),
            ]

    free, stopped = asyncio.run(answers())

    assert free[: free.index(free[3]) + 1] == stopped
    assert 12 == len(free)
