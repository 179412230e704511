"""The embedded engine as a worker sees it: its thread, its queue, its errors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.serving.engine import TOTALS, Gemma3CpuEngine

from tests.gemma3_engine_helpers import (
    CONTEXT,
    EVEN_OVERRIDES,
    OPTIONS,
    STUCK,
    Cold,
    collect,
    make_small_model,
    prompt_of,
    request_for,
    run_async,
    running_engine,
    settings_for,
    tokens_of,
)
from tests.gemma3_engine_helpers import cold as cold
from tests.gemma3_engine_helpers import model as model
from tests.gemma3_engine_helpers import small as small
from vswa_plugin import __version__
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.memory import Memory, Pool
from vswa_plugin.engine.contract import Engine, EngineInfo
from vswa_plugin.errors import InvalidRequest, Overloaded, RequestError, Unavailable


def used_blocks(engine: Gemma3CpuEngine) -> dict[str, float]:
    return {name: value for name, value in engine.stats().items() if name.startswith("blocks_used")}


def test_it_streams_a_token_per_chunk_and_then_the_usage(small: Path, cold: Cold) -> None:
    async def main() -> list[dict[str, Any]]:
        async with running_engine(small) as engine:
            return await collect(engine, request_for(prompt_of(70), 5))

    chunks = run_async(main())

    assert cold.greedy(prompt_of(70), 5) == tokens_of(chunks)
    assert [1] * 5 == [len(chunk["token_ids"]) for chunk in chunks]
    assert [False] * 4 + [True] == ["finish_reason" in chunk for chunk in chunks]
    assert (70, 5, 75) == tuple(
        chunks[-1]["completion_usage"][f"{kind}_tokens"] for kind in ("prompt", "completion", "total")
    )


def test_clients_at_once_get_what_each_gets_alone(small: Path, cold: Cold) -> None:
    prompts = [prompt_of(length, length) for length in (5, 80, 33, 140, 12, 64, 99, 200, 7, 50, 18, 120)]

    async def main() -> list[list[dict[str, Any]]]:
        async with running_engine(small) as engine:
            return await asyncio.gather(*(collect(engine, request_for(p, 6)) for p in prompts))

    answers = run_async(main())

    assert [cold.greedy(prompt, 6) for prompt in prompts] == [tokens_of(chunks) for chunks in answers]


def test_it_says_what_it_is_before_it_starts(small: Path) -> None:
    engine: Engine = Gemma3CpuEngine(settings_for(small))
    layout = CacheLayout((CacheGroup(0, 32, 8), CacheGroup(1, None, 8)), "trtllm_v2", "small")

    name = {"engine": "gemma3_cpu", "engine_version": __version__}

    memory = Memory((Pool((0,), 2 * CONTEXT // 8, 0), Pool((1,), 4 * CONTEXT // 8, 0)), "trtllm_v2", 64, 8)
    blocks = 4 * CONTEXT // 8
    info = EngineInfo(layout, CONTEXT, 8, 64, blocks, totals=TOTALS, memory=memory, **name)
    assert info == engine.info
    assert "trtllm" == engine.event_format
    assert engine.failure() is None


def test_the_cache_groups_are_announced_at_the_start(small: Path) -> None:
    heard: list[tuple[int, str, int]] = []

    def on_events(rank: int, events: Sequence[Any]) -> None:
        heard.extend((rank, event["data"]["type"], event["window_size"]) for event in events)

    async def main() -> None:
        async with running_engine(small, on_events=on_events):
            assert [(0, "created", 32), (0, "created", CONTEXT)] == heard

    run_async(main())


@pytest.mark.parametrize("rule", ["trtllm_v2", "trtllm_v1"])
def test_the_capacity_of_each_window_is_the_size_of_its_pool(small: Path, rule: str) -> None:
    own = {"kv_blocks": {"32": 70, "global": 90}, "reuse_rule": rule}

    async def main() -> tuple[dict[str, int], dict[str, float]]:
        async with running_engine(small, {**OPTIONS, "gemma3_cpu": own}) as engine:
            await collect(engine, request_for(prompt_of(100), 4))
            return engine.info.capacity, engine.stats()

    capacity, stats = run_async(main())
    pools = {
        window: sum(stats.get(f"blocks_{state}_{window}", 0) for state in ("used", "free", "droppable"))
        for window in ("32", "global")
    }

    assert capacity == pools == {"32": 70, "global": 90}


def test_windows_that_share_a_pool_have_no_capacity_of_their_own(tmp_path: Path) -> None:
    directory = make_small_model(tmp_path / "even", EVEN_OVERRIDES)

    assert {} == Gemma3CpuEngine(settings_for(directory)).info.capacity


def test_events_are_handed_over_before_the_answer_and_a_failing_receiver_costs_no_answer(small: Path) -> None:
    kinds: list[str] = []

    def on_events(rank: int, events: Sequence[Any]) -> None:
        kinds.extend(event["data"]["type"] for event in events)
        raise RuntimeError("a receiver that breaks its promise")

    async def main() -> None:
        async with running_engine(small, on_events=on_events) as engine:
            async for _ in engine.generate(request_for(prompt_of(20), 2)):
                assert ["created", "created", "stored", "stored"] == kinds

    run_async(main())


def test_closing_the_generator_frees_its_blocks(small: Path) -> None:
    async def main() -> None:
        async with running_engine(small) as engine:
            stream = engine.generate(request_for(prompt_of(100), None))
            await anext(stream)
            await anext(stream)
            await stream.aclose()
            # The engine looks at what was cancelled before it computes anything for the next request.
            await collect(engine, request_for(prompt_of(10), 1))
            assert {"blocks_used_32": 0.0, "blocks_used_global": 0.0} == used_blocks(engine)
            assert (0.0, 0.0) == (engine.stats()["running"], engine.stats()["waiting"])

    run_async(main())


def test_cancelling_the_task_of_a_request_cancels_it(small: Path) -> None:
    async def main() -> None:
        async with running_engine(small) as engine:
            started = asyncio.Event()

            async def client() -> None:
                async for _ in engine.generate(request_for(prompt_of(100), None)):
                    started.set()

            task = asyncio.create_task(client())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await collect(engine, request_for(prompt_of(10), 1))
            assert {0.0} == set(used_blocks(engine).values())

    run_async(main())


def test_a_full_queue_is_refused_with_the_numbers(small: Path) -> None:
    async def main() -> None:
        async with running_engine(small, STUCK) as engine:
            tasks = [asyncio.create_task(collect(engine, request_for(prompt_of(9)))) for _ in range(2)]
            await asyncio.sleep(0)
            assert 2.0 == engine.stats()["waiting"]
            with pytest.raises(Overloaded, match=r"2 requests wait and 0 run: the queue takes 2"):
                await collect(engine, request_for(prompt_of(9)))
            await asyncio.to_thread(engine.stop)
            assert [["cancelled"]] * 2 == [[c["finish_reason"] for c in await task] for task in tasks]

    run_async(main())


def test_a_slow_step_blocks_neither_the_event_loop_nor_the_end(small: Path) -> None:
    async def main() -> float:
        async with running_engine(small, STUCK) as engine:
            task = asyncio.create_task(collect(engine, request_for(prompt_of(9))))
            began = time.perf_counter()
            for _ in range(100):
                await asyncio.sleep(0.001)
                engine.stats()
            assert not task.done()
            await asyncio.to_thread(engine.stop)
            [last] = await task
            assert ("cancelled", 0) == (last["finish_reason"], last["completion_usage"]["completion_tokens"])
            return time.perf_counter() - began

    assert run_async(main()) < 5


@pytest.mark.parametrize(
    ("request_dict", "message"),
    [
        (
            request_for(prompt_of(CONTEXT)),
            "prompt of 512 tokens: expected at most 511, .* context of 512 tokens",
        ),
        (request_for([]), "token_ids: expected at least one token id, got none"),
        (request_for([1, -1]), r"token_ids: expected ids in \[0, 4095\], got -1 to 1"),
        (request_for([4096]), r"token_ids: expected ids in \[0, 4095\], got 4096 to 4096"),
        ({**request_for([1]), "token_ids": ["a"]}, "token_ids: expected a list of integers"),
        ({**request_for([1]), "token_ids": b"abc"}, "expected 4 bytes per token, got 3 bytes"),
        ({"model": "small"}, "token_ids: expected at least one token id"),
        (request_for([1], 0), "max_tokens: expected an integer of at least 1, got 0"),
        (
            request_for([1], stop_conditions={"min_tokens": -1}),
            "min_tokens: expected an integer of at least 0",
        ),
        (request_for([1], stop_conditions={"stop_token_ids": "x"}), "stop_token_ids: expected a list"),
        (request_for([1], sampling_options={"top_p": 7}), r"top_p: expected a number in \[0, 1\], got 7"),
        (request_for([1], routing={"lora_name": "x"}), "lora_name: expected none"),
        (
            request_for([1], routing={"dp_rank": 1}),
            r"dp_rank: expected a rank in \[0, 0\], got 1; .*--data-parallel-size is 1",
        ),
        (request_for([1], multi_modal_data={"image_url": []}), r"\(multi_modal_data\): expected no images"),
        ({**request_for([1]), "routing": []}, "routing: expected an object, got list"),
    ],
)
def test_a_request_that_cannot_be_served_says_why(
    small: Path, request_dict: dict[str, Any], message: str
) -> None:
    engine = Gemma3CpuEngine(settings_for(small))

    with pytest.raises(InvalidRequest, match=message):
        run_async(collect(engine, request_dict))


def test_a_pool_too_small_for_a_request_is_named(small: Path) -> None:
    options = {**OPTIONS, "gemma3_cpu": {"kv_blocks": {"global": 10, 32: 20}}}

    async def main() -> None:
        async with running_engine(small, options) as engine:
            with pytest.raises(
                InvalidRequest, match=r"need 13 blocks of 8 tokens in the pool of window global.* 10"
            ):
                await collect(engine, request_for(prompt_of(95), 5))
            # Without max_tokens the answer may be as long as the pool allows.
            assert 80 - 70 == len(tokens_of(await collect(engine, request_for(prompt_of(70), None))))

    run_async(main())


def test_token_ids_may_come_packed(small: Path, cold: Cold) -> None:
    prompt = prompt_of(20)
    packed = b"".join(token.to_bytes(4, "little") for token in prompt)

    async def main() -> list[int]:
        async with running_engine(small) as engine:
            return tokens_of(await collect(engine, {**request_for(prompt, 3), "token_ids": packed}))

    assert cold.greedy(prompt, 3) == run_async(main())


def test_a_step_that_fails_is_its_clients_error_and_the_engine_goes_on(
    small: Path, cold: Cold, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vswa_plugins.gemma3_cpu.serving.rank import PagedForward

    compute = PagedForward.__call__
    failing = [True, False]

    def sometimes(self: PagedForward, chunks: Any, /) -> Any:
        if failing and failing.pop(0):
            raise RuntimeError("bang")
        return compute(self, chunks)

    monkeypatch.setattr(PagedForward, "__call__", sometimes)

    async def main() -> None:
        async with running_engine(small) as engine:
            with pytest.raises(RequestError, match=r"the engine failed while it ran .*RuntimeError: bang"):
                await collect(engine, request_for(prompt_of(20)))
            assert engine.failure() is None
            assert cold.greedy(prompt_of(20), 4) == tokens_of(
                await collect(engine, request_for(prompt_of(20)))
            )
            assert 1.0 == engine.stats()["failed_steps"]

    run_async(main())


def test_an_engine_that_always_fails_stops_and_every_waiter_hears_of_it(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vswa_plugins.gemma3_cpu.serving.rank import PagedForward

    def never(self: PagedForward, chunks: Any, /) -> Any:
        raise RuntimeError("bang")

    monkeypatch.setattr(PagedForward, "__call__", never)

    async def main() -> None:
        async with running_engine(small, {**OPTIONS, "max_batch_size": 1}) as engine:
            requests = [collect(engine, request_for(prompt_of(20, seed))) for seed in range(6)]
            errors = await asyncio.gather(*requests, return_exceptions=True)
            assert [RequestError] * 3 + [Unavailable] * 3 == [type(error) for error in errors]
            # Each its own, or tasks that raise it would write into one another's traceback.
            assert 6 == len(set(map(id, errors)))
            assert "RuntimeError: bang" == engine.failure()
            with pytest.raises(
                Unavailable, match="the engine has stopped after an error: RuntimeError: bang"
            ):
                await collect(engine, request_for(prompt_of(20)))

    run_async(main())


def test_before_the_start_and_after_the_end_it_is_unavailable(small: Path) -> None:
    async def main() -> None:
        engine = Gemma3CpuEngine(settings_for(small))
        with pytest.raises(Unavailable, match="has not started"):
            await collect(engine, request_for(prompt_of(9)))
        engine.stop()
        async with running_engine(small) as other:
            await asyncio.to_thread(other.stop)
            with pytest.raises(Unavailable, match="is stopping"):
                await collect(other, request_for(prompt_of(9)))

    run_async(main())


def test_the_thread_ends_with_the_engine(small: Path) -> None:
    async def main() -> None:
        async with running_engine(small) as engine:
            await collect(engine, request_for(prompt_of(9)))
            assert "gemma3_cpu-0" in [thread.name for thread in threading.enumerate()]

    run_async(main())
    assert "gemma3_cpu-0" not in [thread.name for thread in threading.enumerate()]
