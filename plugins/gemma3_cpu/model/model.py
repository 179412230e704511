"""Gemma 3 in NumPy float32 over a paged KV store: a batch of chunks in, logits of their last tokens out.

Linear layers run over the tokens of all chunks at once, attention per chunk. What can be done once is done
at load: q, k, v and gate, up are one matrix each, the weight of the norm before them is multiplied in, the
query scale sits in the weight of the query norm, and every norm's sqrt(n) in the weight that follows it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .attention import LARGEST_BOUND, ChunkPlan, attend, plan_chunk
from .config import Gemma3Config
from .paged import KVStore, PagedKV, group_layers
from .rope import RopeTable, interleave
from .tensors import Float32, TensorSource, check_tensors

__all__ = ["Chunk", "Gemma3Model", "PagedKV", "group_layers"]

# tanh(c (g + 0.044715 g^3)) as tanh(g (c + cubic g^2)).
_GELU_SCALE = np.float32(math.sqrt(2 / math.pi))
_GELU_CUBIC = np.float32(0.044715 * math.sqrt(2 / math.pi))
_ONE = np.float32(1)
_TRANSPOSE_ROWS = 256


def _einsum_dot(a: Float32, b: Float32) -> Float32:
    dot: Float32 = np.einsum("...i,...i->...", a, b)
    return dot


#: Dot products over the last axis; ``vecdot`` came with NumPy 2 and takes half the time of a small einsum.
_dot: Callable[[Float32, Float32], Float32] = getattr(np, "vecdot", _einsum_dot)


@dataclass(slots=True)
class Chunk:
    """Consecutive tokens of one sequence that one forward pass computes.

    :param token_ids: [n] integers, n >= 1.
    :param start: position of the first token.
    :param tables: per cache group: block index -> page id, -1 where the group holds no page. Pages of the
        computed positions, and of all that attention sees from them, must be there.
    :param want_logits: whether the logits of the last token are wanted.
    """

    token_ids: NDArray[np.integer[Any]]
    start: int
    tables: Sequence[Sequence[int]]
    want_logits: bool = True


@dataclass(slots=True)
class _Layer:
    """Weights of one layer; matrices are [in, out]."""

    qkv: Float32
    qkv_bias: Float32 | None
    qk_norm: Float32  # [heads + kv_heads, head_dim]
    bounded: bool  # no score can be so large or so small that softmax needs its maximum
    out: Float32
    out_bias: Float32 | None
    post_attention: Float32
    gate_up: Float32
    down: Float32
    post_feedforward: Float32
    group: int
    index_in_group: int


class _GroupPass(NamedTuple):
    """What the layers of one cache group share in one pass."""

    rotation: NDArray[np.complex64]  # [N, 1, head_dim/2]
    plans: list[ChunkPlan]


class Gemma3Model:
    """Weights and the forward pass. Holds no state of any sequence; any number of threads.

    :raises ConfigError: tensors of ``source`` that do not fit ``config``.
    """

    def __init__(self, config: Gemma3Config, source: TensorSource) -> None:
        check_tensors(config, source)
        self.config = config
        # [hidden, vocab]: a product with one row runs over it about twice as fast as over its transpose,
        # and to look tokens up in its columns costs little. So tied embeddings are kept once.
        tied = config.tie_word_embeddings
        self._head = _fused(None, source.read("embed_tokens.weight" if tied else "lm_head.weight"))
        self._embed = None if tied else source.read("embed_tokens.weight")
        self._eps = np.float32(config.rms_norm_eps * config.hidden_size)
        self._head_eps = np.float32(config.rms_norm_eps * config.head_dim)
        self._embed_scale = np.float32(math.sqrt(config.hidden_size))
        self._norm = _norm_weight(source, "norm.weight")
        groups = group_layers(config)
        self._layers = [
            _load_layer(config, source, layer, group, index)
            for layer, group, index in sorted(
                (layer, group, index)
                for group, layers in enumerate(groups)
                for index, layer in enumerate(layers)
            )
        ]
        # One table for each distinct setting: groups may share one.
        tables = {rope: RopeTable(rope, config.head_dim) for rope in map(config.rope, config.groups)}
        self._ropes = [tables[config.rope(window)] for window in config.groups]

    def digest(self) -> str:
        """A digest of a row of each matrix and of the norms; it differs, all but surely, where weights do."""
        summary = hashlib.sha256(self._norm.tobytes())
        for layer in self._layers:
            for part in (layer.qkv[0], layer.qk_norm, layer.down[0], layer.post_attention):
                summary.update(np.ascontiguousarray(part).tobytes())
        return summary.hexdigest()

    def forward(self, chunks: Sequence[Chunk], kv: KVStore) -> Float32:
        """Compute the chunks, write their keys and values into ``kv``, return logits.

        :returns: float32 [number of chunks with want_logits, vocab_size], in chunk order.
        :raises InvariantError: a page that is needed is missing in a chunk's table.
        """
        offsets = [0, *accumulate(len(chunk.token_ids) for chunk in chunks)]
        passes = [self._prepare(chunks, offsets, group, kv) for group in range(len(self._ropes))]
        x = self._lookup(_joined([chunk.token_ids for chunk in chunks]))
        for layer in self._layers[:-1]:
            qkv = self._project(layer, x, passes[layer.group].rotation)
            self._write(layer, qkv, passes[layer.group].plans, kv)
            x = self._finish(layer, x, self._attend(layer, qkv, passes[layer.group].plans, kv))
        # Of the last layer only the rows whose logits are wanted go past keys and values.
        layer = self._layers[-1]
        rotation, plans = passes[layer.group]
        qkv = self._project(layer, x, rotation)
        self._write(layer, qkv, plans, kv)
        rows = [end - 1 for end, chunk in zip(offsets[1:], chunks, strict=True) if chunk.want_logits]
        if not rows:
            return np.empty((0, self.config.vocab_size), dtype=np.float32)
        if len(rows) < len(x):
            wanted = [plan for plan, chunk in zip(plans, chunks, strict=True) if chunk.want_logits]
            plans = [plan.last_row(row) for row, plan in enumerate(wanted)]
            x, qkv = x[rows], qkv[rows]
        return self._logits(self._finish(layer, x, self._attend(layer, qkv, plans, kv)))

    def _prepare(
        self, chunks: Sequence[Chunk], offsets: Sequence[int], group: int, kv: KVStore
    ) -> _GroupPass:
        stops = [chunk.start + len(chunk.token_ids) for chunk in chunks]
        table = self._ropes[group].upto(max(stops))
        rotations = [table[chunk.start : stop] for chunk, stop in zip(chunks, stops, strict=True)]
        window = self.config.groups[group]
        plans = [
            plan_chunk(chunk, row, group, window, kv) for chunk, row in zip(chunks, offsets, strict=False)
        ]
        return _GroupPass(_joined(rotations)[:, None], plans)

    def _lookup(self, token_ids: NDArray[np.integer[Any]]) -> Float32:
        embedded: Float32
        if self._embed is not None:
            embedded = self._embed[token_ids]
        else:
            embedded = np.ascontiguousarray(self._head.take(token_ids, axis=1).T)
        embedded *= self._embed_scale
        return embedded

    def _project(self, layer: _Layer, x: Float32, rotation: NDArray[np.complex64]) -> Float32:
        """Rotated queries and keys, and values: [N, heads + 2 kv_heads, head_dim]."""
        config = self.config
        qkv: Float32 = np.divide(x, _length(x, self._eps)) @ layer.qkv
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        qkv = qkv.reshape(len(x), -1, config.head_dim)
        qk = qkv[:, : -config.num_key_value_heads]
        qk /= _length(qk, self._head_eps)
        qk *= layer.qk_norm
        pairs = qk.view(np.complex64)
        pairs *= rotation
        return qkv

    def _write(self, layer: _Layer, qkv: Float32, plans: Sequence[ChunkPlan], kv: KVStore) -> None:
        kv_heads = self.config.num_key_value_heads
        keys = kv.k[layer.group][layer.index_in_group]
        values = kv.v[layer.group][layer.index_in_group]
        for plan in plans:
            for run in plan.writes:
                rows = slice(plan.row + run.start - plan.start, plan.row + run.stop - plan.start)
                slots = slice(run.slot, run.slot + run.stop - run.start)
                keys[:, slots] = qkv[rows, -2 * kv_heads : -kv_heads].swapaxes(0, 1)
                values[:, slots] = qkv[rows, -kv_heads:].swapaxes(0, 1)

    def _attend(self, layer: _Layer, qkv: Float32, plans: Sequence[ChunkPlan], kv: KVStore) -> Float32:
        """Attention output before the output projection: [N, heads * head_dim]."""
        config = self.config
        heads = config.num_attention_heads
        out = np.empty((len(qkv), heads, config.head_dim), dtype=np.float32)
        keys = kv.k[layer.group][layer.index_in_group]
        values = kv.v[layer.group][layer.index_in_group]
        for plan in plans:
            rows = slice(plan.row, plan.row + plan.stop - plan.start)
            attend(qkv[rows, :heads], plan, keys, values, out[rows], bounded=layer.bounded)
        return out.reshape(len(qkv), -1)

    def _finish(self, layer: _Layer, x: Float32, attended: Float32) -> Float32:
        """The layer after attention: output projection, feed-forward, both residuals. Changes ``x``."""
        eps = self._eps
        mixed: Float32 = attended @ layer.out
        if layer.out_bias is not None:
            mixed += layer.out_bias
        x += _scaled_norm(mixed, layer.post_attention, eps)
        x += _scaled_norm(_feed_forward(layer, np.divide(x, _length(x, eps))), layer.post_feedforward, eps)
        return x

    def _logits(self, x: Float32) -> Float32:
        logits: Float32 = _scaled_norm(x, self._norm, self._eps) @ self._head
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits /= np.float32(cap)
            np.tanh(logits, out=logits)
            logits *= np.float32(cap)
        return logits


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _length(x: Float32, eps: np.float32) -> Float32:
    """Euclidean length over the last axis, which it keeps as 1; ``eps`` is RMSNorm's, times n."""
    power: Float32 = _dot(x, x)
    power += eps
    return np.sqrt(power, power)[..., None]


