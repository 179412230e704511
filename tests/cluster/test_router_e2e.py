"""The whole front door: Dynamo's frontend, the router, echo workers, events on a real NATS."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually
from tests.router_helpers import Stack, logged, prompt_of


@pytest.fixture(scope="module")
def stack(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("router"), brokers.env, model_dir, "routed")

    async def start() -> None:
        await asyncio.gather(
            made.start("--log-level", "debug"),
            made.echo(),
            made.echo(),
            made.echo("second", "other", dp=2),
        )
        await made.echo(block_size=32)
        await made.shows("gemma", "second")

    try:
        run(start())
        yield made
    finally:
        codes = run(made.stop())
    assert {code for name, code in codes.items() if name not in made.killed} == {0}, codes


def test_a_repeated_prompt_goes_where_it_is_cached_and_reuses_what_was_promised(
    run: Run[Any], stack: Stack
) -> None:
    async def body() -> list[int]:
        cached = []
        for _ in range(4):
            status, answer = await stack.ask(prompt_of("again"))
            assert status == 200
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        return cached

    cached = run(body())
    promised = logged(stack.routers[0], r"promises (\d+) of \d+ tokens")

    assert cached[0] == 0
    assert cached[1:] == [cached[1]] * 3
    assert cached[1] > 300
    assert [int(tokens) for tokens in promised[-4:]] == cached


@pytest.mark.parametrize(
    ("wish", "status", "message"),
    [("invalid", 400, "the echo refuses this prompt"), ("full", 503, ""), ("broken", 500, "")],
)
def test_a_workers_refusal_reaches_the_client(
    run: Run[Any], stack: Stack, wish: str, status: int, message: str
) -> None:
    got, answer = run(stack.ask(prompt_of(wish), wish))

    assert got == status
    assert message in answer["message"]


def test_a_client_that_goes_stops_the_worker(run: Run[Any], stack: Stack) -> None:
    def stopped() -> int:
        return sum(len(echo.said("stopped")) for echo in stack.echoes)

    async def body() -> None:
        before = stopped()
        async with aclosing(stack.stream(prompt_of("leaver"), "hang")) as pieces:
            await anext(pieces)
            assert before == stopped()
        await eventually(lambda: stopped() > before, "the worker is told")

    run(body())


def test_chunks_come_one_by_one(run: Run[Any], stack: Stack) -> None:
    async def body() -> list[float]:
        began = time.monotonic()
        paced = stack.stream(prompt_of("paced"), "pace:0.05", max_tokens=8)
        return [time.monotonic() - began async for _ in paced]

    came = run(body())

    assert came[0] < 0.2
    assert came[-1] > 0.35


# In this order: a frozen worker has left the registry before the other one dies.
@pytest.mark.parametrize("how", ["freeze", "die"])
def test_a_worker_that_is_lost_in_a_stream_is_not_noticed_by_the_client(
    run: Run[Any], stack: Stack, how: str
) -> None:
    async def body() -> tuple[str, str]:
        undisturbed = "".join([p async for p in stack.stream(prompt_of("survivor"), max_tokens=40)])
        (stack.folder / "die").touch()
        text = "".join([p async for p in stack.stream(prompt_of("survivor"), f"{how}:9", max_tokens=40)])
        assert not (stack.folder / "die").exists()
        replacement = await stack.replace_the_dead()
        await stack.used(lambda: bool(replacement.said("request")))
        return undisturbed, text

    undisturbed, text = run(body())

    assert text == undisturbed
    assert len(text) > 40


def test_a_new_worker_is_used_within_a_second_and_leaves_without_costing_a_request(
    run: Run[Any], stack: Stack
) -> None:
    async def body() -> tuple[float, list[int]]:
        added = await stack.echo()
        statuses: list[int] = []

        async def keep_asking() -> None:
            while True:
                statuses.append((await stack.ask(prompt_of(f"steady{len(statuses)}-", 20)))[0])

        began = time.monotonic()
        asking = asyncio.create_task(keep_asking())
        await eventually(lambda: added.said("request"), "the worker is used")
        took = time.monotonic() - began
        pieces: list[list[str]] = [[] for _ in range(6)]

        async def slow(number: int) -> None:
            async for piece in stack.stream(prompt_of(f"slow{number}"), "pace:0.05", max_tokens=40):
                pieces[number].append(piece)

        streams = [asyncio.create_task(slow(number)) for number in range(len(pieces))]
        await eventually(lambda: all(pieces), "slow streams on all workers")
        assert await added.child.stop() == 0
        await asyncio.gather(*streams)
        assert not logged(stack.routers[0], rf"worker {added.worker_id} .*sends no heartbeats")
        after = len(statuses)
        await eventually(lambda: len(statuses) > after + 3, "requests after it has gone")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return took, statuses

    took, statuses = run(body())

    assert took < 1.0
    assert set(statuses) == {200}


def test_further_models_are_shown_wait_for_their_workers_and_ranks_are_chosen(
    run: Run[Any], stack: Stack
) -> None:
    second = stack.echo_of("second")

    async def body() -> None:
        prompts = [prompt_of("one", 150), prompt_of("two", 120)]
        asked = [stack.ask(prompt, "pace:0.05", model="second") for prompt in prompts]
        assert {status for status, _ in await asyncio.gather(*asked)} == {200}
        for prompt in prompts:
            await stack.ask(prompt, model="second")

        async def answers(status: int) -> bool:
            return bool((await stack.ask(prompt_of("three"), model="second"))[0] == status)

        await second.child.stop()
        await eventually(lambda: answers(503), "no worker of it is left")
        assert await stack.models() == ["gemma", "second"]
        await stack.echo("second", "other")
        await eventually(lambda: answers(200), "it is served again")

    run(body())
    requests = second.said("request")

    assert sorted(each["dp_rank"] for each in requests[:2]) == [0, 1]
    assert {each["prompt"]: each["dp_rank"] for each in requests[:2]} == {
        each["prompt"]: each["dp_rank"] for each in requests[2:4]
    }
    assert all(each["cached"] > 100 for each in requests[2:4])


def test_a_worker_with_another_block_size_is_reported_and_not_used(run: Run[Any], stack: Stack) -> None:
    odd = stack.echo_of(block_size=32)
    for number in range(6):
        assert run(stack.ask(prompt_of(f"odd{number}-", 20)))[0] == 200

    assert f"worker {odd.worker_id} is not used: expected block size 16" in stack.routers[0].log()
    assert not odd.said("request")


def test_sigterm_drains_while_another_replica_takes_over(run: Run[Any], stack: Stack) -> None:
    async def body() -> tuple[str, int, list[int]]:
        first = stack.routers[0]
        streaming = asyncio.create_task(
            _joined(stack.stream(prompt_of("drained"), "pace:0.05", max_tokens=30))
        )
        await eventually(lambda: "promises" in first.log().splitlines()[-1], "the stream is under way")
        second = await stack.router("--log-level", "debug")
        await stack.used(lambda: "promises" in second.log())
        stopping = asyncio.create_task(first.stop(20))
        statuses = []
        while not stopping.done():
            statuses.append((await stack.ask(prompt_of(f"meanwhile{len(statuses)}-", 20)))[0])
        return await streaming, await stopping, statuses

    text, code, statuses = run(body())

    assert "model 'gemma' is not shown any more" in stack.routers[0].log()
    assert len(text) >= 30
    assert code == 0
    assert set(statuses) == {200}


async def _joined(pieces: Any) -> str:
    return "".join([piece async for piece in pieces])
