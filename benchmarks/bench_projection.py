"""What the projection onto Dynamo's event plane costs a worker, against keeping the residency alone.

    python benchmarks/bench_projection.py [--json benchmarks/results/bench_projection.json] [--short]

Engine events of 5,000 branches under one root, window 512 tokens and global, 32 tokens a block: all stored,
then one branch at a time leaves and comes back, then all leave. Residency alone is what a worker does
anyway; a ratio of 2 means that the projection costs as much again. Changes are taken once per engine step
(one branch), as dicts for Dynamo's publisher. Times are CPU times: the machine may have other work.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from vswa_plugins.dynamo_events.feed import as_dynamo
from vswa_plugins.dynamo_events.projection import Projection

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksRemoved, BlocksStored, EngineBlock, EngineEvent, EngineHash
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire.events import Event, layout_event

BLOCK, WINDOW = 32, 512
LAYOUT = CacheLayout((CacheGroup(0, WINDOW, BLOCK), CacheGroup(1, None, BLOCK)), "trtllm_v2", "bench")
ROOT_BLOCKS, BRANCH_BLOCKS = 64, 20
Step = list[EngineEvent]


class Branches:
    """Engine events, a step a branch. A branch's sliding blocks are all held, the root's the last window."""

    def __init__(self, count: int) -> None:
        dice = random.Random(7)
        self.root = self._chain(dice, ROOT_BLOCKS)
        self.branches = [self._chain(dice, BRANCH_BLOCKS) for _ in range(count)]

    @staticmethod
    def _chain(dice: random.Random, blocks: int) -> tuple[EngineBlock, ...]:
        return tuple(
            EngineBlock(f"{dice.getrandbits(256):x}", tuple(dice.randrange(262_144) for _ in range(BLOCK)))
            for _ in range(blocks)
        )

    def store_all(self) -> Iterator[Step]:
        slid = len(self.root) - WINDOW // BLOCK
        yield [
            BlocksStored(1, None, self.root),
            BlocksStored(0, self.root[slid - 1].hash, self.root[slid:]),
        ]
        for branch in self.branches:
            yield self._stored(branch, self.root[-1].hash)

    def replace(self) -> Iterator[Step]:
        """One branch leaves, and comes back."""
        for branch in self.branches:
            yield self._removed(branch)
            yield self._stored(branch, self.root[-1].hash)

    def remove_all(self) -> Iterator[Step]:
        for branch in self.branches:
            yield self._removed(branch)
        yield self._removed(self.root)

    @staticmethod
    def _stored(chain: tuple[EngineBlock, ...], parent: EngineHash) -> Step:
        return [BlocksStored(group_id, parent, chain) for group_id in (0, 1)]

    @staticmethod
    def _removed(chain: tuple[EngineBlock, ...]) -> Step:
        """As engines do: a block an event, the deepest first."""
        return [BlocksRemoved(group_id, (block.hash,)) for block in reversed(chain) for group_id in (0, 1)]


class Worker:
    """A residency, and behind it a projection where that is asked for."""

    def __init__(self, mode: str | None) -> None:
        self.residency = Residency(LAYOUT)
        self.projection = Projection(mode, LAYOUT) if mode else None
        self.told = 0

    def step(self, step: Step) -> None:
        changes: list[Event] = []
        for event in step:
            changes += self.residency.apply(event)
            if self.projection is not None and isinstance(event, BlocksStored):
                nodes = [self.residency.nodes.get(block.hash) for block in event.blocks]
                self.projection.learn(event, [node for node in nodes if node is not None])
        if self.projection is None:
            return
        self.tell(changes)

    def tell(self, changes: list[Event]) -> None:
        assert self.projection is not None
        for change in changes:
            self.projection.apply(change)
        due = self.projection.changes()
        self.told += len(list(as_dynamo(due)))
        self.projection.commit(due)


def timed(worker: Worker, steps: Iterator[Step]) -> dict[str, float]:
    """Engine events a second, and microseconds of the slowest step."""
    events, took, longest = 0, 0.0, 0.0
    for step in steps:
        events += len(step)
        began = time.process_time()
        worker.step(step)
        one = time.process_time() - began
        took, longest = took + one, max(longest, one)
    return {"events": events, "events_per_s": events / took, "longest_step_ms": longest * 1e3}


def phases(mode: str | None, made: Branches) -> dict[str, dict[str, float]]:
    gc.collect()
    worker = Worker(mode)
    kinds: tuple[tuple[str, Callable[[], Iterator[Step]]], ...] = (
        ("store all", made.store_all),
        ("replace one at a time", made.replace),
        ("remove all", made.remove_all),
    )
    found = {name: timed(worker, steps()) for name, steps in kinds}
    if worker.projection is not None and worker.projection.published:
        raise AssertionError("everything has left and something is still published")
    return found


def new_epoch(mode: str, made: Branches) -> float:
    """Milliseconds in which a worker that lost its engine's events takes everything back."""
    worker = Worker(mode)
    for step in made.store_all():
        worker.step(step)
    began = time.process_time()
    worker.tell([layout_event(LAYOUT)])
    return (time.process_time() - began) * 1e3


def memory(mode: str, made: Branches) -> dict[str, float]:
    """Bytes a block of the projection, with its tokens and names of its own."""
    worker = Worker(None)
    shown = [
        (step, [e for event in step for e in worker.residency.apply(event)]) for step in made.store_all()
    ]
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    projection = Projection(mode, LAYOUT)
    for step, changes in shown:
        for event in step:
            if isinstance(event, BlocksStored):
                nodes = [worker.residency.nodes.get(block.hash) for block in event.blocks]
                projection.learn(event, [node for node in nodes if node is not None])
        for change in changes:
            projection.apply(change)
        projection.commit(projection.changes())
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return {"blocks": projection.blocks, "bytes_per_block": used / projection.blocks}


def measure(branches: int, rounds: int) -> dict[str, Any]:
    made = Branches(branches)
    sides: dict[str, list[Any]] = {"residency alone": [], "global": [], "boundary": []}
    for _ in range(rounds):
        for side, found in sides.items():
            found.append(phases(None if side == "residency alone" else side, made))
    result: dict[str, Any] = {
        "branches": branches,
        "root_blocks": ROOT_BLOCKS,
        "branch_blocks": BRANCH_BLOCKS,
    }
    for side, found in sides.items():
        result[side] = {
            phase: {key: statistics.median(each[phase][key] for each in found) for key in found[0][phase]}
            for phase in found[0]
        }
    alone = result["residency alone"]
    result["time as a multiple of residency alone"] = {
        side: {phase: alone[phase]["events_per_s"] / result[side][phase]["events_per_s"] for phase in alone}
        for side in ("global", "boundary")
    }
    result["new epoch, all blocks removed, ms"] = {
        mode: new_epoch(mode, made) for mode in ("global", "boundary")
    }
    result["memory"] = {mode: memory(mode, made) for mode in ("global", "boundary")}
    return result


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 2)
    return {key: rounded(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--short", action="store_true", help="500 branches, once")
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    result = measure(500, 1) if args.short else measure(5_000, 3)
    result |= {
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": [load_before, os.getloadavg()[0]],
    }
    text = json.dumps(rounded(result), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
