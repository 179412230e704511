"""A prefill and a decode engine of one small model, joined as Dynamo's PrefillRouter joins them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine

from tests.gemma3_engine_helpers import OPTIONS, collect, settings_for

Chunks = list[dict[str, Any]]


def with_options(**own: Any) -> dict[str, Any]:
    return {**OPTIONS, "gemma3_cpu": {**OPTIONS["gemma3_cpu"], **own}}


class Pair:
    """Two engines, the events of each by kind, and the phases of a request."""

    def __init__(self, prefill: Gemma3CpuEngine, decode: Gemma3CpuEngine) -> None:
        self.prefill = prefill
        self.decode = decode
        self.decode_events: list[dict[str, Any]] = []

    async def prefilled(self, request: dict[str, Any]) -> dict[str, Any]:
        """The terminal chunk of the prefill worker, for a request as the frontend sends it there."""
        stop = {**request["stop_conditions"], "max_tokens": 1}
        [chunk] = await collect(self.prefill, {**request, "stop_conditions": stop})
        return chunk

    async def run(self, request: dict[str, Any]) -> Chunks:
        return await collect(self.decode, handed_over(request, await self.prefilled(request)))

    async def settled(self) -> None:
        """Until the prefill engine holds nothing for anybody."""
        await until(lambda: not self.prefill.stats()["transfers_held"])


def handed_over(request: dict[str, Any], chunk: dict[str, Any]) -> dict[str, Any]:
    """The request as the frontend sends it to the decode worker."""
    return {**request, "prefill_result": {"disaggregated_params": chunk["disaggregated_params"]}}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running_pair(
    directory: Path,
    prefill_options: dict[str, Any] | None = None,
    decode_options: dict[str, Any] | None = None,
    ranks: int = 1,
) -> AsyncIterator[Pair]:
    prefill = Gemma3CpuEngine(settings_for(directory, prefill_options, "prefill", ranks))
    decode = Gemma3CpuEngine(settings_for(directory, decode_options, "decode", ranks))
    pair = Pair(prefill, decode)

    def on_events(_: int, events: Sequence[Any]) -> None:
        pair.decode_events.extend(events)

    await asyncio.to_thread(prefill.start, lambda rank, events: None)
    await asyncio.to_thread(decode.start, on_events)
    try:
        yield pair
    finally:
        await asyncio.to_thread(decode.stop)
        await asyncio.to_thread(prefill.stop)
        for engine in (prefill, decode):
            nothing_leaks(engine)


def nothing_leaks(engine: Gemma3CpuEngine) -> None:
    for rank in engine._ranks:
        rank.manager.check()
    assert {0.0} == {value for name, value in engine.stats().items() if name.startswith("blocks_used")}
