"""One fleet that follows the publishers of the soak, is asked for scores, and is watched."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from tests.cases.follower_helpers import entry_of
from tests.endurance.publishers import COMPONENT, NAMESPACE, digest
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.registry import Entry
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.testing.streams import LAYOUT, nats_server
from vswa_plugin.wire.events import Rank, decode
from vswa_plugin.wire.transport import Transport

#: Figures are of the time after this share of it: before, caches fill.
WARM = 0.25
SAMPLED = 16
PROMPT_BLOCKS = 256


@dataclass
class Measured:
    """:ivar lags_s: of sampled batches, from being numbered until they were applied.
    :ivar stale: how often a rank that had been live was found otherwise.
    :ivar wrong: ranks whose blocks are not what their publisher holds in the end.
    """

    ranks: int
    seconds: float
    messages: int = 0
    queries: int = 0
    stale: int = 0
    lags_s: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    steps: int = 0
    wrong: list[int] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        lags = sorted(self.lags_s) or [0.0]
        return {
            "ranks": self.ranks,
            "seconds": self.seconds,
            "engine_steps": self.steps,
            "messages": self.messages,
            "queries": self.queries,
            "lag_ms": {f"p{of}": round(lags[(len(lags) - 1) * of // 100] * 1000, 1) for of in (50, 99, 100)},
            "memory_mib": [round(self.memory_mib[0], 1), round(self.memory_mib[-1], 1)],
            "descriptors": [self.descriptors[0], self.descriptors[-1]],
            "stale": self.stale,
            "wrong": len(self.wrong),
        }


async def soak(ranks: int, events_per_s: float, queries_per_s: float, seconds: float) -> Measured:
    """Follow so many ranks for so long; see :class:`Measured`."""
    measured = Measured(ranks, seconds)
    async with nats_server() as url, publishers(url, ranks, events_per_s, seconds) as child:
        epochs = json.loads((await _line(child)).removeprefix("ready "))
        with tempfile.TemporaryDirectory() as folder:
            registries = [FileRegistry(folder) for _ in epochs]
            for registry, (worker_id, epoch) in zip(registries, epochs.items(), strict=True):
                await registry.join(_entry(int(worker_id), epoch))
            fleet = Fleet(Transport(url), FileRegistry(folder), namespace=NAMESPACE)
            _watch(fleet, measured)
            await fleet.start()
            try:
                assert await fleet.settled(60.0), "not every rank became live"
                await _go_on(child)
                await _measure(fleet, measured, queries_per_s)
                done = json.loads((await _line(child)).removeprefix("done "))
                measured.steps = done["steps"]
                measured.wrong = await _wrong(fleet, done["held"])
                await _go_on(child)
            finally:
                await fleet.stop()
                for registry in registries:
                    await registry.close()
    return measured


@asynccontextmanager
async def publishers(url: str, ranks: int, events_per_s: float, seconds: float) -> AsyncIterator[Process]:
    """The process of the publishers; it has ended when this ends."""
    arguments = [url, str(ranks), str(events_per_s), str(seconds)]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.endurance.publishers", *arguments, stdin=pipe, stdout=pipe, limit=1 << 24
    )
    try:
        yield child
        await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def _watch(fleet: Fleet, measured: Measured) -> None:
    """Note how late some of the batches are when they have been applied."""
    subscriber = fleet.subscriber
    take = subscriber._on_message

    async def taken(event_subject: str, payload: bytes) -> None:
        await take(event_subject, payload)
        measured.messages += 1
        if measured.messages % SAMPLED == 0:
            batch = decode(payload)
            measured.lags_s.append((time.time_ns() - batch.published_at_ns) / 1e9)

    subscriber._on_message = taken  # type: ignore[method-assign]


async def _measure(fleet: Fleet, measured: Measured, queries_per_s: float) -> None:
    process, rng = psutil.Process(), random.Random(0)
    began, noted, warm = time.monotonic(), 0.0, False
    while (passed := time.monotonic() - began) < measured.seconds:
        if not warm and passed > WARM * measured.seconds:
            warm = True
            measured.lags_s.clear()
        if warm and passed - noted > measured.seconds / 50:
            noted = passed
            measured.memory_mib.append(process.memory_info().rss / 2**20)
            measured.descriptors.append(process.num_fds())
            measured.stale += sum(view.state != "live" for view in fleet.subscriber.views())
        for _ in range(max(0, int(passed * queries_per_s) - measured.queries)):
            start = rng.getrandbits(40)
            fleet.index.score(range(start, start + PROMPT_BLOCKS), 32 * PROMPT_BLOCKS + 1)
            measured.queries += 1
        await asyncio.sleep(0.01)


async def _wrong(fleet: Fleet, held: dict[str, tuple[int, str]]) -> list[int]:
    """Worker ids of ranks that are not, within a minute, what their publishers hold."""
    left = {int(worker_id): tuple(of) for worker_id, of in held.items()}
    for _ in range(600):
        left = {each: of for each, of in left.items() if _seen(fleet, Rank(each)) != of}
        if not left:
            break
        await asyncio.sleep(0.1)
    return sorted(left)


def _seen(fleet: Fleet, rank: Rank) -> tuple[int, str] | None:
    view = fleet.subscriber.view(rank)
    if view is None or view.state != "live":
        return None
    contents = fleet.index.contents(rank)
    return view.reader.next_event_id, digest({group: set(blocks) for group, blocks in contents.items()})


def _entry(worker_id: int, epoch: int) -> Entry:
    return entry_of(
        worker_id, namespace=NAMESPACE, component=COMPONENT, epochs={0: epoch}, groups=LAYOUT.groups
    )


async def _line(child: Process) -> str:
    assert child.stdout is not None
    line = (await child.stdout.readline()).decode()
    assert line, "the publishers ended"
    return line


async def _go_on(child: Process) -> None:
    assert child.stdin is not None
    child.stdin.write(b"\n")
    await child.stdin.drain()
