"""What bench_index.py compares, and what they are made to hold."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from dynamo.llm import RadixTree, compute_block_hash_for_seq

from vswa_plugin.blocks.hashing import block_hashes, sequence_hashes
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.index import WindowIndex
from vswa_plugin.wire.events import VERSION, Batch, Rank, Removed, Stored, decode, encode

START = time.perf_counter()

BLOCK = 32
WINDOW = 512
RANKS = [Rank(number) for number in range(64)]
SLIDING, GLOBAL = 0, 1
LAYOUT = CacheLayout((CacheGroup(SLIDING, WINDOW, BLOCK), CacheGroup(GLOBAL, None, BLOCK)), "trtllm_v2", "m")
LONG, SHORT = 4096, 128
EVENT = 16
PROMPTS_A_CASE = 4
#: All cases are measured so many times over; the median of the medians counts.
PASSES = 5
BRANCHES, BRANCH_BLOCKS, ROOT_BLOCKS = 5_000, 16, 64


@dataclass(frozen=True)
class Chain:
    """One prompt's blocks. ``token_ids`` only where hashing is measured."""

    blocks: Sequence[int]
    sequence: Sequence[int]
    token_ids: list[int] | None = None

    @classmethod
    def of(cls, blocks: list[int], parent: int | None = None, token_ids: list[int] | None = None) -> Chain:
        return cls(array("Q", blocks), array("Q", sequence_hashes(blocks, parent)), token_ids)


@dataclass(frozen=True)
class Step:
    """Blocks [start, end) of a chain, stored by one rank; of the sliding group only what ``sliding`` says."""

    chain: Chain
    rank: int
    start: int
    end: int
    sliding: Callable[[int], bool] = lambda block: True
    parent: int | None = None

    def above(self) -> int | None:
        return self.chain.sequence[self.start - 1] if self.start else self.parent


class Dynamo:
    """Dynamo's tree: global blocks only, its event JSON."""

    name = "dynamo"

    def __init__(self) -> None:
        self.tree = RadixTree()

    def stored(self, step: Step) -> list[bytes]:
        blocks = [
            {"block_hash": sequence, "tokens_hash": block}
            for sequence, block in zip(
                step.chain.sequence[step.start : step.end],
                step.chain.blocks[step.start : step.end],
                strict=True,
            )
        ]
        return [_kv_event({"stored": {"parent_hash": step.above(), "blocks": blocks}})]

    def removed(self, step: Step) -> list[bytes]:
        gone = step.chain.sequence[step.start : step.end].tolist()[::-1]  # type: ignore[attr-defined]
        return [_kv_event({"removed": {"block_hashes": gone}})]

    def apply(self, rank: int, event: bytes) -> None:
        self.tree.apply_event(rank, event)

    def query(self, chain: Chain, blocks: int) -> Callable[[], Any]:
        hashes = list(chain.blocks[:blocks])
        return lambda: self.tree.find_matches(hashes)

    def query_tokens(self, token_ids: list[int]) -> Callable[[], Any]:
        return lambda: self.tree.find_matches(compute_block_hash_for_seq(token_ids, BLOCK))


class Ours:
    """Our index: both windows, our wire's bytes, decoded as a reader would."""

    def __init__(self, kernel: bool) -> None:
        self.name = "kernel" if kernel else "python"
        self.index = WindowIndex(kernel=kernel)
        for rank in RANKS:
            self.index.join(rank, LAYOUT)

    def stored(self, step: Step) -> list[bytes]:
        hashes = tuple(step.chain.sequence[step.start : step.end])
        kept = tuple(h for at, h in enumerate(hashes, step.start) if step.sliding(at))
        events = [Stored(GLOBAL, step.start, step.above(), hashes)]
        if kept:
            events.append(Stored(SLIDING, step.start, step.above(), kept))
        return [encode(Batch(VERSION, 1, 0, 0, (event,))) for event in events]

    def removed(self, step: Step) -> list[bytes]:
        gone = tuple(step.chain.sequence[step.start : step.end])[::-1]
        return [encode(Batch(VERSION, 1, 0, 0, (Removed(group, gone),))) for group in (GLOBAL, SLIDING)]

    def apply(self, rank: int, event: bytes) -> None:
        for change in decode(event).events:
            self.index.apply(RANKS[rank], change)

    def query(self, chain: Chain, blocks: int) -> Callable[[], Any]:
        hashes = array("Q", chain.sequence[:blocks])  # as the router hashes prompts
        return lambda: self.index.score(hashes, blocks * BLOCK + 1)

    def query_tokens(self, token_ids: list[int]) -> Callable[[], Any]:
        return lambda: self.index.score_tokens(token_ids)


