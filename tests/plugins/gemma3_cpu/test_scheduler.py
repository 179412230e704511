"""Continuous batching on the real model and cache, one step at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.model.model import Gemma3Model

from tests.gemma3_engine_helpers import BLOCK, OPTIONS, Bench, Cold, prompt_of, request_for
from tests.gemma3_engine_helpers import bench as bench
from tests.gemma3_engine_helpers import cold as cold
from tests.gemma3_engine_helpers import even as even
from tests.gemma3_engine_helpers import even_cold as even_cold
from tests.gemma3_engine_helpers import model as model
from tests.gemma3_engine_helpers import small as small
from tests.properties import examples

#: One prompt of 120 tokens needs 15 blocks: room for one or two, so that every other request evicts.
TIGHT: dict[str, Any] = {
    **OPTIONS,
    "max_batch_size": 3,
    "gemma3_cpu": {"max_chunk_tokens": 24, "kv_blocks": {32: 18, "global": 34}},
}


#: V1 holds the whole prompt in every window until it has computed it.
V1 = {"reuse_rule": "trtllm_v1", "kv_blocks": {32: 21, "global": 34}}

#: The same under other rules, without parts of blocks, and with a host tier to which evicted blocks go.
KINDS: dict[str, dict[str, Any]] = {
    "v2": {},
    "v2 on the host": {"gemma3_cpu": {"host_blocks": {32: 7, "global": 20}}},
    "v2, whole blocks": {"kv_cache_config": {"enable_partial_reuse": False}},
    "v1": {"gemma3_cpu": V1},
    "v1 on the host": {"gemma3_cpu": {**V1, "host_blocks": {32: 7, "global": 20}}},
    "v1 contiguous": {"gemma3_cpu": {**V1, "reuse_rule": "trtllm_v1_contiguous"}},
}


def tight(kind: str) -> dict[str, Any]:
    return {**TIGHT, **{section: {**TIGHT[section], **more} for section, more in KINDS[kind].items()}}


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

    # Twelve blocks, and five tokens of the block that was not full.
    assert 101 == reader.cached_tokens
    assert 110 - 101 == bench.scheduler.counters.prefill_tokens - before
    assert cold.greedy(prompt + prompt_of(9, 1), 5) == reader.tokens


@pytest.mark.parametrize("windows_share_a_pool", [False, True], ids=["two pools", "one pool"])
@pytest.mark.parametrize("kind", KINDS)
@examples(12)
@given(
    rounds=st.lists(
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
    model: Gemma3Model,
    cold: Cold,
    even: Gemma3Model,
    even_cold: Cold,
    kind: str,
    windows_share_a_pool: bool,
    rounds: list[list[tuple[int, int, int, int]]],
) -> None:
    cold = even_cold if windows_share_a_pool else cold
    bench = Bench(even if windows_share_a_pool else model, tight(kind))
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_property_above_does_reuse_and_evict(model: Gemma3Model, kind: str) -> None:
    bench = Bench(model, tight(kind))
    for family in (0, 0, 1, 2, 0, 0):
        bench.run(request_for(prompt_of(120, family), 2))

    told = {event["data"]["type"] for what, events in bench.log if what == "events" for event in events}
    cached = [reader.cached_tokens for reader in bench.readers]
    assert [0, 112 if kind == "v2, whole blocks" else 119, 0, 0] == cached[:4]
    assert {"created", "stored", "removed"} <= told
    assert ("host" in kind) == ("updated" in told)


def test_what_comes_back_from_the_host_gives_the_same_text(model: Gemma3Model, cold: Cold) -> None:
    bench = Bench(model, tight("v2 on the host"))

    [first, _, again] = [bench.run(request_for(prompt_of(120, family), 4))[0] for family in (0, 1, 0)]

    assert 0 < again.cached_tokens
    assert cold.greedy(prompt_of(120), 4) == first.tokens == again.tokens


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
    assert stored == {group: set(levels) for group, levels in bench.manager.resident().items()}
    assert -(-100 // BLOCK) == len(stored[0]) == len(stored[1])


def test_a_salt_keeps_prompts_apart(bench: Bench) -> None:
    prompt = prompt_of(100)
    salted = request_for(prompt, 2, routing={"cache_salt": "tenant"})

    first, other, again = (bench.run(r)[0] for r in (request_for(prompt, 2), salted, salted))

    assert [0, 0, 99] == [first.cached_tokens, other.cached_tokens, again.cached_tokens]
    assert first.tokens == other.tokens == again.tokens


@pytest.mark.parametrize(
    "options",
    [
        {"max_seq_len": 32},
        {"kv_cache_config": {"tokens_per_block": BLOCK, "max_attention_window": [512]}},
        {"kv_cache_config": {"tokens_per_block": BLOCK, "max_attention_window": [64, 64, 512]}},
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
    assert (len(prompt) - 1 if reuses else 0) == second.cached_tokens


@pytest.mark.parametrize(
    ("rule", "sliding", "reused"),
    [("trtllm_v2", 9, 119), ("trtllm_v1", 18, 119), ("trtllm_v1_contiguous", 18, 0)],
)
def test_the_rule_decides_what_is_resumed_without_the_first_sliding_blocks(
    model: Gemma3Model, cold: Cold, rule: str, sliding: int, reused: int
) -> None:
    own = {**OPTIONS["gemma3_cpu"], "reuse_rule": rule, "kv_blocks": {32: sliding, "global": 34}}
    bench = Bench(model, {**OPTIONS, "gemma3_cpu": own})

    bench.run(request_for(prompt_of(120), 2))
    if rule != "trtllm_v2":
        # V1 holds the whole prompt in every window until it has computed it: others take the first blocks.
        bench.run(request_for(prompt_of(60, 1), 1))
    [again] = bench.run(request_for(prompt_of(120), 4))

    assert reused == again.cached_tokens
    assert cold.greedy(prompt_of(120), 4) == again.tokens
