"""Prefill and decode in two engines where something goes wrong: the client gets the same answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.serving.contract import Contract
from vswa_plugins.gemma3_cpu.serving.rank import PagedForward
from vswa_plugins.gemma3_cpu.serving.scheduler import Scheduler
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

from tests.gemma3_disagg_helpers import handed_over, nothing_leaks, running_pair, until, with_options
from tests.gemma3_engine_helpers import OVERRIDES, Cold, collect, prompt_of, request_for, run_async, tokens_of
from tests.gemma3_engine_helpers import cold as cold
from tests.gemma3_engine_helpers import model as model
from tests.gemma3_engine_helpers import small as small
from vswa_plugin.engine.contract import WORKER_ONLY

#: 30 blocks of each window on the prefill side: one prompt of 200 tokens fills the global pool.
ONE_PROMPT = with_options(kv_blocks={32: 30, "global": 30}, transfer_timeout_s=0.3)


class Held:
    """The prefill side stops before it sends its first run, until ``go`` is set."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    gate, read = Held(), Contract.read

    def gated(self: Contract, *args: Any) -> memoryview:
        gate.reached.set()
        gate.go.wait(10)
        return read(self, *args)

    monkeypatch.setattr(Contract, "read", gated)
    yield gate
    gate.go.set()


@contextmanager
def one_warning(caplog: pytest.LogCaptureFixture, text: str) -> Iterator[None]:
    caplog.clear()
    yield
    said = [r.getMessage() for r in caplog.records if "is computed here" in r.getMessage()]
    assert [True] == [text in line for line in said], said


