"""Paged storage of keys and values, and how a chunk finds its part. Cache managers decide who owns a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vswa_plugin.errors import InvariantError

from .config import Gemma3Config

#: From this mean length of a run (tokens) on, a matrix product per run is cheaper than one gather.
_SHORT_RUN = 128
_FEW_RUNS = 4
#: So it is for a few queries where a mean run has this many numbers of keys: then the copy is what costs. One
#: query over 4,096 tokens in single blocks of 32 took 1 ms by runs and 10 ms by a gather where a head has 256
#: numbers, and 0.7 ms against 0.2 where it has 16.
_FEW_QUERIES = 32
_WIDE_RUN = 4096


def group_layers(config: Gemma3Config) -> list[list[int]]:
    """Layers of each cache group, in the order of ``config.groups``."""
    windows = config.windows()
    return [[layer for layer, window in enumerate(windows) if window == group] for group in config.groups]


class KVStore(Protocol):
    """What the model reads and writes.

    :ivar block_size: tokens of a page.
    :ivar k: per group of the model: [layers in the group, kv_heads, slots, head_dim] in float32, where page p
        has the slots [p * block_size, (p + 1) * block_size); ``v`` too.
    """

    block_size: int
    k: list[NDArray[np.float32]]
    v: list[NDArray[np.float32]]


class PagedKV:
    """Keys and values of all layers in float32, per cache group in pages of ``block_size`` tokens.

    :param group_layers: layers of each group, from :func:`group_layers`.
    :param num_blocks: pages of each group.
    :raises InvariantError: not one number of blocks per group.
    """

    def __init__(
        self, config: Gemma3Config, group_layers: list[list[int]], num_blocks: list[int], block_size: int
    ) -> None:
        if len(group_layers) != len(num_blocks):
            raise InvariantError(f"{len(group_layers)} cache groups and {len(num_blocks)} numbers of blocks")
        self.block_size = block_size
        self.num_blocks = tuple(num_blocks)
        self.group_layers = tuple(tuple(layers) for layers in group_layers)
        heads, dim = config.num_key_value_heads, config.head_dim
        shapes = [
            (len(layers), heads, blocks * block_size, dim)
            for layers, blocks in zip(group_layers, num_blocks, strict=True)
        ]
        #: Per group: [layers in the group, kv_heads, num_blocks * block_size, head_dim].
        self.k = [np.zeros(shape, dtype=np.float32) for shape in shapes]
        self.v = [np.zeros(shape, dtype=np.float32) for shape in shapes]


class Run(NamedTuple):
    """Consecutive positions [start, stop) of a sequence in consecutive slots of the store from ``slot``."""

    start: int
    stop: int
    slot: int


def find_runs(table: Sequence[int], block_size: int, start: int, stop: int) -> list[Run]:
    """Runs that hold the positions [start, stop), in order, as long as possible.

    :param table: block index -> page id; -1 where there is none.
    :raises InvariantError: a position without a page.
    """
    first, last = start // block_size, (stop - 1) // block_size
    if last >= len(table):
        raise InvariantError(
            f"positions [{start}, {stop}) need block {last}, the page table has {len(table)} blocks"
        )
    runs: list[Run] = []
    run_block, run_page = first, table[first]
    for block in range(first, last + 1):
        page = table[block]
        if page < 0:
            raise InvariantError(f"positions [{start}, {stop}) need block {block}, which has no page")
        if page - run_page != block - run_block:
            runs.append(_run(run_block, block, run_page, block_size))
            run_block, run_page = block, page
    runs.append(_run(run_block, last + 1, run_page, block_size))
    return clip_runs(runs, start, stop)


def _run(block: int, stop_block: int, page: int, block_size: int) -> Run:
    return Run(block * block_size, stop_block * block_size, page * block_size)


def clip_runs(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """The part of the runs that lies in the positions [start, stop)."""
    clipped = []
    for run in runs:
        low, high = max(run.start, start), min(run.stop, stop)
        if low < high:
            clipped.append(Run(low, high, run.slot + low - run.start))
    return clipped


def pays_to_gather(runs: Sequence[Run], queries: int, width: int) -> bool:
    """Whether the runs are so many and short that copying them together once per layer is cheaper.

    :param width: numbers in one layer's keys of one token.
    """
    tokens = runs[-1].stop - runs[0].start
    if len(runs) <= max(_FEW_RUNS, tokens // _SHORT_RUN):
        return False
    return queries >= _FEW_QUERIES or tokens * width < _WIDE_RUN * len(runs)


def slots_of(runs: Sequence[Run]) -> NDArray[np.intp]:
    """Slot of each position of the runs, in order."""
    return np.concatenate([np.arange(run.slot, run.slot + run.stop - run.start) for run in runs])
