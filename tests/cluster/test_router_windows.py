"""Where a score of the global blocks alone sends a prompt to the wrong worker: real engines, real routers.

One worker holds all global blocks of a prompt and none of its sliding ones any more, the other one a shorter
prefix that can be resumed. Dynamo's own router is asked with what it knows today, and with the projection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import engine_metric, eventually, long_prompt, metric
from tests.router_helpers import Stack
from vswa_plugin.launch.processes import Child
from vswa_plugin.registry.opening import registry_from_env

#: Sliding blocks for a prompt or two, global ones for many.
SMALL = '{"gemma3_cpu": {"kv_blocks": {"512": 60, "global": 400}}}'
LINES, RESUMABLE_LINES = 60, 36


class Two:
    """A worker that will hold the long prefix, and one that will hold the short one."""

    def __init__(self, stack: Stack, stock: str, workers: list[Child], ids: list[int]) -> None:
        self.stack = stack
        self.stock = stock
        self.workers = workers
        self._ids = ids

    async def hold(self, name: str) -> str:
        """Bring both into their states, by requests; a prompt with the prefix of both."""
        long = long_prompt(name, LINES)
        await self._serve(0, long)
        await self._serve(1, long_prompt(name, RESUMABLE_LINES))
        for number in range(5):
            await self._serve(0, long_prompt(f"{name} filler {number}", 20))
        # Two heartbeats of each: nothing of this is on its way any more.
        begun = [await self._heartbeats(worker) for worker in self.workers]

        async def settled() -> bool:
            now = [await self._heartbeats(worker) for worker in self.workers]
            return all(after >= before + 2 for before, after in zip(begun, now, strict=True))

        await eventually(settled, "two heartbeats of each")
        return f"{long}\nAnd now?"

    async def asked(self, prompt: str, url: str = "") -> tuple[int, float]:
        """Number of the worker that served ``prompt``, and how many of its tokens it computed."""
        before = [await self._computed(worker) for worker in self.workers]
        status, answer = await self.stack.ask(prompt, url=url, max_tokens=2, temperature=0)
        assert status == 200, answer
        after = [await self._computed(worker) for worker in self.workers]
        computed = [late - early for early, late in zip(before, after, strict=True)]
        assert min(computed) == 0 < max(computed)
        return computed.index(max(computed)), max(computed)

    async def _serve(self, number: int, prompt: str) -> None:
        pinned = {"url": self.stock, "worker_id": self._ids[number]}
        status, answer = await self.stack.ask(prompt, max_tokens=1, temperature=0, **pinned)
        assert status == 200, answer

    async def _computed(self, worker: Child) -> float:
        return await engine_metric(worker, "prefill_tokens")

    async def _heartbeats(self, worker: Child) -> float:
        return await metric(worker, "vswa_publisher_heartbeats_total")


@asynccontextmanager
async def two(brokers: Brokers, model_dir: Path, folder: Path, projection: str) -> AsyncIterator[Two]:
    env = brokers.env | {"VSWA_DYNAMO_EVENTS": projection}
    stack = Stack(folder, env, model_dir, f"windows-{projection}")
    try:
        engines = [stack.engine(name, "agg", "--override-engine-args", SMALL) for name in ("long", "short")]
        *workers, _ = await asyncio.gather(*engines, stack.start("--log-level", "debug"))
        await eventually(lambda: stack.routers[0].log().count("joins") == 2, "both workers are used", 30)
        await stack.shows("gemma")
        registry = registry_from_env(brokers.env)
        ids = {entry.pid: entry.worker_id for entry in await registry.entries(stack.name)}
        await registry.close()
        yield Two(stack, await stack.stock("kv"), workers, [ids[worker.pid] for worker in workers])
    finally:
        codes = await stack.stop()
    assert set(codes.values()) == {0}, codes


@pytest.mark.parametrize("projection", ["global", "boundary"])
def test_a_prefix_that_cannot_be_resumed_draws_only_those_who_do_not_know_the_windows(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path, projection: str
) -> None:
    async def body() -> tuple[tuple[int, float], tuple[int, float]]:
        async with two(brokers, model_dir, tmp_path, projection) as made:
            exact = await made.asked(await made.hold("one"))
            stock = await made.asked(await made.hold("another"), made.stock)
            return exact, stock

    (exact, exact_computed), (stock, stock_computed) = run(body())

    assert exact == 1
    assert stock == (0 if projection == "global" else 1)
    # Of some 1,500 tokens; a third is behind the prefix that can be resumed.
    assert exact_computed < 600
    assert stock_computed > 1_100 if projection == "global" else stock_computed < 600
