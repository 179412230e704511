"""Several data-parallel ranks in one engine: caches, schedulers and events of their own, weights shared."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vswa_plugins.gemma3_cpu.model.config import Rope
from vswa_plugins.gemma3_cpu.model.rope import RopeTable
from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine
from vswa_plugins.gemma3_cpu.serving.rank import PagedForward

from tests.gemma3_disagg_helpers import handed_over, running_pair, until
from tests.gemma3_engine_helpers import (
    OPTIONS,
    STUCK,
    Cold,
    collect,
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
from vswa_plugin.engine.contract import WORKER_ONLY
from vswa_plugin.errors import ConfigError, InvalidRequest, Overloaded, Unavailable


def on_rank(rank: int | None, prompt: Sequence[int], count: int = 3) -> dict[str, Any]:
    return request_for(prompt, count, routing={"dp_rank": rank})


def rank_of(chunks: Sequence[dict[str, Any]]) -> int:
    return int(chunks[0][WORKER_ONLY]["dp_rank"])


def cached(chunks: Sequence[dict[str, Any]]) -> int:
    return int(chunks[-1]["completion_usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_rank_that_is_named_serves_from_its_own_cache(small: Path, cold: Cold) -> None:
    prompt = prompt_of(100)

    async def main() -> list[tuple[int, int]]:
        async with running_engine(small, ranks=3) as engine:
            answers = [await collect(engine, on_rank(rank, prompt)) for rank in (2, 1, 2)]
            assert [cold.greedy(prompt, 3)] * 3 == [tokens_of(chunks) for chunks in answers]
            return [(rank_of(chunks), cached(chunks)) for chunks in answers]

    assert [(2, 0), (1, 0), (2, 99)] == run_async(main())


@pytest.mark.parametrize("rank", [2, -1, True, "0"])
def test_a_rank_that_is_not_there_is_refused_with_the_range(small: Path, rank: Any) -> None:
    engine = Gemma3CpuEngine(settings_for(small, ranks=2))

    assert 2 == engine.info.data_parallel_size
    with pytest.raises(InvalidRequest, match=r"dp_rank: expected a rank in \[0, 1\], got .*size is 2"):
        run_async(collect(engine, on_rank(rank, [5])))


def test_no_ranks_at_all_are_refused(small: Path) -> None:
    with pytest.raises(ConfigError, match="--data-parallel-size: expected at least one rank, got 0"):
        Gemma3CpuEngine(settings_for(small, ranks=0))


def test_without_a_rank_the_one_with_the_fewest_requests_serves(small: Path) -> None:
    async def main() -> None:
        async with running_engine(small, STUCK, ranks=3) as engine:
            tasks = []
            for rank, loads in (
                (None, [1, 0, 0]),
                (None, [1, 1, 0]),
                (2, [1, 1, 1]),
                (2, [1, 1, 2]),
                (None, [2, 1, 2]),
                (None, [2, 2, 2]),
            ):
                tasks.append(asyncio.create_task(collect(engine, on_rank(rank, prompt_of(9)))))
                await asyncio.sleep(0)
                assert loads == [each.load for each in engine._ranks]
            with pytest.raises(Overloaded, match="2 requests wait and 0 run: the queue takes 2"):
                await collect(engine, on_rank(None, prompt_of(9)))
            await asyncio.to_thread(engine.stop)
            ranks = [rank_of(await task) for task in tasks]
            assert [0, 1, 2, 2, 0, 1] == ranks

    run_async(main())


def test_events_name_their_rank_and_count_for_themselves(small: Path) -> None:
    heard: dict[int, list[dict[str, Any]]] = {0: [], 1: []}

    def on_events(rank: int, events: Sequence[Any]) -> None:
        heard[rank].extend(events)

    async def main() -> None:
        async with running_engine(small, on_events=on_events, ranks=2) as engine:
            assert [2, 2] == [len(events) for events in heard.values()]
            await collect(engine, on_rank(1, prompt_of(40)))

    run_async(main())

    assert ["created"] * 2 == [event["data"]["type"] for event in heard[0]]
    # Two chunks of two windows each.
    assert ["created"] * 2 + ["stored"] * 4 == [event["data"]["type"] for event in heard[1]]
    for rank, events in heard.items():
        assert [(rank, i) for i in range(len(events))] == [
            (event["attention_dp_rank"], event["event_id"]) for event in events
        ]


def test_one_rank_leaves_its_number_out_of_events(small: Path) -> None:
    heard: list[dict[str, Any]] = []

    async def main() -> None:
        async with running_engine(small, on_events=lambda rank, events: heard.extend(events)):
            pass

    run_async(main())

    assert heard and not any("attention_dp_rank" in event for event in heard)


def test_stats_are_sums_and_there_for_each_rank(small: Path) -> None:
    async def main() -> dict[str, float]:
        async with running_engine(small, ranks=2) as engine:
            for rank in (0, 1, 1):
                await collect(engine, on_rank(rank, prompt_of(20, rank)))
            return engine.stats()

    stats = run_async(main())

    assert (3.0, 1.0, 2.0) == (stats["requests"], stats["requests_rank_0"], stats["requests_rank_1"])
    assert 20.0 + 20.0 + 1.0 == stats["prefill_tokens"]
    assert stats["blocks_free_32"] == stats["blocks_free_32_rank_0"] + stats["blocks_free_32_rank_1"]


def test_ranks_that_compute_at_once_say_what_each_says_alone(small: Path, cold: Cold) -> None:
    prompts = [prompt_of(50 + 7 * i, i) for i in range(12)]

    async def main() -> list[list[dict[str, Any]]]:
        async with running_engine(small, ranks=3) as engine:
            names = {thread.name for thread in threading.enumerate()}
            assert {"gemma3_cpu-0", "gemma3_cpu-1", "gemma3_cpu-2"} <= names
            return await asyncio.gather(
                *(collect(engine, on_rank(i % 3, prompt, 6)) for i, prompt in enumerate(prompts))
            )

    assert [cold.greedy(prompt, 6) for prompt in prompts] == [tokens_of(c) for c in run_async(main())]


class RacedTable(RopeTable):
    """Whenever it has grown, another rank's shorter table takes its place."""

    @property
    def _table(self) -> Any:
        return self._kept

    @_table.setter
    def _table(self, grown: Any) -> None:
        self._kept = grown[:4096]


