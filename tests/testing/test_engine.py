"""The stand-in engine beside its suite (tests/conformance): how its cache counts, and what its options do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.engine.contract import ChunkDict, RawEvent
from vswa_plugin.errors import ConfigError, InvalidRequest
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.testing.engine import (
    BLOCK_SIZE,
    GROUPS,
    StandinEngine,
    TrtllmScript,
    standin_settings,
)

PROMPT = list(range(3 * BLOCK_SIZE))


def answer(engine: StandinEngine, prompt: list[int], max_tokens: int = 1, **more: Any) -> list[ChunkDict]:
    async def collect() -> list[ChunkDict]:
        request = {"token_ids": prompt, "stop_conditions": {"max_tokens": max_tokens}, **more}
        return [chunk async for chunk in engine.generate(request)]

    return asyncio.run(collect())


def cached(chunks: list[ChunkDict]) -> int:
    return int(chunks[-1]["completion_usage"]["prompt_tokens_details"]["cached_tokens"])


def held(engine: StandinEngine, *raw: RawEvent) -> dict[int, set[int]]:
    adapter, residency = TrtllmEventAdapter(engine.info.layout), Residency(engine.info.layout)
    for event in (told for each in raw for told in adapter.feed(each)):
        residency.apply(event)
    return residency.resident()


def test_the_last_token_of_the_prompt_is_repeated() -> None:
    chunks = answer(StandinEngine(standin_settings()), [5, 7], 3)

    assert [[7], [7], [7]] == [chunk["token_ids"] for chunk in chunks]


def test_without_a_cache_nothing_is_ever_cached() -> None:
    engine = StandinEngine(standin_settings())

    assert [0, 0] == [cached(answer(engine, PROMPT)) for _ in range(2)]


def test_with_a_cache_the_blocks_of_earlier_prompts_count_but_for_the_last_token() -> None:
    engine = StandinEngine(standin_settings(cache=True))
    prompts = [PROMPT, PROMPT, [*PROMPT[:-1], 9999], [1, *PROMPT]]

    assert [0, len(PROMPT) - 1, 2 * BLOCK_SIZE, 0] == [cached(answer(engine, each)) for each in prompts]


def test_its_events_are_those_of_the_full_blocks_in_both_groups() -> None:
    engine, raw = StandinEngine(standin_settings(cache=True)), []
    engine.start(lambda rank, events: raw.extend(events))
    for prompt in (PROMPT, [*PROMPT, *PROMPT, 1]):
        answer(engine, prompt)

    names = set(sequence_hashes_of_tokens(PROMPT + PROMPT, BLOCK_SIZE))
    assert {0: names, 1: names} == held(engine, *raw)


def test_a_decode_worker_repeats_the_token_that_was_handed_over() -> None:
    (chunk,) = answer(StandinEngine(standin_settings("prefill")), [5, 7], 9)
    chunks = answer(StandinEngine(standin_settings("decode")), [5, 8], 2, prefill_result=chunk)

    assert [[7], [7]] == [each["token_ids"] for each in chunks]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "prefill_result: expected what a prefill worker has answered"),
        ({"disaggregated_params": None}, "disaggregated_params.token: expected a token"),
        ({"disaggregated_params": {"token": "7"}}, "expected an integer"),
    ],
)
def test_a_decode_worker_refuses_what_no_prefill_worker_has_answered(
    result: dict[str, Any] | None, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        answer(StandinEngine(standin_settings("decode")), [5, 7], prefill_result=result)


def test_an_answer_ends_with_the_context() -> None:
    engine = StandinEngine(standin_settings())

    assert 2 == len(answer(engine, [1] * (engine.info.context_length - 2), 99))


@pytest.mark.parametrize(
    ("mode", "options", "reason"), [("agg", {"stepp_s": 1}, "stepp_s"), ("aggg", {}, "did you mean 'agg'")]
)
def test_unknown_modes_and_options_are_refused(mode: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        StandinEngine(standin_settings(mode, **options))


def test_scripted_events_store_and_remove_the_blocks_of_a_prompt() -> None:
    script, (sliding, whole) = TrtllmScript(), GROUPS
    events = [script.created(sliding), script.created(whole)]
    events += [script.stored(sliding, PROMPT[:64]), script.stored(sliding, PROMPT, 2)]
    events += [script.stored(whole, PROMPT), script.removed(sliding, PROMPT, 1)]
    names = sequence_hashes_of_tokens(PROMPT, BLOCK_SIZE)

    assert {0: set(names[:1]), 1: set(names)} == held(StandinEngine(standin_settings()), *events)
