"""Prefill and decode engines under everything at once: tiny pools, failing transfers, clients that leave.

Whatever happens on the way, who stays until the end gets the text that one engine gives, and at the end
nobody holds anything: no block, no ticket, no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.serving.contract import Contract
from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine
from vswa_plugins.gemma3_cpu.serving.options import RULES
from vswa_plugins.gemma3_cpu.serving.rank import EngineRank, PagedForward
from vswa_plugins.gemma3_cpu.transfer import serving
from vswa_plugins.gemma3_cpu.transfer.wire import Connection

from tests.gemma3_disagg_helpers import handed_over, nothing_leaks, until
from tests.gemma3_engine_helpers import (
    BLOCK,
    EVEN_OVERRIDES,
    OVERRIDES,
    Cold,
    collect,
    load_small_model,
    make_small_model,
    prompt_of,
    request_for,
    run_async,
    settings_for,
    tokens_of,
)
from tests.gemma3_v1_helpers import Mirror
from tests.gemma3_v2_helpers import Announced
from vswa_plugin.errors import RequestError

#: Two answers may differ from where the two likeliest tokens are as close as this.
MARGIN = 1e-3


class Fault(RuntimeError):
    """A failure that was injected."""


class NeverGoesOnError(RequestError):
    """A client whose prompt was computed, and that asks no decode engine."""


@dataclass
class Faults:
    """Which part of the calls of each kind fails."""

    chance: random.Random
    rates: dict[str, float]
    seen: Counter[str] = field(default_factory=Counter)

    def strikes(self, kind: str) -> bool:
        struck = self.chance.random() < self.rates.get(kind, 0.0)
        self.seen[kind] += struck
        return struck


@contextlib.contextmanager
def injected(faults: Faults) -> Iterator[None]:
    """Transfers fail in all the ways in which they can, and now and then a step does."""
    read, write, send, compute = Contract.read, Contract.write, Connection.send_bytes, PagedForward.__call__
    checksum = serving.checksum

    def bad_read(self: Contract, *args: Any) -> memoryview:
        if faults.strikes("read"):
            raise Fault("read")
        if faults.strikes("slow"):
            time.sleep(faults.chance.random() * 0.3)
        return read(self, *args)

    def bad_write(self: Contract, *args: Any) -> None:
        write(self, *args)
        if faults.strikes("write"):
            raise Fault("write")

    def bad_send(self: Connection, data: Any) -> None:
        if faults.strikes("lost"):
            raise ConnectionResetError("injected")
        send(self, data)

    def bad_step(self: PagedForward, chunks: Any, /) -> Any:
        if faults.strikes("step"):
            raise Fault("step")
        return compute(self, chunks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Contract, "read", bad_read)
        patch.setattr(Contract, "write", bad_write)
        patch.setattr(Connection, "send_bytes", bad_send)
        patch.setattr(PagedForward, "__call__", bad_step)
        patch.setattr(serving, "checksum", lambda data: checksum(data) ^ faults.strikes("corrupt"))
        yield


class Fleet:
    """Two prefill and two decode engines of two ranks, and what their events add up to."""

    def __init__(self, directory: Path, options: dict[str, Any]) -> None:
        self.prefill = [Gemma3CpuEngine(settings_for(directory, options, "prefill", 2)) for _ in range(2)]
        self.decode = [Gemma3CpuEngine(settings_for(directory, options, "decode", 2)) for _ in range(2)]
        self.engines = [*self.prefill, *self.decode]
        self.events: dict[EngineRank, list[Any]] = {rank: [] for rank in self.ranks}

    @property
    def ranks(self) -> list[EngineRank]:
        return [rank for engine in self.engines for rank in engine._ranks]

    async def start(self) -> None:
        for engine in self.engines:

            def on_events(rank: int, events: Sequence[Any], engine: Gemma3CpuEngine = engine) -> None:
                self.events[engine._ranks[rank]].extend(events)

            await asyncio.to_thread(engine.start, on_events)

    async def stop(self, chance: random.Random) -> None:
        await asyncio.gather(
            *(asyncio.to_thread(each.stop) for each in chance.sample(self.engines, k=len(self.engines)))
        )

    async def at_rest(self) -> None:
        """Until nothing runs, waits, or is held for anybody."""
        names = ("running", "waiting", "transfers_held")
        await until(lambda: not any(each.stats()[name] for each in self.engines for name in names))

    def check(self) -> None:
        for engine in self.engines:
            nothing_leaks(engine)
            assert engine.failure() is None
        for engine in self.prefill:
            assert engine._server is not None
            counts = engine._server.counts()
            assert (0, 0, 0) == (counts.waiting, counts.moving, len(engine._server._serving))
        for engine in self.decode:
            assert engine._puller is not None
            assert not engine._puller._running
        for rank in self.ranks:
            assert not rank._inbox
            self._check_events(rank)

    def _check_events(self, rank: EngineRank) -> None:
        """What was announced is what is held."""
        resident, rule = rank.manager.resident(), rank._options.reuse_rule
        if rule == RULES[0]:
            announced = Announced()
            announced.apply(self.events[rank])
            assert announced.held == resident
            return
        groups = rank.manager._groups  # type: ignore[attr-defined]
        mirror = Mirror(groups, rank.manager._max_seq_len, subtrees=rule == RULES[2])  # type: ignore[attr-defined]
        for event in self.events[rank]:
            mirror.read(event)
        assert mirror.covers(rank.manager)  # type: ignore[arg-type]


@dataclass
class Clients:
    """Clients that come one after another and have different fates.

    :ivar ends: how many had which.
    """

    fleet: Fleet
    cold: Cold
    chance: random.Random
    ends: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.prompts = [self._prompt() for _ in range(24)]

    def _prompt(self) -> list[int]:
        shared = prompt_of(200, self.chance.randrange(3))[: self.chance.choice([0, 1, 30, 64, 95, 150])]
        return shared + prompt_of(self.chance.choice([1, 7, 8, 9, 33, 60]), self.chance.randrange(1000))

    async def come(self, count: int, at_once: int) -> None:
        seats = asyncio.Semaphore(at_once)

        async def one() -> None:
            async with seats:
                self.ends[await self._live()] += 1

        await asyncio.gather(*(one() for _ in range(count)))

    async def _live(self) -> str:
        prompt, count = self.chance.choice(self.prompts), self.chance.choice([1, 2, 5, 12])
        routing = {
            "cache_salt": self.chance.choice([None, None, "tenant"]),
            "dp_rank": self.chance.choice([None, 0, 1]),
        }
        output = {"logprobs": self.chance.choice([None, 0, 3])}
        request = request_for(prompt, count, routing=routing, output_options=output)
        leaves = self.chance.random() < 0.25
        patience = self.chance.random() * 0.2 if leaves else 60.0
        try:
            async with asyncio.timeout(patience):
                chunks = await self._served(request)
        except TimeoutError:
            assert leaves, "a request hangs"
            return "left"
        except RequestError as error:
            return type(error).__name__
        if chunks[-1]["finish_reason"] == "cancelled":
            return "cancelled"
        self._check(prompt, count, tokens_of(chunks))
        return "whole"

    async def _served(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        decode = self.chance.choice(self.fleet.decode)
        fate = self.chance.random()
        if fate < 0.05:
            return await collect(decode, request)
        stop = {**request["stop_conditions"], "max_tokens": 1}
        [chunk] = await collect(self.chance.choice(self.fleet.prefill), {**request, "stop_conditions": stop})
        if chunk["finish_reason"] == "cancelled":
            return [chunk]
        params = chunk["disaggregated_params"]
        if fate < 0.1:
            raise NeverGoesOnError
        if fate < 0.2:
            await asyncio.sleep(self.chance.random() * 0.6)
        if fate < 0.3:
            forged = {"ticket": "0" * 32, "fingerprint": "another", "prompt_len": 9999, "port": 1}
            name = self.chance.choice(list(forged))
            params = {**params, name: forged[name]}
        return await collect(decode, handed_over(request, {"disaggregated_params": params}))

    def _check(self, prompt: list[int], count: int, got: list[int]) -> None:
        expected = self.cold.greedy(prompt, count)
        assert count == len(got)
        for i, (mine, theirs) in enumerate(zip(expected, got, strict=True)):
            if mine != theirs:
                first, second = sorted(self.cold.logits(prompt + expected[:i]))[-2:][::-1]
                assert first - second < MARGIN, f"token {i} of {count} after {len(prompt)}"
                return


def options_of(chance: random.Random, rule: str) -> dict[str, Any]:
    """Pools that hold two of the longest prompts, or a little more."""
    sliding, global_ = chance.choice([(12, 30), (16, 34), (24, 60)])
    if rule != RULES[0]:
        # V1 holds the whole prompt in every window until it is computed.
        sliding = global_
    host = chance.choice([None, {32: 5, "global": 9}, {32: 0, "global": 40}])
    return {
        "max_num_tokens": chance.choice([16, 64]),
        "max_batch_size": chance.choice([1, 2, 8]),
        "kv_cache_config": {
            "tokens_per_block": BLOCK,
            "enable_partial_reuse": chance.random() < 0.8,
            "enable_block_reuse": chance.random() < 0.9,
        },
        "gemma3_cpu": {
            "max_chunk_tokens": chance.choice([8, 24]),
            "kv_blocks": {32: sliding, "global": global_},
            "reuse_rule": rule,
            "transfer_timeout_s": chance.choice([0.05, 0.2, 1.0]),
            "max_queue_size": 500,
            **({"host_blocks": host} if host else {}),
        },
    }


def engine_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("kv transfer", "gemma3_cpu"))]


async def one_round(directory: Path, cold: Cold, seed: int, count: int) -> Counter[str]:
    chance = random.Random(seed)
    options = options_of(chance, RULES[seed % 3])
    rates = {"read": 0.03, "slow": 0.1, "write": 0.03, "lost": 0.03, "corrupt": 0.03, "step": 0.003}
    faults = Faults(random.Random(seed), {} if chance.random() < 0.2 else rates)
    fleet = Fleet(directory, options)
    clients = Clients(fleet, cold, chance)
    await fleet.start()
    with injected(faults):
        try:
            coming = asyncio.create_task(clients.come(count, at_once=chance.choice([4, 12, 40])))
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random())
                await fleet.stop(chance)
                await coming
            else:
                await coming
                await fleet.at_rest()
        finally:
            await fleet.stop(chance)
    fleet.check()
    return clients.ends + faults.seen


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Cold]]:
    """One whose windows have pools of their own, and one whose windows share a pool."""
    made = [
        make_small_model(Path(tmp_path_factory.mktemp("m")), each) for each in (OVERRIDES, EVEN_OVERRIDES)
    ]
    return [(directory, Cold(load_small_model(directory))) for directory in made]


@pytest.mark.parametrize(("seed", "model"), [(0, 0), (1, 0), (2, 0), (3, 1)])
def test_whatever_happens_nothing_stays_behind(
    checkpoints: list[tuple[Path, Cold]], seed: int, model: int
) -> None:
    ends = run_async(one_round(*checkpoints[model], seed, 15))

    assert not engine_threads()
    assert ends["whole"] > 5


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    "'soak' not in (config.getoption('-m') or '')", reason="runs for minutes: ask with -m soak"
)
@pytest.mark.parametrize("model", [0, 1], ids=["two pools", "one pool"])
def test_whatever_happens_for_minutes_nothing_stays_behind(
    checkpoints: list[tuple[Path, Cold]], model: int
) -> None:
    ends: Counter[str] = Counter()
    for seed in range(100, 160):
        ends.update(run_async(one_round(*checkpoints[model], seed, 40)))
        assert not engine_threads(), f"seed {seed}"

    assert {"whole", "left", "cancelled", "NeverGoesOnError", "read", "lost", "corrupt"} <= set(ends)
    assert ends["whole"] > 1000
