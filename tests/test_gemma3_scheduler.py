"""Continuous batching on the real model and cache, one step at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.model import Gemma3Model
from vswa_plugins.gemma3_cpu.scheduler import MAX_FAILED_STEPS

from vswa_plugin.errors import InvariantError, RequestError

from .gemma3_engine_helpers import (
    BLOCK,
    CONTEXT,
    OPTIONS,
    Bench,
    Cold,
    Reader,
    load_small_model,
    make_small_model,
    prompt_of,
    request_for,
)

#: One prompt of 120 tokens needs 15 blocks: room for one or two, so that every other request evicts.
TIGHT: dict[str, Any] = {
    **OPTIONS,
    "max_batch_size": 3,
    "gemma3_cpu": {"max_chunk_tokens": 24, "kv_blocks": {32: 18, "global": 34}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Gemma3Model:
    return load_small_model(make_small_model(Path(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def cold(model: Gemma3Model) -> Cold:
    return Cold(model)


@pytest.fixture
def bench(model: Gemma3Model) -> Bench:
    return Bench(model, OPTIONS)


def computed(bench: Bench) -> list[list[tuple[int, int, bool]]]:
    """Per step, the chunks computed: (tokens, start, wants logits)."""
    return [chunks for kind, chunks in bench.log if kind == "compute"]


def test_greedy_text_is_that_of_a_loop_over_the_bare_model(bench: Bench, cold: Cold) -> None:
    prompt = prompt_of(101)

    [reader] = bench.run(request_for(prompt, 6))

    assert cold.greedy(prompt, 6) == reader.tokens


def test_a_resumed_prompt_computes_only_the_rest_and_says_the_same(bench: Bench, cold: Cold) -> None:
    prompt = prompt_of(101)
    bench.run(request_for(prompt, 2))
    before = bench.scheduler.counters.prefill_tokens

    [reader] = bench.run(request_for(prompt + prompt_of(9, 1), 5))

    assert 96 == reader.cached_tokens
    assert 110 - 96 == bench.scheduler.counters.prefill_tokens - before
    assert cold.greedy(prompt + prompt_of(9, 1), 5) == reader.tokens


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            # (which family, how much of its stem, a tail of its own, tokens to generate)
            st.tuples(st.integers(0, 2), st.integers(1, 120), st.integers(0, 30), st.integers(1, 3)),
            min_size=1,
            max_size=3,
        ),
        min_size=2,
        max_size=8,
    )
)
def test_reuse_under_eviction_gives_a_cold_runs_logits(
    model: Gemma3Model, cold: Cold, rounds: list[list[tuple[int, int, int, int]]]
) -> None:
    bench = Bench(model, TIGHT)
    for requests in rounds:
        prompts = [
            prompt_of(120, family)[:stem] + prompt_of(tail, stem) for family, stem, tail, _ in requests
        ]
        before = bench.scheduler.counters.prefill_tokens

        readers = bench.run(
            *(request_for(p, count) for p, (*_, count) in zip(prompts, requests, strict=True))
        )

        cached = sum(reader.cached_tokens for reader in readers)
        assert sum(map(len, prompts)) - cached == bench.scheduler.counters.prefill_tokens - before
        expected = [
            cold.logits(prompt + reader.tokens[:i])
            for prompt, reader in zip(prompts, readers, strict=True)
            for i in range(len(reader.tokens))
        ]
        assert len(expected) == len(bench.logits)
        # Steps mix the requests: every computed row must be some expected one, and each of those computed.
        distances = np.abs(np.array(expected)[:, None] - np.array(bench.logits)[None]).max(axis=2)
        assert distances.min(axis=1).max() < 1e-4
        assert distances.min(axis=0).max() < 1e-4
        bench.logits.clear()


def test_the_property_above_does_reuse_and_evict(model: Gemma3Model) -> None:
    bench = Bench(model, TIGHT)
    for family in (0, 0, 1, 2, 0):
        bench.run(request_for(prompt_of(120, family), 2))

    kinds = {event["data"]["type"] for kind, events in bench.log if kind == "events" for event in events}
    assert [0, 112, 0, 0] == [reader.cached_tokens for reader in bench.readers[:4]]
    assert {"created", "stored", "removed"} == kinds


def test_requests_that_run_together_say_what_each_says_alone(bench: Bench, cold: Cold) -> None:
    prompts = [prompt_of(length, seed=length) for length in (3, 40, 90, 90, 17, 64, 1, 33, 8, 200)]

    readers = bench.run(*(request_for(prompt, 3 + i % 4) for i, prompt in enumerate(prompts)))

    assert [cold.greedy(p, 3 + i % 4) for i, p in enumerate(prompts)] == [r.tokens for r in readers]
    assert max(len(chunks) for chunks in computed(bench)) > 4


def test_a_step_stays_within_its_budget_and_serves_decoding_requests_first(bench: Bench) -> None:
    bench.run(*(request_for(prompt_of(150, seed), 20) for seed in range(12)))

    for chunks in computed(bench):
        assert sum(tokens for tokens, _, _ in chunks) <= 64
        assert max(tokens for tokens, _, _ in chunks) <= 24
        assert len(chunks) <= 8
    mixed = [chunks for chunks in computed(bench) if {1, 24} <= {tokens for tokens, _, _ in chunks}]
    assert mixed
    assert all(chunks == sorted(chunks, key=lambda chunk: chunk[1] < 150) for chunks in mixed)


def test_every_decoding_request_gets_a_token_in_every_step(bench: Bench) -> None:
    first = bench.add(request_for(prompt_of(5), 10))
    bench.step()
    for seed in range(6):
        bench.add(request_for(prompt_of(200, seed), 2))

    for _ in range(9):
        bench.step()

    assert 10 == len(first.tokens) and first.finished


def test_waiting_requests_are_served_in_order(model: Gemma3Model) -> None:
    bench = Bench(model, {**OPTIONS, "max_batch_size": 2})

    readers = bench.run(*(request_for(prompt_of(30, seed), 2) for seed in range(6)))

    ends = [reader for kind, reader in bench.log if kind == "output" and len(reader.tokens)]
    order = list(dict.fromkeys(map(id, ends)))
    assert [id(reader) for reader in readers] == order


def test_a_request_without_room_waits_until_there_is(model: Gemma3Model) -> None:
    bench = Bench(model, TIGHT)
    readers = [bench.add(request_for(prompt_of(120, seed), 20)) for seed in range(3)]
    bench.step()

    assert (1, 2) == (len(bench.scheduler.running), len(bench.scheduler.waiting))
    while bench.scheduler.has_work:
        bench.step()
    assert [20, 20, 20] == [len(reader.tokens) for reader in readers]


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_room(model: Gemma3Model) -> None:
    bench = Bench(model, TIGHT)
    _, large, small = (bench.add(request_for(prompt_of(n), 8)).generation for n in (120, 200, 9))

    while bench.scheduler.has_work:
        bench.step()
        assert not (large in bench.scheduler.waiting and small in bench.scheduler.running)


def test_the_last_chunk_has_reason_and_usage(bench: Bench) -> None:
    [reader] = bench.run(request_for(prompt_of(20), 3))

    assert [{"token_ids": [token], "index": 0} for token in reader.tokens[:2]] == reader.outputs[:2]
    assert {
        "token_ids": reader.tokens[2:],
        "index": 0,
        "finish_reason": "length",
        "completion_usage": {
            "prompt_tokens": 20,
            "completion_tokens": 3,
            "total_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    } == reader.last


def first_tokens(cold: Cold, count: int = 6) -> tuple[list[int], list[int]]:
    """A prompt, and the greedy answer to it, without repetitions."""
    for seed in range(50):
        answer = cold.greedy(prompt_of(20, seed), count)
        if len(set(answer)) == count:
            return prompt_of(20, seed), answer
    raise AssertionError("no prompt with an answer of distinct tokens")


@pytest.mark.parametrize(
    ("where", "key"), [("stop_conditions", "stop_token_ids"), ("stop_conditions", "stop_token_ids_hidden")]
)
def test_a_stop_token_ends_the_answer(bench: Bench, cold: Cold, where: str, key: str) -> None:
    prompt, answer = first_tokens(cold)

    [reader] = bench.run(request_for(prompt, 6, **{where: {key: [answer[3]]}}))

    assert (answer[:4], "stop") == (reader.tokens, reader.last["finish_reason"])


def test_an_eos_token_ends_the_answer_unless_it_is_ignored(bench: Bench, cold: Cold) -> None:
    prompt, answer = first_tokens(cold)
    eos = {"eos_token_ids": [answer[2]]}
    # Dynamo repeats the eos ids among the hidden stop ids.
    ignored = {"ignore_eos": True, "stop_token_ids_hidden": [answer[2]]}

    stopped, going_on = bench.run(
        request_for(prompt, 6, **eos), request_for(prompt, 6, **eos, stop_conditions=ignored)
    )

    assert (answer[:3], "stop") == (stopped.tokens, stopped.last["finish_reason"])
    assert (answer, "length") == (going_on.tokens, going_on.last["finish_reason"])


def test_min_tokens_keeps_stop_tokens_away(bench: Bench, cold: Cold) -> None:
    prompt, answer = first_tokens(cold)
    stop = {"stop_token_ids": [answer[1]]}

    early, late = bench.run(
        request_for(prompt, 6, stop_conditions={**stop, "min_tokens": 1}),
        request_for(prompt, 6, stop_conditions={**stop, "min_tokens": 2}),
    )

    assert (answer[:2], "stop") == (early.tokens, early.last["finish_reason"])
    assert answer[:1] == late.tokens[:1] and len(late.tokens) > 2
    assert answer[1] not in late.tokens[:2]


def test_an_answer_ends_at_the_context(bench: Bench) -> None:
    [reader] = bench.run(request_for(prompt_of(CONTEXT - 5), 100))

    assert (5, "length") == (len(reader.tokens), reader.last["finish_reason"])


def test_log_probabilities_come_with_the_tokens(bench: Bench, cold: Cold) -> None:
    prompt = prompt_of(20)

    [reader] = bench.run(request_for(prompt, 2, output_options={"logprobs": 2}))

    logits = cold.logits(prompt).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum())
    [first], [top] = reader.outputs[0]["log_probs"], reader.outputs[0]["top_logprobs"]  # type: ignore[index]
    assert float(logprobs.max()) == pytest.approx(first, abs=1e-4)
    assert [(1, reader.tokens[0]), (2, int(logprobs.argsort()[-2]))] == [
        (t["rank"], t["token_id"]) for t in top
    ]


def test_the_same_seed_gives_the_same_answer_in_any_company(bench: Bench) -> None:
    seeded = request_for(prompt_of(20), 12, sampling_options={"temperature": 1.0, "seed": 42})
    other = request_for(prompt_of(20), 12, sampling_options={"temperature": 1.0, "seed": 43})

    [alone] = bench.run(seeded)
    together = bench.run(other, seeded, other, seeded)

    assert alone.tokens == together[1].tokens == together[3].tokens
    assert alone.tokens != together[0].tokens == together[2].tokens


def test_events_are_published_before_the_tokens_of_their_step(bench: Bench) -> None:
    bench.run(request_for(prompt_of(100), 3), request_for(prompt_of(60, 1), 3))

    kinds = [kind for kind, _ in bench.log]
    for i, kind in enumerate(kinds):
        if kind == "output":
            since = kinds[:i][::-1]
            assert since.index("events") < since.index("compute")


def test_who_sees_the_first_token_can_rely_on_the_prompts_events(bench: Bench) -> None:
    prompt = prompt_of(100)
    reader = bench.add(request_for(prompt, 3))
    while not reader.outputs:
        bench.step()

    stored: dict[int, set[int]] = {0: set(), 1: set()}
    for kind, events in bench.log:
        for event in events if kind == "events" else []:
            if event["data"]["type"] == "stored":
                stored[event["layer_group_id"]] |= {b["block_hash"] for b in event["data"]["blocks"]}
    assert bench.manager.resident() == stored
    assert 100 // BLOCK == len(stored[0]) == len(stored[1])


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_cancelling_frees_the_blocks_at_the_next_step(bench: Bench, steps: int) -> None:
    reader = bench.add(request_for(prompt_of(100), 50))
    for _ in range(steps):
        bench.step()
    assert reader.generation is not None
    reader.generation.cancelled = True
    heard = len(reader.outputs)

    bench.step()

    assert {"blocks_used_32": 0.0, "blocks_used_global": 0.0} == bench.used()
    assert not bench.scheduler.has_work
    assert heard == len(reader.outputs)


def test_a_salt_keeps_prompts_apart(bench: Bench) -> None:
    prompt = prompt_of(100)
    salted = request_for(prompt, 2, routing={"cache_salt": "tenant"})

    first, other, again = (bench.run(r)[0] for r in (request_for(prompt, 2), salted, salted))

    assert [0, 0, 96] == [first.cached_tokens, other.cached_tokens, again.cached_tokens]
    assert first.tokens == other.tokens == again.tokens


class Boom(RuntimeError):
    """A bug that only a test has."""


def fail_when(bench: Bench, failing: list[bool]) -> None:
    def before(chunks: Any) -> None:
        if failing.pop(0) if failing else False:
            raise Boom("bang")

    bench.before_forward = before


def error_of(reader: Reader) -> str:
    assert isinstance(reader.outputs[-1], RequestError)
    return str(reader.outputs[-1])


def test_a_failing_step_ends_its_requests_and_no_others(model: Gemma3Model, cold: Cold) -> None:
    bench = Bench(model, {**OPTIONS, "max_batch_size": 2})
    readers = [bench.add(request_for(prompt_of(30, seed), 4)) for seed in range(3)]
    fail_when(bench, [False, True])

    while bench.scheduler.has_work:
        bench.step()

    assert "the engine failed while it ran this request: Boom: bang" == error_of(readers[0])
    assert error_of(readers[0]) == error_of(readers[1])
    assert readers[0].outputs[-1] is not readers[1].outputs[-1]
    assert cold.greedy(prompt_of(30, 2), 4) == readers[2].tokens
    assert 1 == bench.scheduler.counters.failed_steps
    assert {0.0} == set(bench.used().values())


def test_a_failure_that_repeats_stops_the_engine(bench: Bench) -> None:
    fail_when(bench, [True] * MAX_FAILED_STEPS)
    readers = []
    for _ in range(MAX_FAILED_STEPS - 1):
        readers.append(bench.add(request_for(prompt_of(30))))
        bench.step()
    readers.append(bench.add(request_for(prompt_of(30))))

    with pytest.raises(Boom):
        bench.step()

    assert all("Boom: bang" in error_of(reader) for reader in readers)


def test_failures_in_between_good_steps_do_not_stop_the_engine(bench: Bench) -> None:
    fail_when(bench, [True, False] * (MAX_FAILED_STEPS + 1))

    for seed in range(2 * (MAX_FAILED_STEPS + 1)):
        bench.run(request_for(prompt_of(10, seed), 1))

    assert MAX_FAILED_STEPS + 1 == bench.scheduler.counters.failed_steps


def test_a_broken_cache_stops_the_engine_at_once_and_all_requests_hear_of_it(bench: Bench) -> None:
    first, waiting = (bench.add(request_for(prompt_of(300, seed))) for seed in range(2))
    bench.step()
    pool = bench.manager._store.pools[0]

    def before(chunks: Any) -> None:
        pool.holders[0] += 1
        raise Boom("bang")

    bench.before_forward = before
    with pytest.raises(InvariantError) as stopped:
        bench.scheduler.step()
    bench.scheduler.end_all(stopped.value)

    assert "Boom" in error_of(first)
    assert waiting.finished and isinstance(waiting.outputs[-1], RequestError)
    assert not bench.scheduler.has_work


def test_logits_that_are_not_finite_end_only_their_request(bench: Bench, cold: Cold) -> None:
    good, bad = bench.add(request_for(prompt_of(8), 3)), bench.add(request_for(prompt_of(9), 3))
    forward = bench._forward

    def poisoned(chunks: Any, /) -> Any:
        logits = forward(chunks)
        if len(logits) == 2:
            logits[1, 5] = np.nan
        return logits

    bench._forward = poisoned  # type: ignore[assignment]
    while bench.scheduler.has_work:
        bench.step()

    assert cold.greedy(prompt_of(8), 3) == good.tokens
    assert "FloatingPointError: expected finite logits" in error_of(bad)


def test_ending_all_tells_running_and_waiting_requests(model: Gemma3Model) -> None:
    bench = Bench(model, {**OPTIONS, "max_batch_size": 1})
    running, waiting = (bench.add(request_for(prompt_of(30, seed), 9)) for seed in range(2))
    bench.step()
    bench.step()

    bench.scheduler.end_all()

    bench.manager.check()
    assert ["cancelled", "cancelled"] == [r.last["finish_reason"] for r in (running, waiting)]
    assert len(running.tokens) == running.last["completion_usage"]["completion_tokens"] > 0
    assert {0.0} == set(bench.used().values())


@pytest.mark.parametrize(
    "options",
    [
        {"max_seq_len": 32},
        {"kv_cache_config": {"tokens_per_block": BLOCK, "max_attention_window": [512]}},
        {"kv_cache_config": {"tokens_per_block": BLOCK, "max_attention_window": [64, 512]}},
        {"kv_cache_config": {"tokens_per_block": BLOCK, "enable_block_reuse": False}},
    ],
    ids=["context equals the window", "one group by the file", "a larger window", "no reuse"],
)
def test_the_layout_of_the_cache_does_not_change_the_answer(
    model: Gemma3Model, cold: Cold, options: dict[str, Any]
) -> None:
    bench = Bench(model, {**OPTIONS, **options})
    prompt = prompt_of(20 if "max_seq_len" in options else 150)

    first, other = bench.run(request_for(prompt, 5), request_for(prompt[3:], 5))
    [second] = bench.run(request_for(prompt, 5))

    assert cold.greedy(prompt, 5) == first.tokens == second.tokens
    assert cold.greedy(prompt[3:], 5) == other.tokens
    reuses = options.get("kv_cache_config", {}).get("enable_block_reuse", True)
    assert ((len(prompt) - 1) // BLOCK * BLOCK if reuses else 0) == second.cached_tokens
