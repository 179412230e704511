"""Attention of one chunk over the paged store: causal, windowed, grouped heads, no copy of the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .paged import KVStore, Run, clip_runs, find_runs, pays_to_gather, slots_of
from .tensors import Float32

#: Where every score lies within this distance of 0, softmax leaves out its maximum: exp of it times any
#: number of positions stays far from the limits of float32 (e^88).
LARGEST_BOUND = 60.0
#: Scores computed at a time are kept near this many floats, so that softmax runs in cache.
_TILE_SCORES = 1 << 18
_MIN_TILE, _MAX_TILE = 16, 128
#: [r, c] is -inf where c > r: what a query must not see of the tile's own keys.
_FUTURE = np.triu(np.full((_MAX_TILE, _MAX_TILE), -np.inf, dtype=np.float32), 1)
#: [r, c] is -inf where c < r: keys that left the window of row r, if row 0 still sees column 0.
_PAST = np.ascontiguousarray(_FUTURE.T)


class _Tokens(Protocol):
    """The part of a chunk that planning reads."""

    token_ids: NDArray[np.integer[Any]]
    start: int
    tables: Sequence[Sequence[int]]


class ChunkPlan(NamedTuple):
    """Where one chunk's keys and values lie in one cache group; the same for all layers of the group.

    :param row: row of the chunk's first query in the batch.
    :param start: position of the first query; ``stop`` is one past the last.
    :param window: tokens that a query sees, itself included; None = all before it.
    :param visible: runs of all positions that some query sees.
    :param writes: runs of the chunk's own positions.
    :param width: numbers in one layer's keys of one token.
    :param gather: slots of all visible positions, where the runs are too fragmented to be used one by one.
    """

    row: int
    start: int
    stop: int
    window: int | None
    visible: list[Run]
    writes: list[Run]
    width: int
    gather: NDArray[np.intp] | None

    def last_row(self, row: int) -> ChunkPlan:
        """The plan of the last query alone, as row ``row`` of a batch; its key is already written."""
        start = self.stop - 1
        low = 0 if self.window is None else max(0, self.stop - self.window)
        visible = clip_runs(self.visible, low, self.stop)
        return _plan(row, start, self.stop, self.window, visible, self.width)


def plan_chunk(chunk: _Tokens, row: int, group: int, window: int | None, kv: KVStore) -> ChunkPlan:
    """Find the runs of one chunk in one cache group.

    :raises InvariantError: a position that is computed or seen has no page.
    """
    start, stop = chunk.start, chunk.start + len(chunk.token_ids)
    low = 0 if window is None else max(0, start + 1 - window)
    _, heads, _, dim = kv.k[group].shape
    visible = find_runs(chunk.tables[group], kv.block_size, low, stop)
    return _plan(row, start, stop, window, visible, heads * dim)


def _plan(row: int, start: int, stop: int, window: int | None, visible: list[Run], width: int) -> ChunkPlan:
    gather = slots_of(visible) if pays_to_gather(visible, stop - start, width) else None
    return ChunkPlan(row, start, stop, window, visible, clip_runs(visible, start, stop), width, gather)


def attend(
    queries: Float32, plan: ChunkPlan, keys: Float32, values: Float32, out: Float32, *, bounded: bool
) -> None:
    """Attention of the plan's queries over one layer's store.

    :param queries: [n, heads, head_dim], rotated and scaled.
    :param keys: [kv_heads, slots, head_dim]; ``values`` too.
    :param out: [n, heads, head_dim], written.
    :param bounded: no score is beyond :data:`LARGEST_BOUND` either way.
    """
    visible = plan.visible
    if plan.gather is not None:
        keys, values = keys.take(plan.gather, axis=1), values.take(plan.gather, axis=1)
        visible = [Run(visible[0].start, visible[-1].stop, 0)]
    n, heads, dim = queries.shape
    kv_heads = len(keys)
    if n == 1:
        scores = _scores(queries.reshape(kv_heads, -1, dim), keys, visible)
        out.reshape(kv_heads, -1, dim)[:] = _softmax_mix(scores, values, visible, bounded)
        return
    grouped = queries.reshape(n, kv_heads, -1, dim)
    grouped_out = out.reshape(n, kv_heads, -1, dim)
    span = plan.stop - visible[0].start
    tile = max(_MIN_TILE, min(_MAX_TILE, _TILE_SCORES // (heads * span)))
    for first in range(0, n, tile):
        last = min(first + tile, n)
        start, stop = plan.start + first, plan.start + last
        low = 0 if plan.window is None else max(0, start + 1 - plan.window)
        runs = clip_runs(visible, low, stop)
        # [kv_heads, rows * heads per kv head, dim]: one matrix product for the heads that share keys.
        scores = _scores(grouped[first:last].swapaxes(0, 1).reshape(kv_heads, -1, dim), keys, runs)
        _mask(scores.reshape(kv_heads, last - first, -1, stop - low), start, low, plan.window)
        mixed = _softmax_mix(scores, values, runs, bounded)
        grouped_out[first:last] = mixed.reshape(kv_heads, last - first, -1, dim).swapaxes(0, 1)


def _scores(queries: Float32, keys: Float32, runs: Sequence[Run]) -> Float32:
    if len(runs) == 1:
        run = runs[0]
        single: Float32 = queries @ _slots(keys, run).swapaxes(1, 2)
        return single
    low = runs[0].start
    scores = np.empty((*queries.shape[:2], runs[-1].stop - low), dtype=np.float32)
    for run in runs:
        run_keys = _slots(keys, run).swapaxes(1, 2)
        np.matmul(queries, run_keys, out=scores[:, :, run.start - low : run.stop - low])
    return scores


def _mask(scores: Float32, start: int, low: int, window: int | None) -> None:
    """Hide what each row must not see. ``scores`` [kv_heads, rows, heads per kv head, keys from ``low``]."""
    rows, span = scores.shape[1], scores.shape[3]
    scores[..., span - rows :] += _FUTURE[:rows, None, :rows]
    if window is None:
        return
    # Row r sees keys from start + r + 1 - window; ``unclipped`` rows still see the key at ``low``.
    unclipped = max(0, low - (start + 1 - window))
    late = rows - unclipped
    if late > 1:
        scores[:, unclipped:, :, :late] += _PAST[:late, None, :late]


def _softmax_mix(scores: Float32, values: Float32, runs: Sequence[Run], bounded: bool) -> Float32:
    """softmax(scores) @ values over all runs; overwrites ``scores``."""
    if not bounded:
        scores -= scores.max(axis=2, keepdims=True)
    np.exp(scores, scores)
    # A product with ones adds up several times faster than sum().
    total = scores @ np.ones(scores.shape[2], dtype=np.float32)
    low = runs[0].start
    mixed: Float32 | None = None
    for run in runs:
        part = scores[:, :, run.start - low : run.stop - low] @ _slots(values, run)
        mixed = part if mixed is None else np.add(mixed, part, mixed)
    assert mixed is not None
    mixed /= total[..., None]
    return mixed


def _slots(store: Float32, run: Run) -> Float32:
    """The run's part of a layer's keys or values, without a copy: [kv_heads, positions, head_dim]."""
    return store[:, run.slot : run.slot + run.stop - run.start]