def test_a_prefill_worker_that_stops_mid_transfer_costs_a_local_prefill(
    small: Path, cold: Cold, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = prompt_of(150)

    async def main() -> None:
        async with running_pair(small) as pair:
            with one_warning(caplog, "KV transfer from the prefill worker at 127.0.0.1"):
                running = asyncio.create_task(pair.run(request_for(prompt, 5)))
                await asyncio.to_thread(held.reached.wait, 10)
                stopping = asyncio.create_task(asyncio.to_thread(pair.prefill.stop))
                chunks = await running
                held.go.set()
                await stopping
            assert cold.greedy(prompt, 5) == tokens_of(chunks)
            assert {"dp_rank": 0, "transferred_tokens": 0}.items() <= chunks[0][WORKER_ONLY].items()
            stats = pair.decode.stats()
            assert (1.0, 0.0, 150.0) == tuple(
                stats[name] for name in ("transfer_failures", "transfers", "prefill_tokens")
            )

    run_async(main())


def test_others_go_on_while_a_transfer_is_slow(small: Path, cold: Cold, held: Held) -> None:
    prompts = prompt_of(150), prompt_of(60, 1)

    async def main() -> None:
        async with running_pair(small) as pair:
            slow = asyncio.create_task(pair.run(request_for(prompts[0], 5)))
            await asyncio.to_thread(held.reached.wait, 10)
            other = await collect(pair.decode, request_for(prompts[1], 5))
            assert cold.greedy(prompts[1], 5) == tokens_of(other)
            assert (False, 1.0) == (slow.done(), pair.decode.stats()["transfers_held"])
            held.go.set()
            assert cold.greedy(prompts[0], 5) == tokens_of(await slow)

    run_async(main())


def test_a_peer_that_says_nothing_is_given_up_after_the_time_out(small: Path, cold: Cold, held: Held) -> None:
    options = with_options(transfer_timeout_s=0.2)

    async def main() -> None:
        async with running_pair(small, decode_options=options) as pair:
            chunks = await pair.run(request_for(prompt_of(50), 4))
            assert cold.greedy(prompt_of(50), 4) == tokens_of(chunks)
            assert 1.0 == pair.decode.stats()["transfer_failures"]
            held.go.set()

    run_async(main())


def test_a_request_counts_as_running_while_its_blocks_come_and_keeps_its_place_if_they_do_not(
    small: Path, held: Held
) -> None:
    options = {**with_options(transfer_timeout_s=0.3), "max_batch_size": 1}
    ends: list[str] = []

    async def main() -> None:
        async with running_pair(small, decode_options=options) as pair:

            async def client(name: str, request: dict[str, Any]) -> None:
                await collect(pair.decode, request)
                ends.append(name)

            first = request_for(prompt_of(50), 4)
            first = handed_over(first, await pair.prefilled(first))
            running = [asyncio.create_task(client("first", first))]
            await until(lambda: pair.decode.stats()["transfers_held"] == 1.0)
            running.append(asyncio.create_task(client("second", request_for(prompt_of(9, 1), 1))))
            await until(lambda: pair.decode.stats()["waiting"] == 1.0)
            assert 1.0 == pair.decode.stats()["running"]
            await asyncio.gather(*running)
            assert 1.0 == pair.decode.stats()["transfer_failures"]
            held.go.set()

    run_async(main())

    assert ["first", "second"] == ends


def test_a_prompt_that_nobody_fetches_is_freed_after_the_deadline(small: Path, cold: Cold) -> None:
    request = request_for(prompt_of(100), 4)

    async def main() -> None:
        async with running_pair(small, with_options(transfer_timeout_s=0.05)) as pair:
            chunk = await pair.prefilled(request)
            await pair.settled()
            assert 1.0 == pair.prefill.stats()["transfers_expired"]
            nothing_leaks(pair.prefill)
            # Too late: refused, and computed here.
            chunks = await collect(pair.decode, handed_over(request, chunk))
            assert cold.greedy(prompt_of(100), 4) == tokens_of(chunks)
            assert 1.0 == pair.decode.stats()["transfer_failures"]

    run_async(main())


def test_what_is_held_is_not_evicted_and_keeps_others_waiting_at_rest(
    small: Path, cold: Cold, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    step = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda self: steps.append(1) or step(self))  # type: ignore[func-returns-value]
    first, second = (request_for(prompt_of(200, seed), 4) for seed in range(2))

    async def main() -> None:
        async with running_pair(small, {**ONE_PROMPT}) as pair:
            chunk = await pair.prefilled(first)
            waiting = asyncio.create_task(pair.prefilled(second))
            await until(lambda: pair.prefill.stats()["waiting"] == 1.0)
            before = len(steps)
            answer = await collect(pair.decode, handed_over(first, chunk))
            assert cold.greedy(prompt_of(200), 4) == tokens_of(answer)
            assert 1.0 == pair.decode.stats()["transfers"]
            answer = await collect(pair.decode, handed_over(second, await waiting))
            assert cold.greedy(prompt_of(200, 1), 4) == tokens_of(answer)
            # Nine chunks of the second prompt, the decode engine's steps, and a few looks in between.
            assert len(steps) - before < 40

    run_async(main())


def test_a_ticket_that_is_wrong_or_used_costs_a_local_prefill(
    small: Path, cold: Cold, caplog: pytest.LogCaptureFixture
) -> None:
    request = request_for(prompt_of(100), 4)

    async def main() -> None:
        async with running_pair(small, with_options(transfer_timeout_s=0.5)) as pair:
            chunk = await pair.prefilled(request)
            params = chunk["disaggregated_params"]
            forged = {"disaggregated_params": {**params, "ticket": "0" * 32}}
            with one_warning(caplog, "ticket is unknown, used or past its deadline"):
                answers = [await collect(pair.decode, handed_over(request, forged))]
            answers.append(await collect(pair.decode, handed_over(request_for(prompt_of(100), 4), chunk)))
            answers.append(await collect(pair.decode, handed_over(request, chunk)))
            assert [cold.greedy(prompt_of(100), 4)] * 3 == [tokens_of(chunks) for chunks in answers]
            assert (2.0, 1.0) == tuple(
                pair.decode.stats()[name] for name in ("transfer_failures", "transfers")
            )

    run_async(main())


def test_a_request_that_grew_since_its_prefill_is_computed_here(
    small: Path, cold: Cold, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the frontend moves a request to another decode worker, with the answer so far."""
    request = request_for(prompt_of(100), 4)
    grown = request_for(prompt_of(102), 4)

    async def main() -> None:
        async with running_pair(small) as pair:
            with one_warning(caplog, "expected a prompt of 102 tokens, got one of 100"):
                chunks = await collect(pair.decode, handed_over(grown, await pair.prefilled(request)))
            assert cold.greedy(prompt_of(102), 4) == tokens_of(chunks)
            # The prefill worker was told.
            await pair.settled()
            assert 0.0 == pair.prefill.stats()["transfers_expired"]

    run_async(main())


def test_other_weights_are_not_mixed(
    small: Path, cold: Cold, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint(tmp_path / "other", seed=1, overrides=OVERRIDES)
    request = request_for(prompt_of(40), 4)

    async def main() -> None:
        async with running_pair(tmp_path / "other") as other, running_pair(small) as pair:
            with one_warning(caplog, "run the same model and cache options"):
                chunks = await collect(pair.decode, handed_over(request, await other.prefilled(request)))
            assert cold.greedy(prompt_of(40), 4) == tokens_of(chunks)
            await other.settled()

    run_async(main())


def test_a_client_that_goes_during_the_transfer_frees_both_sides(small: Path, held: Held) -> None:
    async def main() -> None:
        async with running_pair(small) as pair:
            running = asyncio.create_task(pair.run(request_for(prompt_of(150), 5)))
            await asyncio.to_thread(held.reached.wait, 10)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await until(lambda: not pair.decode.stats()["transfers_held"])
            nothing_leaks(pair.decode)
            stats = pair.decode.stats()
            assert (0.0, 0.0) == (stats["transfer_failures"], stats["prefill_tokens"])
            held.go.set()
            await pair.settled()

    run_async(main())


def test_a_client_that_goes_before_the_prefill_is_done_leaves_nothing_held(small: Path) -> None:
    async def main() -> None:
        async with running_pair(small, with_options(debug_step_delay_s=0.01)) as pair:
            running = asyncio.create_task(pair.prefilled(request_for(prompt_of(200), 1)))
            await until(lambda: pair.prefill.stats()["running"] == 1.0)
            running.cancel()
            await until(lambda: not pair.prefill.stats()["running"])
            assert 0.0 == pair.prefill.stats()["transfers_held"]

    run_async(main())


def test_a_client_that_goes_during_the_last_step_of_the_prefill_leaves_nothing_held(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, compute = Held(), PagedForward.__call__

    def gated(self: PagedForward, chunks: Any, /) -> Any:
        gate.reached.set()
        gate.go.wait(10)
        return compute(self, chunks)

    monkeypatch.setattr(PagedForward, "__call__", gated)

    async def main() -> None:
        async with running_pair(small) as pair:
            running = asyncio.create_task(pair.prefilled(request_for(prompt_of(20), 1)))
            await asyncio.to_thread(gate.reached.wait, 10)
            running.cancel()
            await asyncio.wait([running])
            gate.go.set()
            await until(lambda: not pair.prefill.stats()["running"])
            assert 0.0 == pair.prefill.stats()["transfers_held"]

    run_async(main())


def test_a_client_that_goes_while_it_waits_for_room_frees_the_prefill_side(small: Path, held: Held) -> None:
    requests = [request_for(prompt_of(40, seed), 2) for seed in range(2)]

    async def main() -> None:
        async with running_pair(small, decode_options={**with_options(), "max_batch_size": 1}) as pair:
            first, late = [handed_over(each, await pair.prefilled(each)) for each in requests]
            running = asyncio.create_task(collect(pair.decode, first))
            await until(lambda: pair.decode.stats()["transfers_held"] == 1.0)
            waiting = asyncio.create_task(collect(pair.decode, late))
            await until(lambda: pair.decode.stats()["waiting"] == 1.0)
            assert 2.0 == pair.prefill.stats()["transfers_held"]
            waiting.cancel()
            await until(lambda: pair.prefill.stats()["transfers_held"] == 1.0)
            held.go.set()
            await running

    run_async(main())


def test_a_client_that_goes_before_its_transfer_begins_frees_both_sides(small: Path, held: Held) -> None:
    """Four transfers run side by side; the fifth waits."""

    async def main() -> None:
        async with running_pair(small) as pair:
            first = [request_for(prompt_of(40, seed), 2) for seed in range(4)]
            running = [asyncio.create_task(pair.run(request)) for request in first]
            await until(lambda: pair.decode.stats()["transfers_held"] == 4.0)
            late = asyncio.create_task(pair.run(request_for(prompt_of(40, 4), 2)))
            await until(lambda: pair.decode.stats()["transfers_held"] == 5.0)
            late.cancel()
            await until(lambda: pair.decode.stats()["transfers_held"] == 4.0)
            held.go.set()
            await asyncio.gather(*running)
            await pair.settled()
            assert 0.0 == pair.prefill.stats()["transfers_expired"]

    run_async(main())


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_stopping_ends_transfers_at_once(small: Path, held: Held, side: str) -> None:
    async def main() -> None:
        async with running_pair(small) as pair:
            await pair.prefilled(request_for(prompt_of(150), 5))
            running = asyncio.create_task(pair.run(request_for(prompt_of(150), 5)))
            await asyncio.to_thread(held.reached.wait, 10)
            async with asyncio.timeout(5):
                if side == "decode":
                    await asyncio.to_thread(pair.decode.stop)
                    [chunk] = await running
                    assert "cancelled" == chunk["finish_reason"]
                    # The prefill worker's count would say of this cache what is not true.
                    assert 0 == chunk["completion_usage"]["prompt_tokens_details"]["cached_tokens"]
                else:
                    stopping = asyncio.create_task(asyncio.to_thread(pair.prefill.stop))
                    assert 5 == len(tokens_of(await running))
                    held.go.set()
                    await stopping
            held.go.set()

    run_async(main())
