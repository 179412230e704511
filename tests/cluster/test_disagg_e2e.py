"""Prefill and decode workers behind Dynamo's own PrefillRouter: real processes, real transfers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest

from tests.conftest import Run
from tests.e2e_helpers import beside, engine_metric, eventually, long_prompt, post, recording, stream
from vswa_plugin.launch.cluster import Cluster
from vswa_plugin.launch.processes import Child
from vswa_plugin.launch.topologies import WorkerGroup
from vswa_plugin.wire.events import Source, Stored

GREEDY = {"model": "gemma", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def disagg(run: Run[Any], cluster: Cluster) -> Iterator[Cluster]:
    """One prefill and one decode worker."""
    stack = AsyncExitStack()
    started = stack.enter_async_context(
        beside(cluster, "disagg", WorkerGroup("prefill"), WorkerGroup("decode"))
    )
    try:
        yield run(started)
    finally:
        run(stack.aclose())


def workers(cluster: Cluster, mode: str) -> list[Child]:
    return [worker for worker in cluster.workers if worker.name.startswith(mode)]


async def gauge(cluster: Cluster, mode: str, name: str) -> float:
    """One gauge of the engines, summed over the workers of ``mode``."""
    return sum([await engine_metric(each, name) for each in workers(cluster, mode)])


async def until(cluster: Cluster, mode: str, name: str, value: float) -> None:
    async def reached() -> bool:
        return await gauge(cluster, mode, name) == value

    await eventually(reached, f"{name} of {mode} workers at {value:g}", 20)


async def complete(cluster: Cluster, prompt: str, max_tokens: int = 12, **more: Any) -> tuple[str, int]:
    """Text and cached tokens of one request that must be answered."""
    body = {**GREEDY, "prompt": prompt, "max_tokens": max_tokens, **more}
    status, answer = await post(cluster, "/v1/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


# -- one of each ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [1, 21, 40, 120])
def test_the_text_is_that_of_an_aggregated_worker(
    run: Run[Any], cluster: Cluster, disagg: Cluster, lines: int
) -> None:
    prompt = long_prompt(f"same {lines}", lines)

    async def streamed() -> str:
        body = {**GREEDY, "prompt": prompt, "max_tokens": 20}
        chunks = stream(disagg, "/v1/completions", body)
        return "".join([choice["text"] async for chunk in chunks for choice in chunk["choices"]])

    alone = run(complete(cluster, prompt, 20))[0]

    assert run(complete(disagg, prompt, 20))[0] == alone
    assert run(streamed()) == alone, "resumed on both sides"


def test_a_conversation_reuses_the_prompt_at_prefill_and_its_usage_says_so(
    run: Run[Any], disagg: Cluster
) -> None:
    messages = [{"role": "user", "content": long_prompt("talk")}]
    body = {**GREEDY, "messages": messages, "max_tokens": 6}
    _, first = run(post(disagg, "/v1/chat/completions", body))
    said = first["choices"][0]["message"]
    messages += [{"role": "assistant", "content": said["content"]}, {"role": "user", "content": "And then?"}]
    _, second = run(post(disagg, "/v1/chat/completions", body))
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (first, second)]
    prompt = first["usage"]["prompt_tokens"]

    assert cached[0] < 32
    assert prompt - 32 < cached[1] <= prompt


def test_only_the_last_window_of_sliding_layers_is_moved_and_nothing_stays_held(
    run: Run[Any], disagg: Cluster
) -> None:
    async def moved(prompt: str) -> tuple[float, float]:
        before = [await gauge(disagg, "decode", f"transfer_bytes_{window}") for window in ("512", "global")]
        await complete(disagg, prompt, 2)
        after = [await gauge(disagg, "decode", f"transfer_bytes_{window}") for window in ("512", "global")]
        await until(disagg, "prefill", "transfers_held", 0)
        return after[0] - before[0], after[1] - before[1]

    short, long = (run(moved(long_prompt(f"moved {n}", n))) for n in (40, 160))

    assert long[1] > 3 * short[1], "every global block"
    assert long[0] <= short[0] + short[0] / 16, "one window, whatever its edges"
    assert run(moved(long_prompt("moved 40", 40)))[1] <= short[1] / 16, "what decode holds is not moved again"


def test_a_decode_worker_announces_what_it_received(run: Run[Any], disagg: Cluster) -> None:
    async def body() -> dict[str, dict[int, set[int]]]:
        async with recording(disagg) as recorded:
            await eventually(lambda: len({s for _, s, _ in recorded.batches}) == 2, "heartbeats of both")
            await complete(disagg, long_prompt("announced", 60), 2)
            await recorded.settled()
            held: dict[str, dict[int, set[int]]] = {}
            for _, source, batch in recorded.batches:
                assert isinstance(source, Source)
                for event in batch.events:
                    if isinstance(event, Stored):
                        groups = held.setdefault(source.component, {0: set(), 1: set()})
                        groups[event.group_id].update(event.sequence_hashes)
            return held

    held = run(body())

    assert held["backend"][1] == held["prefill"][1], "every global block of the prompt"
    assert held["backend"][0] < held["prefill"][0], "of the sliding window the last blocks only"
    assert 15 <= len(held["backend"][0]) <= 17


def test_registry_entries_say_which_phase_a_worker_does(run: Run[Any], disagg: Cluster) -> None:
    entries = [entry for entry in run(disagg.entries()) if entry.namespace == disagg.settings.namespace]

    assert {(entry.component, entry.mode) for entry in entries} == {
        ("backend", "decode"),
        ("prefill", "prefill"),
    }


@pytest.mark.parametrize("where", [{"nvext": {"cache_salt": "a"}}, {"cache_salt": "b"}])
def test_a_cache_salt_keeps_a_tenants_blocks_to_itself(
    run: Run[Any], disagg: Cluster, where: dict[str, Any]
) -> None:
    prompt = long_prompt(f"salted {where}")

    async def body() -> list[int]:
        salts: list[dict[str, Any]] = [{}, where, where, {}]
        return [(await complete(disagg, prompt, 2, **salt))[1] for salt in salts]

    plain, salted, again, plain_again = run(body())

    assert plain < 32
    assert salted < 32, "blocks without the salt are not shared with it"
    assert again == plain_again > 600


def test_a_client_that_goes_leaves_nothing_held(run: Run[Any], disagg: Cluster) -> None:
    async def body() -> None:
        request = {**GREEDY, "prompt": long_prompt("leaver"), "max_tokens": 3_000}
        async with aclosing(stream(disagg, "/v1/completions", request)) as chunks:
            await anext(chunks)
            await until(disagg, "decode", "running", 1)
        for mode in ("prefill", "decode"):
            await until(disagg, mode, "running", 0)
            await until(disagg, mode, "transfers_held", 0)

    run(body())


# -- failures ------------------------------------------------------------------------------------------

#: One request at a time, slowly: the next one waits with its prompt held by the prefill worker.
ONE_AT_A_TIME = {"max_batch_size": 1, "gemma3_cpu": {"debug_step_delay_s": 0.05}}


def test_a_prefill_worker_that_is_killed_while_it_hands_over_costs_a_computation_and_no_answer(
    run: Run[Any], cluster: Cluster
) -> None:
    prompt = long_prompt("victim")
    alone = run(complete(cluster, prompt))[0]

    async def body() -> tuple[str, float, list[int]]:
        groups = WorkerGroup("prefill"), WorkerGroup("decode", override=ONE_AT_A_TIME)
        async with beside(cluster, "killed", *groups) as made:
            (prefill,) = workers(made, "prefill")
            busy = asyncio.create_task(complete(made, "short", 2_000))
            await until(made, "decode", "running", 1)
            asked = asyncio.create_task(complete(made, prompt))
            await until(made, "decode", "waiting", 1)
            await until(made, "prefill", "transfers_held", 1)
            # Stopped, it accepts the decode worker's connection and says nothing: the transfer is under way.
            os.kill(prefill.pid, signal.SIGSTOP)
            busy.cancel()
            (decode,) = workers(made, "decode")

            async def under_way() -> bool:
                return await engine_metric(decode, "transfers_held") == 1

            try:
                await eventually(under_way, "the transfer under way")
            finally:
                prefill.kill()
            text = (await asked)[0]
            failures = await engine_metric(decode, "transfer_failures")
            statuses = [(await post(made, "/v1/completions", {**GREEDY, "prompt": "x"}))[0]]
            made.workers.remove(prefill)
            await made.add_worker(made.settings.groups[0])
            await eventually(lambda: _serves(made), "a new prefill worker serves", 40)
            return text, failures, statuses

    text, failures, statuses = run(body())

    assert (text, failures) == (alone, 1)
    assert statuses == [503], "without a prefill worker requests are refused, not lost"


async def _serves(cluster: Cluster) -> bool:
    body = {**GREEDY, "prompt": "Hello", "max_tokens": 2}
    return (await post(cluster, "/v1/completions", body))[0] == 200


def test_two_of_each_serve_a_crowd_and_outlive_a_decode_worker(run: Run[Any], cluster: Cluster) -> None:
    """While one request is half answered its decode worker is killed: the other one finishes it."""
    crowd = [long_prompt(f"crowd {n % 5}", 25 + 5 * (n % 3)) for n in range(16)]
    victim = long_prompt("migrant")
    slow = {"gemma3_cpu": {"debug_step_delay_s": 0.03}}

    async def alone() -> list[str]:
        return [(await complete(cluster, prompt, 10))[0] for prompt in crowd]

    async def body() -> tuple[list[str], str, int]:
        groups = WorkerGroup("prefill", 2), WorkerGroup("decode", 2, override=slow)
        async with beside(cluster, "crowd", *groups) as made:
            together = await asyncio.gather(*(complete(made, prompt, 10) for prompt in crowd))
            for mode in ("prefill", "decode"):
                await until(made, mode, "running", 0)
                await until(made, mode, "transfers_held", 0)
                for worker in workers(made, mode):
                    assert await engine_metric(worker, "requests") > 0, worker.name
            assert await gauge(made, "decode", "transfer_failures") == 0
            text, codes = await _kill_decode_half_way(made, victim)
            await made.add_worker(made.settings.groups[1])
            await eventually(lambda: _serves(made), "a new decode worker serves", 40)
            return [text for text, _ in together], text, codes

    expected, expected_victim = run(alone()), run(complete(cluster, victim, 40))[0]
    texts, text, tokens = run(body())

    assert texts == expected
    assert (text, tokens) == (expected_victim, 40)


def test_a_lone_decode_worker_that_is_killed_ends_its_requests_with_an_error_and_a_new_one_serves(
    run: Run[Any], cluster: Cluster
) -> None:
    async def body() -> None:
        slow = {"gemma3_cpu": {"debug_step_delay_s": 0.03}}
        async with beside(
            cluster, "lonely", WorkerGroup("prefill"), WorkerGroup("decode", override=slow)
        ) as made:
            with pytest.raises(AssertionError, match="Service temporarily unavailable"):
                await _kill_decode_half_way(made, long_prompt("lonely"))
            await made.add_worker(made.settings.groups[1])
            await eventually(lambda: _serves(made), "a new decode worker serves", 40)

    run(body())


async def _kill_decode_half_way(cluster: Cluster, prompt: str) -> tuple[str, int]:
    """Text and tokens of a streamed answer whose decode worker is killed after 10 tokens."""
    parts: list[str] = []
    tokens = 0
    async for chunk in stream(cluster, "/v1/completions", {**GREEDY, "prompt": prompt, "max_tokens": 40}):
        assert "error" not in chunk, chunk
        parts += [choice["text"] for choice in chunk["choices"]]
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        if len(parts) == 10:
            for worker in workers(cluster, "decode"):
                if await engine_metric(worker, "running"):
                    worker.kill()
                    cluster.workers.remove(worker)
    return "".join(parts), tokens
