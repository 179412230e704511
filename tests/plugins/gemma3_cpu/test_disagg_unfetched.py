"""Finished prompts that no decode worker fetches: who frees them, when, what a late decode worker gets."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.serving import disagg
from vswa_plugins.gemma3_cpu.serving.contract import Contract
from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine

from tests.gemma3_disagg_helpers import Pair, handed_over, nothing_leaks, running_pair, until, with_options
from tests.gemma3_engine_helpers import (
    Cold,
    collect,
    prompt_of,
    request_for,
    run_async,
    settings_for,
    tokens_of,
)
from tests.gemma3_engine_helpers import cold as cold
from tests.gemma3_engine_helpers import model as model
from tests.gemma3_engine_helpers import small as small
from vswa_plugin.engine.contract import WORKER_ONLY
from vswa_plugin.errors import InvalidRequest

PROMPT_TOKENS = 200
NEVER_S = 60.0


def pools(prompts: int, patience_s: float) -> dict[str, Any]:
    """The prefill side has room for so many prompts at once, and would keep them for a minute."""
    blocks = 30 * prompts
    return with_options(
        kv_blocks={32: blocks, "global": blocks}, transfer_timeout_s=NEVER_S, transfer_patience_s=patience_s
    )


def request(seed: int) -> dict[str, Any]:
    return request_for(prompt_of(PROMPT_TOKENS, seed), 4)


def held(pair: Pair) -> dict[str, float]:
    names = ("held", "expired", "released", "displaced")
    return {name: value for name in names if (value := pair.prefill.stats()[f"transfers_{name}"])}


async def computed_late(pair: Pair, seed: int, chunk: dict[str, Any], cold: Cold) -> None:
    """A decode worker that comes too late computes the prompt itself, with the same answer."""
    chunks = await collect(pair.decode, handed_over(request(seed), chunk))
    assert cold.greedy(prompt_of(PROMPT_TOKENS, seed), 4) == tokens_of(chunks)
    assert 0 == chunks[0][WORKER_ONLY]["transferred_tokens"]


# -- released: somebody knows ----------------------------------------------------------------------------


def test_a_released_prompt_is_freed_at_once_and_a_late_decode_worker_computes_it(
    small: Path, cold: Cold
) -> None:
    async def main() -> None:
        async with running_pair(small, pools(1, NEVER_S)) as pair:
            chunk = await pair.prefilled(request(0))
            waiting = asyncio.create_task(pair.prefilled(request(1)))
            await until(lambda: pair.prefill.stats()["waiting"] == 1.0)
            assert pair.prefill.release(chunk["disaggregated_params"])
            await asyncio.wait_for(waiting, 10)
            assert {"held": 1.0, "released": 1.0} == held(pair)
            assert not pair.prefill.release(chunk["disaggregated_params"]), "it is gone"
            await computed_late(pair, 0, chunk, cold)

    run_async(main())


@pytest.fixture
def sending(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """A transfer has begun; it may go on. The prefill side waits in between."""
    begun, go, read = threading.Event(), threading.Event(), Contract.read

    def gated(self: Contract, *args: Any) -> memoryview:
        begun.set()
        go.wait(10)
        return read(self, *args)

    monkeypatch.setattr(Contract, "read", gated)
    yield begun, go
    go.set()


@pytest.mark.parametrize("patience_s", [NEVER_S, 0.0])
def test_a_prompt_that_is_being_fetched_is_neither_released_nor_displaced(
    small: Path, cold: Cold, sending: tuple[threading.Event, threading.Event], patience_s: float
) -> None:
    begun, go = sending

    async def main() -> None:
        async with running_pair(small, pools(1, patience_s)) as pair:
            chunk = await pair.prefilled(request(0))
            decoding = asyncio.create_task(collect(pair.decode, handed_over(request(0), chunk)))
            await asyncio.to_thread(begun.wait, 10)
            waiting = asyncio.create_task(pair.prefilled(request(1)))
            await until(lambda: pair.prefill.stats()["waiting"] == 1.0)
            assert not pair.prefill.release(chunk["disaggregated_params"])
            assert {"held": 1.0} == held(pair)
            go.set()
            chunks = await decoding
            assert cold.greedy(prompt_of(PROMPT_TOKENS), 4) == tokens_of(chunks)
            assert chunks[0][WORKER_ONLY]["transferred_tokens"]
            await asyncio.wait_for(waiting, 10)

    run_async(main())


def test_params_of_nobody_and_those_of_another_worker_release_nothing(small: Path) -> None:
    async def main() -> None:
        async with running_pair(small) as pair:
            params = (await pair.prefilled(request(0)))["disaggregated_params"]
            assert not pair.decode.release(params)
            assert not pair.prefill.release({**params, "ticket": "0" * 32})
            with pytest.raises(InvalidRequest, match="disaggregated_params: expected"):
                pair.prefill.release({"ticket": params["ticket"]})
            assert {"held": 1.0} == held(pair)

    run_async(main())


def test_a_prompt_whose_reader_goes_before_it_learns_how_to_fetch_it_is_freed(small: Path) -> None:
    async def main() -> None:
        engine = Gemma3CpuEngine(settings_for(small, with_options(transfer_timeout_s=NEVER_S), "prefill"))
        await asyncio.to_thread(engine.start, lambda rank, events: None)
        try:
            chunks = engine.generate(request_for(prompt_of(20), 1))
            reading = asyncio.ensure_future(anext(chunks))
            await asyncio.sleep(0)  # it is submitted
            # The prompt is finished on the engine's thread while this one does not read.
            while not engine.stats()["transfers_held"]:
                threading.Event().wait(0.001)
            reading.cancel()
            await asyncio.wait([reading])
            await until(lambda: not engine.stats()["transfers_held"])
            assert 1.0 == engine.stats()["transfers_released"]
            nothing_leaks(engine)
        finally:
            await asyncio.to_thread(engine.stop)

    run_async(main())


# -- displaced: nobody knows, and others need the blocks -------------------------------------------------


def test_the_prompt_that_waits_longest_makes_room_and_only_as_many_as_are_needed(
    small: Path, cold: Cold, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running_pair(small, pools(3, 0.1)) as pair:
            chunks = [await pair.prefilled(request(seed)) for seed in range(3)]
            assert {"held": 3.0} == held(pair)
            with caplog.at_level(logging.WARNING):
                await asyncio.wait_for(pair.prefilled(request(3)), 10)
            assert {"held": 3.0, "displaced": 1.0} == held(pair)
            assert 1 == sum("others need its blocks" in each.getMessage() for each in caplog.records)
            # The others are as good as ever; the first has to be computed again.
            later = await collect(pair.decode, handed_over(request(1), chunks[1]))
            assert later[0][WORKER_ONLY]["transferred_tokens"]
            await computed_late(pair, 0, chunks[0], cold)

    run_async(main())


def test_prompts_that_nobody_needs_the_blocks_of_are_kept(small: Path) -> None:
    async def main() -> None:
        async with running_pair(small, pools(2, 0.0)) as pair:
            for seed in range(2):
                await pair.prefilled(request(seed))
            assert {"held": 2.0} == held(pair)

    run_async(main())


async def stepped(engine: Gemma3CpuEngine) -> None:
    """Until the engine, which may have nothing to do, has made another step."""
    for _ in range(2):  # an action is run before a step, and the next one after it
        done = threading.Event()
        engine._ranks[0].post(done.set)
        await asyncio.to_thread(done.wait, 10)


def test_while_prompts_are_fetched_the_others_keep_their_turn(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where decode workers are only busy, they are not given the prompts to compute as well."""
    now = 0.0
    monkeypatch.setattr(disagg, "time", SimpleNamespace(monotonic=lambda: now))

    async def main() -> None:
        nonlocal now
        async with running_pair(small, pools(2, 3.0)) as pair:
            chunks = [await pair.prefilled(request(seed)) for seed in range(2)]
            now = 2.0
            await collect(pair.decode, handed_over(request(1), chunks[1]))
            await pair.prefilled(request(2))  # in the room of what was fetched
            waiting = asyncio.create_task(pair.prefilled(request(3)))
            await until(lambda: pair.prefill.stats()["waiting"] == 1.0)
            now = 4.9
            await stepped(pair.prefill)
            assert {"held": 2.0} == held(pair), "one was fetched less than 3 s ago"
            now = 5.0
            await stepped(pair.prefill)
            await asyncio.wait_for(waiting, 10)
            assert {"held": 2.0, "displaced": 1.0} == held(pair)

    run_async(main())


def test_each_rank_makes_room_with_prompts_of_its_own(small: Path) -> None:
    def at(rank: int, seed: int) -> dict[str, Any]:
        return {**request(seed), "routing": {"dp_rank": rank}}

    async def main() -> None:
        async with running_pair(small, pools(1, 0.05), ranks=2) as pair:
            for rank in range(2):
                await pair.prefilled(at(rank, rank))
            await asyncio.wait_for(pair.prefilled(at(1, 2)), 10)
            stats = pair.prefill.stats()
            assert (0.0, 1.0) == tuple(stats[f"transfers_displaced_rank_{rank}"] for rank in range(2))
            assert (1.0, 1.0) == tuple(stats[f"transfers_held_rank_{rank}"] for rank in range(2))

    run_async(main())
