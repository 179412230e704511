"""Prefill and decode in two engines, joined through TCP: the answers are those of one engine."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from tests.gemma3_disagg_helpers import Chunks, Pair, handed_over, running_pair, with_options
from tests.gemma3_engine_helpers import (
    BLOCK,
    Cold,
    collect,
    prompt_of,
    request_for,
    run_async,
    running_engine,
    tokens_of,
)
from tests.gemma3_engine_helpers import cold as cold
from tests.gemma3_engine_helpers import model as model
from tests.gemma3_engine_helpers import small as small
from vswa_plugin.engine.contract import WORKER_ONLY
from vswa_plugin.errors import InvalidRequest


def aggregated(directory: Path, *requests: dict[str, Any]) -> list[Chunks]:
    async def main() -> list[Chunks]:
        async with running_engine(directory) as engine:
            return [await collect(engine, request) for request in requests]

    return run_async(main())


def joined(directory: Path, *requests: dict[str, Any], **options: Any) -> list[Chunks]:
    async def main() -> list[Chunks]:
        async with running_pair(directory, **options) as pair:
            return [await pair.run(request) for request in requests]

    return run_async(main())


def blocks_moved(pair: Pair) -> dict[str, float]:
    """Since the start, by window: pages that the decode engine received."""
    store, stats = pair.decode._ranks[0].store, pair.decode.stats()
    return {
        label: stats[f"transfer_bytes_{label}"] / (4 * math.prod(store.page_shape(group)))
        for group, label in enumerate(("32", "global"))
    }


@pytest.mark.parametrize("length", [1, 7, 8, 31, 32, 33, 64, 150, 263])
def test_the_text_is_that_of_one_engine(small: Path, cold: Cold, length: int) -> None:
    prompt = prompt_of(length)

    [chunks] = joined(small, request_for(prompt, 6))

    assert cold.greedy(prompt, 6) == tokens_of(chunks)
    assert [1] * 6 == [len(chunk["token_ids"]) for chunk in chunks]
    assert (length, 6) == tuple(
        chunks[-1]["completion_usage"][f"{kind}_tokens"] for kind in ("prompt", "completion")
    )


def test_the_prefill_worker_answers_one_token_and_says_length(small: Path, cold: Cold) -> None:
    """Even where the token ends the answer and whatever max_tokens says: else decode would be left out."""
    prompt = prompt_of(50)
    [first] = cold.greedy(prompt, 1)

    async def main() -> None:
        async with running_pair(small) as pair:
            for request in (
                request_for(prompt, 9, stop_conditions={"stop_token_ids": [first]}),
                request_for(prompt, None),
            ):
                [chunk] = await collect(pair.prefill, request)
                assert ([first], "length") == (chunk["token_ids"], chunk["finish_reason"])
                assert "disaggregated_params" in chunk

    run_async(main())


def test_a_stop_token_that_comes_first_ends_the_answer_without_a_transfer(small: Path, cold: Cold) -> None:
    prompt = prompt_of(50)
    [first] = cold.greedy(prompt, 1)

    async def main() -> None:
        async with running_pair(small) as pair:
            stopped = await pair.run(request_for(prompt, 9, stop_conditions={"stop_token_ids": [first]}))
            short = await pair.run(request_for(prompt, 1))
            for chunks, reason in ((stopped, "stop"), (short, "length")):
                assert [([first], reason)] == [(c["token_ids"], c["finish_reason"]) for c in chunks]
                assert {"dp_rank": 0, "transferred_tokens": 50}.items() <= chunks[0][WORKER_ONLY].items()
            await pair.settled()
            assert [0.0, 0.0] == [e.stats()["transfers"] for e in (pair.prefill, pair.decode)]

    run_async(main())


def test_min_tokens_keeps_a_first_stop_token_from_ending_the_answer(small: Path, cold: Cold) -> None:
    prompt = prompt_of(50)
    stop = {"stop_token_ids": [cold.greedy(prompt, 1)[0]], "min_tokens": 3}
    request = request_for(prompt, 5, stop_conditions=stop)

    assert tokens_of(aggregated(small, request)[0]) == tokens_of(joined(small, request)[0])


def test_min_tokens_counts_where_only_the_decode_worker_was_told(small: Path, cold: Cold) -> None:
    prompt = prompt_of(50)
    told = {"stop_token_ids": [cold.greedy(prompt, 1)[0]], "min_tokens": 2}

    async def main() -> Chunks:
        async with running_pair(small) as pair:
            chunk = await pair.prefilled(request_for(prompt, 4))
            return await collect(
                pair.decode, handed_over(request_for(prompt, 4, stop_conditions=told), chunk)
            )

    assert len(tokens_of(run_async(main()))) > 1


def test_a_salt_keeps_tenants_apart_on_both_sides(small: Path, cold: Cold) -> None:
    prompt = prompt_of(100)

    async def main() -> list[tuple[int, float]]:
        async with running_pair(small) as pair:
            seen = []
            for salt in (None, "a", "b", "a"):
                chunks = await pair.run(request_for(prompt, 3, routing={"cache_salt": salt}))
                assert cold.greedy(prompt, 3) == tokens_of(chunks)
                details = chunks[-1]["completion_usage"]["prompt_tokens_details"]
                seen.append((details["cached_tokens"], pair.decode.stats()["decode_cached_tokens"]))
            return seen

    assert [(0, 0.0), (0, 0.0), (0, 0.0), (99, 99.0)] == run_async(main())


def test_log_probabilities_of_the_first_token_come_along(small: Path) -> None:
    request = request_for(prompt_of(60), 3, output_options={"logprobs": 2})

    [one], [two] = aggregated(small, request), joined(small, request)

    for expected, got in zip(one, two, strict=True):
        assert expected["log_probs"] == pytest.approx(got["log_probs"], abs=1e-4)
        assert [
            [(top["rank"], top["token_id"]) for top in chunk["top_logprobs"][0]] for chunk in (expected, got)
        ] == [[(top["rank"], top["token_id"]) for top in expected["top_logprobs"][0]]] * 2


def test_a_seed_draws_what_it_draws_in_one_engine(small: Path) -> None:
    requests = [
        request_for(prompt_of(70, seed), 12, sampling_options={"temperature": 1.0, "seed": seed})
        for seed in range(3)
    ]

    one, two = aggregated(small, *requests), joined(small, *requests)

    assert [tokens_of(chunks) for chunks in one] == [tokens_of(chunks) for chunks in two]


def test_of_a_sliding_group_only_the_window_is_pulled(small: Path) -> None:
    async def main() -> None:
        async with running_pair(small) as pair:
            await pair.run(request_for(prompt_of(203), 2))
            assert {"32": 4.0 + 1.0, "global": 26.0} == blocks_moved(pair)
            await pair.settled()
            assert [pair.decode.stats()[f"transfer_bytes_{w}"] for w in ("32", "global")] == [
                pair.prefill.stats()[f"transfer_bytes_{w}"] for w in ("32", "global")
            ]
            assert (1.0, 1.0) == (pair.prefill.stats()["transfers"], pair.decode.stats()["transfers"])

    run_async(main())


def test_decode_announces_what_it_received_and_reuses_it(small: Path, cold: Cold) -> None:
    prompt = prompt_of(120)
    longer = prompt + prompt_of(30, 1)

    async def main() -> None:
        async with running_pair(small) as pair:
            await pair.run(request_for(prompt, 2))
            stored = [0, 0]
            for event in pair.decode_events:
                if event["data"]["type"] == "stored":
                    stored[event["layer_group_id"]] += len(event["data"]["blocks"])
            # The sliding group has nothing below the window: (120 + 1 - 32) // 8 blocks are stale.
            assert [15 - 11, 15] == stored
            first = blocks_moved(pair)
            chunks = await pair.run(request_for(longer, 4))
            second = blocks_moved(pair)
            assert cold.greedy(longer, 4) == tokens_of(chunks)
            # 120 tokens are there; of 19 blocks 4 are new, and the window ends with five.
            assert {"32": 4.0, "global": 4.0} == {w: second[w] - first[w] for w in first}
            assert 120.0 == pair.decode.stats()["decode_cached_tokens"]
            assert 0.0 == pair.decode.stats()["prefill_tokens"]
            assert {"dp_rank": 0, "transferred_tokens": 30}.items() <= chunks[0][WORKER_ONLY].items()

    run_async(main())


def test_the_usage_shows_what_the_prefill_worker_reused(small: Path) -> None:
    prompt = prompt_of(120)

    async def main() -> list[Chunks]:
        async with running_pair(small) as pair:
            await pair.prefilled(request_for(prompt, 2))
            return [await pair.run(request_for(prompt, 2)) for _ in range(2)]

    cached = [
        chunks[-1]["completion_usage"]["prompt_tokens_details"]["cached_tokens"]
        for chunks in run_async(main())
    ]

    assert [119, 119] == cached


def test_requests_at_once_get_what_each_gets_alone(small: Path, cold: Cold) -> None:
    prompts = [prompt_of(length, length) for length in (5, 80, 33, 140, 12, 64, 99, 200, 7, 50, 18, 120)]

    async def main() -> list[Chunks]:
        async with running_pair(small) as pair:
            return await asyncio.gather(*(pair.run(request_for(p, 6)) for p in prompts))

    assert [cold.greedy(prompt, 6) for prompt in prompts] == [tokens_of(c) for c in run_async(main())]


def test_a_request_without_a_prefill_result_is_served_whole(small: Path, cold: Cold) -> None:
    prompt = prompt_of(90)

    async def main() -> Chunks:
        async with running_pair(small) as pair:
            return await collect(pair.decode, request_for(prompt, 4))

    chunks = run_async(main())

    assert cold.greedy(prompt, 4) == tokens_of(chunks)
    assert {"dp_rank": 0, "transferred_tokens": 0}.items() <= chunks[0][WORKER_ONLY].items()


def test_two_prefill_and_two_decode_engines_serve_one_another(small: Path, cold: Cold) -> None:
    async def main() -> None:
        async with running_pair(small) as one, running_pair(small) as other:
            for source, sink, seed in ((one, other, 1), (other, one, 2), (other, other, 3)):
                request = request_for(prompt_of(100, seed), 4)
                chunk = await source.prefilled(request)
                answer = await collect(sink.decode, handed_over(request, chunk))
                assert cold.greedy(prompt_of(100, seed), 4) == tokens_of(answer)
            assert [1.0, 2.0] == [pair.decode.stats()["transfers"] for pair in (one, other)]

    run_async(main())


@pytest.mark.parametrize("rule", ["trtllm_v2", "trtllm_v1", "trtllm_v1_contiguous"])
def test_every_rule_can_hand_over(small: Path, cold: Cold, rule: str) -> None:
    prompts = [prompt_of(90), prompt_of(90) + prompt_of(40, 1), prompt_of(61, 2), prompt_of(90)]
    options = with_options(reuse_rule=rule)

    answers = joined(
        small, *(request_for(p, 5) for p in prompts), prefill_options=options, decode_options=options
    )

    assert [cold.greedy(prompt, 5) for prompt in prompts] == [tokens_of(chunks) for chunks in answers]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"disaggregated_params": {"kind": "trtllm"}}, "prefill_result.disaggregated_params: expected"),
        ({"disaggregated_params": []}, "expected what a gemma3_cpu prefill worker sends"),
    ],
)
def test_what_no_prefill_worker_of_ours_sent_is_refused(
    small: Path, result: dict[str, Any], message: str
) -> None:
    async def main() -> None:
        async with running_pair(small) as pair:
            with pytest.raises(InvalidRequest, match=message):
                await collect(pair.decode, {**request_for(prompt_of(9)), "prefill_result": result})
            with pytest.raises(InvalidRequest, match="prefill_result: expected none in mode prefill"):
                await collect(pair.prefill, {**request_for(prompt_of(9)), "prefill_result": result})

    run_async(main())


def test_pages_that_fit_two_windows_can_be_handed_over(small: Path, cold: Cold) -> None:
    """One cache group for both windows of the model: a page has the layers of both."""
    options = {**with_options(), "max_seq_len": 256}
    options["kv_cache_config"] = {"tokens_per_block": BLOCK, "max_attention_window": [256]}

    [chunks] = joined(small, request_for(prompt_of(90), 4), prefill_options=options, decode_options=options)

    assert cold.greedy(prompt_of(90), 4) == tokens_of(chunks)