def _scaled_norm(x: Float32, weight: Float32, eps: np.float32) -> Float32:
    """RMSNorm in place; ``weight`` holds the sqrt(n) that the length leaves out."""
    x /= _length(x, eps)
    x *= weight
    return x


def _feed_forward(layer: _Layer, x: Float32) -> Float32:
    gate_up: Float32 = x @ layer.gate_up
    width = gate_up.shape[1] // 2
    gate, up = gate_up[:, :width], gate_up[:, width:]
    # gelu(g) = g/2 (1 + tanh(c (g + 0.044715 g^3))); the half is in the weights of up.
    inner: Float32 = np.multiply(gate, gate)
    inner *= _GELU_CUBIC
    inner += _GELU_SCALE
    inner *= gate
    np.tanh(inner, inner)
    inner += _ONE
    inner *= gate
    inner *= up
    down: Float32 = inner @ layer.down
    return down


def _load_layer(config: Gemma3Config, source: TensorSource, layer: int, group: int, index: int) -> _Layer:
    def read(name: str) -> Float32:
        return source.read(f"layers.{layer}.{name}")

    def norm(name: str) -> Float32:
        return _norm_weight(source, f"layers.{layer}.{name}.weight")

    dim, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    q_norm = norm("self_attn.q_norm") * np.float32(1 / math.sqrt(config.query_pre_attn_scalar))
    k_norm = norm("self_attn.k_norm")
    qkv_bias: Float32 | None = None
    if config.attention_bias:
        biases = [read(f"self_attn.{name}_proj.bias") for name in "qkv"]
        qkv_bias = np.concatenate([interleave(biases[0], dim), interleave(biases[1], dim), biases[2]])
    return _Layer(
        qkv=_fused(
            norm("input_layernorm"),
            interleave(read("self_attn.q_proj.weight"), dim),
            interleave(read("self_attn.k_proj.weight"), dim),
            read("self_attn.v_proj.weight"),
        ),
        qkv_bias=qkv_bias,
        qk_norm=interleave(np.repeat([q_norm, k_norm], [heads, kv_heads], axis=0).T, dim).T,
        # Rotated unit vectors times their weights: the largest score is the product of the largest weights.
        bounded=float(np.abs(q_norm).max() * np.abs(k_norm).max()) <= LARGEST_BOUND,
        out=_fused(None, read("self_attn.o_proj.weight")),
        out_bias=read("self_attn.o_proj.bias") if config.attention_bias else None,
        post_attention=norm("post_attention_layernorm"),
        gate_up=_fused(
            norm("pre_feedforward_layernorm"),
            read("mlp.gate_proj.weight"),
            read("mlp.up_proj.weight") * np.float32(0.5),
        ),
        down=_fused(None, read("mlp.down_proj.weight")),
        post_feedforward=norm("post_feedforward_layernorm"),
        group=group,
        index_in_group=index,
    )


def _norm_weight(source: TensorSource, name: str) -> Float32:
    """Gemma's norms are stored less 1; ours hold the sqrt(n) that :func:`_length` leaves out."""
    stored = source.read(name)
    return (stored + 1) * np.float32(math.sqrt(stored.size))


def _fused(input_norm: Float32 | None, *matrices: Float32) -> Float32:
    """[out, in] matrices side by side as one [in, out] matrix, with the weight of the norm before it."""
    fused = np.empty((matrices[0].shape[1], sum(map(len, matrices))), dtype=np.float32)
    column = 0
    for matrix in matrices:
        # In blocks: a whole embedding transposed at once takes twice as long.
        for first in range(0, len(matrix), _TRANSPOSE_ROWS):
            block = matrix[first : first + _TRANSPOSE_ROWS]
            fused[:, column : column + len(block)] = block.T
            column += len(block)
    if input_norm is not None:
        fused *= input_norm[:, None]
    return fused
