"""The whole vertical: Dynamo's real frontend over HTTP, real workers, a real model, events on a real NATS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from tests.conftest import Run
from tests.e2e_helpers import (
    TextModel,
    apart,
    beside,
    engine_metric,
    eventually,
    get,
    long_prompt,
    metric,
    post,
    recording,
    status_url,
    stream,
)
from vswa_plugin import __version__
from vswa_plugin.blocks.hashing import block_hashes, sequence_hashes
from vswa_plugin.engine.contract import ChunkDict, EngineSettings
from vswa_plugin.launch.cluster import Cluster
from vswa_plugin.launch.topologies import WorkerGroup
from vswa_plugin.wire.events import Layout, Removed, Stored

GREEDY = {"model": "gemma", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def text_model(model_dir: Path) -> TextModel:
    return TextModel(model_dir)


def directly(model_dir: Path, token_ids: list[int], max_tokens: int) -> list[int]:
    """What the engine itself generates, greedily, without Dynamo."""
    from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine

    engine = Gemma3CpuEngine(EngineSettings("gemma3_cpu", "agg", str(model_dir), "gemma"))
    engine.start(lambda *_: None)

    async def generated() -> list[int]:
        request = {
            "token_ids": token_ids,
            "stop_conditions": {"max_tokens": max_tokens, "ignore_eos": True},
            "sampling_options": {"temperature": 0},
        }
        chunks = cast("AsyncIterator[ChunkDict]", engine.generate(request))
        return [token async for chunk in chunks for token in chunk["token_ids"]]

    try:
        return asyncio.run(generated())
    finally:
        engine.stop()


def test_the_frontend_answers_what_the_engine_generates_streamed_or_not(
    run: Run[Any], cluster: Cluster, model_dir: Path, text_model: TextModel
) -> None:
    prompt = long_prompt("alpha")
    body = {**GREEDY, "prompt": prompt, "max_tokens": 24}
    expected = text_model.text(directly(model_dir, text_model.ids(prompt), 24))

    async def streamed() -> str:
        parts = [
            c["text"] async for chunk in stream(cluster, "/v1/completions", body) for c in chunk["choices"]
        ]
        assert len(parts) > 5, "expected a stream, got a lump"
        return "".join(parts)

    status, whole = run(post(cluster, "/v1/completions", body))

    assert status == 200
    assert whole["usage"]["prompt_tokens"] == len(text_model.ids(prompt)) > 600
    assert whole["usage"]["completion_tokens"] == 24
    assert whole["choices"][0]["text"] == expected
    assert run(streamed()) == expected


def test_chat_goes_through_the_checkpoints_own_template(run: Run[Any], cluster: Cluster) -> None:
    messages = [{"role": "user", "content": "How do you do?"}]
    status, answer = run(
        post(cluster, "/v1/chat/completions", {**GREEDY, "messages": messages, "max_tokens": 5})
    )

    assert status == 200
    assert answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] > 10


def test_a_repeated_prompt_is_resumed_and_says_so(
    run: Run[Any], cluster: Cluster, text_model: TextModel
) -> None:
    prompt = long_prompt("resumed")
    body = {**GREEDY, "prompt": prompt, "max_tokens": 8}
    answers = [run(post(cluster, "/v1/completions", body))[1] for _ in range(4)]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    most = len(text_model.ids(prompt)) - 1

    assert sorted(cached) == [0, 0, most, most], "two workers in turn: each sees it cold once"
    assert len({a["choices"][0]["text"] for a in answers}) == 1, "a resumed prompt gives the same text"


def test_the_events_of_every_window_name_the_prompts_blocks_by_dynamos_hashes(
    run: Run[Any], cluster: Cluster, text_model: TextModel
) -> None:
    from dynamo.llm import compute_block_hash_for_seq

    prompt = long_prompt("hashes", 45)
    ids = text_model.ids(prompt)
    expected = sequence_hashes(compute_block_hash_for_seq(ids, 32))
    assert expected == sequence_hashes(block_hashes(ids, 32))

    async def body() -> list[Any]:
        async with recording(cluster) as recorded:
            await eventually(lambda: recorded.batches, "a heartbeat")
            await post(cluster, "/v1/completions", {**GREEDY, "prompt": prompt, "max_tokens": 3})
            await recorded.settled()
            return recorded.events(Stored)

    stored = run(body())
    by_group = {group: {} for group in (0, 1)}  # type: ignore[var-annotated]
    for event in stored:
        for offset, value in enumerate(event.sequence_hashes):
            by_group[event.group_id][event.position + offset] = value

    for group, blocks in by_group.items():
        assert [blocks[position] for position in sorted(blocks)] == expected, f"group {group}"
    assert all(event.parent_hash == expected[event.position - 1] for event in stored if event.position)


def test_requests_at_the_same_time_get_what_they_get_alone(run: Run[Any], cluster: Cluster) -> None:
    bodies = [{**GREEDY, "prompt": long_prompt(f"crowd {n % 3}", 30), "max_tokens": 12} for n in range(9)]

    async def together() -> list[str]:
        answers = await asyncio.gather(*(post(cluster, "/v1/completions", body) for body in bodies))
        return [answer["choices"][0]["text"] for _, answer in answers]

    alone = [run(post(cluster, "/v1/completions", body))[1]["choices"][0]["text"] for body in bodies]

    assert run(together()) == alone


def test_a_client_that_goes_frees_what_its_request_held(run: Run[Any], cluster: Cluster) -> None:
    async def body() -> None:
        request = {**GREEDY, "prompt": long_prompt("leaver"), "max_tokens": 3_000}
        before = [await metric(w, "vswa_worker_requests_total", outcome="cancelled") for w in cluster.workers]
        async with aclosing(stream(cluster, "/v1/completions", request)) as chunks:
            await anext(chunks)

        async def cancelled_and_idle() -> bool:
            now = [
                await metric(w, "vswa_worker_requests_total", outcome="cancelled") for w in cluster.workers
            ]
            running = [await engine_metric(w, "running") for w in cluster.workers]
            return sum(now) == sum(before) + 1 and sum(running) == 0

        await eventually(cancelled_and_idle, "the request counted as cancelled and nothing running")

    run(body())


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"prompt": "word " * 9_000}, 400, "8192"),
        ({"prompt": "hi", "n": 2}, 400, "n"),
        ({"prompt": "hi", "echo": True, "logprobs": 1}, 400, "prompt_logprobs (or echo): expected none"),
        ({"prompt": "hi", "prompt_logprobs": 0}, 400, "prompt_logprobs (or echo): expected none"),
        ({"prompt": "hi", "guided_regex": "("}, 400, "guided_regex: expected a format that can be kept"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_with_the_reason(
    run: Run[Any], cluster: Cluster, change: dict[str, Any], status: int, message: str
) -> None:
    got, answer = run(post(cluster, "/v1/completions", {**GREEDY, "max_tokens": 4, **change}))

    assert got == status, answer
    assert message in str(answer)


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Ulm", "Trier"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}


async def chatted(cluster: Cluster, **change: Any) -> dict[str, Any]:
    """The only choice of a chat."""
    body = {**GREEDY, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, **change}
    status, answer = await post(cluster, "/v1/chat/completions", {**body, "ignore_eos": False})
    assert status == 200, answer
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def test_a_response_format_is_kept(run: Run[Any], cluster: Cluster) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
    choice = run(chatted(cluster, response_format=format_))

    assert json.loads(choice["message"]["content"])["city"] in ("Ulm", "Trier")
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "demanded", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["required", "named"]
)
def test_a_tool_that_is_demanded_is_called(run: Run[Any], cluster: Cluster, demanded: Any) -> None:
    choice = run(chatted(cluster, tools=[TOOL], tool_choice=demanded))
    called = choice["message"]["tool_calls"][0]["function"]

    assert called["name"] == "weather"
    assert json.loads(called["arguments"])["city"] in ("Ulm", "Trier")


def test_stop_strings_end_the_answer_early(run: Run[Any], cluster: Cluster) -> None:
    # Dynamo's frontend looks for stop strings only where eos is not ignored.
    body = {**GREEDY, "prompt": long_prompt("stopper", 10), "max_tokens": 40, "ignore_eos": False}

    async def pieces() -> list[str]:
        return [
            c["text"] async for chunk in stream(cluster, "/v1/completions", body) for c in chunk["choices"]
        ]

    parts = run(pieces())
    text = "".join(parts)
    stop = parts[20]  # Dynamo looks for stop strings from the beginning of a token on
    _, cut = run(post(cluster, "/v1/completions", {**body, "stop": [stop]}))

    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"


def test_seeded_sampling_repeats_and_differs_from_greedy(run: Run[Any], cluster: Cluster) -> None:
    body = {**GREEDY, "prompt": long_prompt("dice", 10), "max_tokens": 16}
    sampled = {**body, "temperature": 1.5, "top_p": 0.95, "seed": 7}
    texts = [
        run(post(cluster, "/v1/completions", each))[1]["choices"][0]["text"]
        for each in (sampled, sampled, body)
    ]

    assert texts[0] == texts[1] != texts[2]


def test_a_worker_tells_its_health_and_counts_per_window(run: Run[Any], cluster: Cluster) -> None:
    async def body() -> tuple[list[int], str]:
        await post(cluster, "/v1/completions", {**GREEDY, "prompt": long_prompt("metrics"), "max_tokens": 2})
        url = await status_url(cluster.workers[0])
        answers = [await get(f"{url}/{path}") for path in ("health", "ready", "metrics")]
        return [status for status, _ in answers], answers[2][1]

    statuses, text = run(body())

    assert statuses == [200, 200, 200]
    for name in (
        'vswa_resident_blocks{dp_rank="0",window="512"}',
        'vswa_resident_blocks{dp_rank="0",window="global"}',
        'vswa_publisher_batches_total{dp_rank="0"}',
        'vswa_engine_running{dp_rank="0"}',
        'vswa_publisher_snapshots_total{dp_rank="0"}',
        'vswa_publisher_unattributed_blocks_total{dp_rank="0"}',
    ):
        assert name in text


def test_the_registry_holds_what_a_router_needs_to_know(run: Run[Any], cluster: Cluster) -> None:
    entries = [entry for entry in run(cluster.entries()) if entry.namespace == "e2e"]

    assert len(entries) == 2
    for entry in entries:
        assert [group.window_size for group in entry.groups] == [512, None]
        assert (entry.rule, entry.block_size, entry.context_length) == ("trtllm_v2", 32, 8192)
        assert list(entry.epochs) == [0]
        assert (entry.engine, entry.engine_version, entry.version) == ("gemma3_cpu", __version__, __version__)
        assert entry.status_url is not None and entry.status_url.startswith("http://127.0.0.1:")


def test_each_rank_has_an_epoch_and_a_stream_of_its_own(run: Run[Any], cluster: Cluster) -> None:
    async def body() -> tuple[list[int], set[int]]:
        async with beside(cluster, "ranks", WorkerGroup()) as made, recording(made) as recorded:
            two = await made.add_worker(options=("--data-parallel-size", "2"))
            (entry,) = [each for each in await made.entries() if each.pid == two.pid]

            def ranks() -> set[int]:
                return {s.dp_rank for _, s, _ in recorded.batches if s.worker_id == entry.worker_id}

            await eventually(lambda: len(ranks()) == 2, "heartbeats of both ranks")
            return sorted(entry.epochs), ranks()

    assert run(body()) == ([0, 1], {0, 1})


def test_sigterm_drains_leaves_and_exits_0(run: Run[Any], cluster: Cluster) -> None:
    """A worker of its own namespace, so that all requests reach it."""

    async def body() -> tuple[int, str, int]:
        alone = apart(cluster, "drain", WorkerGroup())
        await alone.start()
        worker = alone.workers[0]
        pieces: list[str] = []
        request = {**GREEDY, "prompt": long_prompt("drain"), "max_tokens": 150}
        async for chunk in stream(alone, "/v1/completions", request):
            pieces += [choice["text"] for choice in chunk["choices"]]
            if len(pieces) == 5:
                worker.terminate()
                await eventually(
                    lambda: _left(alone), "the worker out of the registry while its request goes on"
                )
        code = await asyncio.wait_for(worker.wait(), 20)
        usage = chunk["usage"]["completion_tokens"]
        log = worker.log_path.read_text()
        await alone.stop()
        return code, log, usage

    code, log, generated = run(body())

    assert (code, generated) == (0, 150), log
    assert "stopping: no new requests, waiting for 1 under way" in log


def test_an_answer_that_a_stopping_worker_does_not_finish_is_no_success(
    run: Run[Any], cluster: Cluster
) -> None:
    """A second signal ends the draining; there is no other worker that could go on."""

    async def body() -> tuple[list[int], list[str], int]:
        alone = apart(cluster, "hurried", WorkerGroup(override={"gemma3_cpu": {"debug_step_delay_s": 0.02}}))
        await alone.start()
        worker, codes, reasons, pieces = alone.workers[0], [], [], 0
        request = {**GREEDY, "prompt": long_prompt("hurried"), "max_tokens": 1_000, "ignore_eos": True}
        async for chunk in stream(alone, "/v1/completions", request):
            codes += [chunk["error"]["code"]] if "error" in chunk else []
            for choice in chunk.get("choices", ()):
                pieces += 1
                reasons += [choice["finish_reason"]] if choice.get("finish_reason") else []
            if pieces == 5 and "choices" in chunk:  # and not at the error, which comes as a piece too
                worker.terminate()
                await eventually(lambda: _left(alone), "the worker out of the registry")
                worker.terminate()
        code = await asyncio.wait_for(worker.wait(), 20)
        await alone.stop()
        return codes, reasons, code

    assert ([503], [], 0) == run(body())


async def _left(cluster: Cluster) -> bool:
    return not [entry for entry in await cluster.entries() if entry.namespace == cluster.settings.namespace]


def test_a_step_of_five_seconds_delays_no_heartbeat(run: Run[Any], cluster: Cluster) -> None:
    async def body() -> tuple[list[float], list[Any]]:
        alone = apart(cluster, "slow", WorkerGroup(override={"gemma3_cpu": {"debug_step_delay_s": 5.0}}))
        async with recording(alone) as recorded:
            await alone.start()
            await eventually(lambda: recorded.batches, "the first batch")
            before = len(recorded.batches)
            status, _ = await post(alone, "/v1/completions", {**GREEDY, "prompt": "hi", "max_tokens": 1})
            assert status == 200
            during = [at for at, _, batch in recorded.batches[before - 1 :] if not batch.events]
            await alone.stop()
            return during, recorded.events(Layout)

    beats, layouts = run(body())
    pauses = [later - earlier for earlier, later in pairwise(beats)]

    assert len(layouts) == 1
    assert len(beats) >= 4, "one each second"
    assert max(pauses) < 2.0


def test_a_small_sliding_pool_evicts_and_the_wire_says_so(run: Run[Any], cluster: Cluster) -> None:
    """What remains per window, by the wire, is what the worker itself says it holds."""

    async def body() -> tuple[dict[str, int], dict[str, float], int]:
        pools = {"gemma3_cpu": {"kv_blocks": {"512": 64, "global": 128}}}
        alone = apart(cluster, "evict", WorkerGroup(override=pools))
        async with recording(alone) as recorded:
            await alone.start()
            for number in range(8):
                body = {**GREEDY, "prompt": long_prompt(f"evict {number % 5}"), "max_tokens": 4}
                status, _ = await post(alone, "/v1/completions", body)
                assert status == 200
            await recorded.settled()
            worker = alone.workers[0]
            said = {
                window: await metric(worker, "vswa_resident_blocks", window=window)
                for window in ("512", "global")
            }
            await alone.stop()
        held: dict[int, set[int]] = {0: set(), 1: set()}
        for _, _, batch in recorded.batches:
            for event in batch.events:
                if isinstance(event, Stored):
                    assert not held[event.group_id] & set(event.sequence_hashes)
                    held[event.group_id] |= set(event.sequence_hashes)
                elif isinstance(event, Removed):
                    assert set(event.sequence_hashes) <= held[event.group_id]
                    held[event.group_id] -= set(event.sequence_hashes)
        removed = {e.group_id for e in recorded.events(Removed) if isinstance(e, Removed)}
        return {"512": len(held[0]), "global": len(held[1])}, said, len(removed)

    held, said, groups_with_removals = run(body())

    assert held == said
    assert 0 < held["512"] <= 64
    assert 0 < held["global"] <= 128
    assert groups_with_removals == 2