Side = Dynamo | Ours


def _kv_event(data: Any) -> bytes:
    return json.dumps({"event_id": 1, "dp_rank": 0, "data": data}).encode()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", file=sys.stderr, flush=True)


def resident_memory() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def timed(action: Callable[[], Any]) -> float:
    """Microseconds."""
    before = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - before) / 1e3


class Named(Protocol):
    @property
    def name(self) -> str: ...


AnySide = TypeVar("AnySide", bound=Named)


def in_turns(
    sides: Sequence[AnySide], prepare: Callable[[AnySide, int], Callable[[], Any]], rounds: int
) -> dict[str, float]:
    """Median microseconds of each side; its action is prepared untimed just before."""
    samples: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(-max(3, rounds // 10), rounds):
        for side in sides:
            took = timed(prepare(side, number))
            if number >= 0:
                samples[side.name].append(took)
    return {name: statistics.median(times) for name, times in samples.items()}


# -- what is resident ------------------------------------------------------------------------------


def by_event(chain: Chain, rank: int, size: int = EVENT, **more: Any) -> Iterator[Step]:
    for start in range(0, len(chain.blocks), size):
        yield Step(chain, rank, start, min(start + size, len(chain.blocks)), **more)


def interleaved(steps: Sequence[Iterator[Step]]) -> Iterator[Step]:
    """One of each in turn, as events of many requests arrive."""
    for together in zip(*steps, strict=True):
        yield from together


def everything(block: int) -> bool:
    return True


def every_tenth_missing(rank: int) -> Callable[[int], bool]:
    return lambda block: (block * 2654435761 + rank * 40503) % 97 >= 10


CASES = ("all", "four", "none", "staggered", "holes", "no sliding", "one by one")
WITH_TOKENS = ("all", "four", "none")
#: Stored a block at a time, the prompts taking turns: no two blocks of one are neighbours in memory.
ONE_BY_ONE = "one by one"


def prompts_of(case: str, dice: random.Random) -> list[Chain]:
    prompts = []
    for _ in range(PROMPTS_A_CASE):
        tokens = [dice.randrange(260_000) for _ in range(LONG * BLOCK)] if case in WITH_TOKENS else None
        blocks = block_hashes(tokens, BLOCK) if tokens else [dice.getrandbits(64) for _ in range(LONG)]
        prompts.append(Chain.of(blocks, None, tokens))
    return prompts


def steps_of(case: str, prompts: Sequence[Chain]) -> Iterator[Step]:
    """How the prompts of a case came to be resident: the events of all of them in turn."""
    if case == "staggered":
        for rank in range(64):
            yield from (Step(prompt, rank, 0, LONG * (rank + 1) // 64) for prompt in prompts)
        return
    ranks = {"none": (), "four": (3, 17, 31, 62), ONE_BY_ONE: (0,)}.get(case, tuple(range(64)))
    for rank in ranks:
        size = 1 if case == ONE_BY_ONE else EVENT if rank == ranks[0] else 128
        sliding = {"holes": every_tenth_missing(rank), "no sliding": lambda block: False}.get(
            case, everything
        )
        yield from interleaved([by_event(prompt, rank, size, sliding=sliding) for prompt in prompts])


def filler(dice: random.Random, blocks: int) -> Iterator[Step]:
    """Chains of one rank each, the events of eight at a time interleaved."""
    size = min(LONG, max(EVENT, blocks // 8 // EVENT * EVENT))
    for number in range(0, blocks // size, 8):
        chains = [Chain.of([dice.getrandbits(64) for _ in range(size)]) for _ in range(8)]
        yield from interleaved([by_event(chain, (number + at) % 64) for at, chain in enumerate(chains)])


def load(sides: Sequence[Side], steps: Iterator[Step]) -> None:
    for step in steps:
        for side in sides:
            for event in side.stored(step):
                side.apply(step.rank, event)