def test_the_rope_table_that_a_rank_gets_is_as_long_as_it_asked_for() -> None:
    assert 16_384 == len(RacedTable(Rope(10_000.0), 8).upto(10_000))


def test_a_rank_that_cannot_go_on_ends_the_engine(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = PagedForward.__call__

    def fails_on_rank_1(self: PagedForward, chunks: Any, /) -> Any:
        if threading.current_thread().name == "gemma3_cpu-1":
            raise RuntimeError("bang")
        return compute(self, chunks)

    monkeypatch.setattr(PagedForward, "__call__", fails_on_rank_1)

    async def main() -> None:
        async with running_engine(small, {**OPTIONS, "max_batch_size": 1}, ranks=2) as engine:
            requests = [collect(engine, on_rank(1, prompt_of(20, seed))) for seed in range(3)]
            await asyncio.gather(*requests, return_exceptions=True)
            await until(lambda: engine.failure() is not None)
            assert "RuntimeError: bang" == engine.failure()
            with pytest.raises(Unavailable, match="stopped after an error: RuntimeError: bang"):
                await collect(engine, on_rank(0, prompt_of(20)))

    run_async(main())


def test_each_rank_hands_over_and_takes_over(small: Path, cold: Cold) -> None:
    async def main() -> None:
        async with running_pair(small, ranks=2) as pair:
            for source in (0, 1):
                for sink in (0, 1):
                    prompt = prompt_of(90, 2 * source + sink)
                    chunk = await pair.prefilled(on_rank(source, prompt, 4))
                    answer = await collect(pair.decode, handed_over(on_rank(sink, prompt, 4), chunk))
                    assert (source, sink) == (rank_of([chunk]), rank_of(answer))
                    assert source == chunk["disaggregated_params"]["prefill_dp_rank"]
                    assert cold.greedy(prompt, 4) == tokens_of(answer)
            stats = pair.decode.stats()
            assert (4.0, 2.0, 2.0) == tuple(stats[f"transfers{r}"] for r in ("", "_rank_0", "_rank_1"))

    run_async(main())


def test_log_probabilities_do_not_depend_on_the_rank(small: Path) -> None:
    async def main() -> list[list[float]]:
        async with running_engine(small, ranks=2) as engine:
            request = [{**on_rank(r, prompt_of(60)), "output_options": {"logprobs": 0}} for r in (0, 1)]
            answers = await asyncio.gather(*(collect(engine, each) for each in request))
            return [[chunk["log_probs"][0] for chunk in chunks] for chunks in answers]

    one, other = run_async(main())

    np.testing.assert_allclose(one, other, atol=1e-4)
