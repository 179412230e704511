"""Gemma 3 in NumPy float32 over a paged KV store: a batch of chunks in, logits of their last tokens out.

Linear layers run over the tokens of all chunks at once, attention per chunk. What can be done once is done
at load: q, k, v and gate, up are one matrix each, the weight of the norm before them is multiplied in, and
the query scale sits in the weight of the query norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .attention import ChunkPlan, attend, plan_chunk
from .config import Gemma3Config, load_config
from .paged import PagedKV, group_layers
from .rope import RopeTable, interleave
from .weights import Float32, SafetensorsSource, TensorSource, check_tensors

__all__ = ["Chunk", "Gemma3Model", "PagedKV", "group_layers", "load_model"]

_GELU_CUBIC = np.float32(0.044715)
_GELU_SCALE = np.float32(np.sqrt(2 / np.pi))


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
    out: Float32
    out_bias: Float32 | None
    post_attention: Float32
    gate_up: Float32
    down: Float32
    post_feedforward: Float32
    group: int
    index_in_group: int


def load_model(model_dir: str | Path, config: Gemma3Config | None = None) -> Gemma3Model:
    """The model of a Hugging Face directory.

    :raises ConfigError: the directory, its config.json or its tensors do not fit.
    """
    return Gemma3Model(config or load_config(model_dir), SafetensorsSource(model_dir))


class Gemma3Model:
    """Weights and the forward pass. Holds no state of any sequence; one thread at a time.

    :raises ConfigError: tensors of ``source`` that do not fit ``config``.
    """

    def __init__(self, config: Gemma3Config, source: TensorSource) -> None:
        check_tensors(config, source)
        self.config = config
        self._embed = source.read("embed_tokens.weight")
        self._head = self._embed if config.tie_word_embeddings else source.read("lm_head.weight")
        self._norm = source.read("norm.weight") + 1
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

    def forward(self, chunks: Sequence[Chunk], kv: PagedKV) -> Float32:
        """Compute the chunks, write their keys and values into ``kv``, return logits.

        :returns: float32 [number of chunks with want_logits, vocab_size], in chunk order.
        :raises InvariantError: a page that is needed is missing in a chunk's table.
        """
        token_ids = np.concatenate([chunk.token_ids for chunk in chunks])
        offsets = np.cumsum([0] + [len(chunk.token_ids) for chunk in chunks]).tolist()
        positions = np.concatenate(
            [np.arange(chunk.start, chunk.start + len(chunk.token_ids)) for chunk in chunks]
        )
        rotations = [table.upto(int(positions.max()) + 1)[positions][:, None] for table in self._ropes]
        plans = [
            [
                plan_chunk(chunk, offset, group, window, kv)
                for chunk, offset in zip(chunks, offsets, strict=False)
            ]
            for group, window in enumerate(self.config.groups)
        ]
        wanted = [chunk.want_logits for chunk in chunks]
        rows = np.array(
            [end - 1 for end, want in zip(offsets[1:], wanted, strict=True) if want], dtype=np.intp
        )
        x = self._embed[token_ids]
        x *= np.float32(self.config.hidden_size**0.5)
        for layer in self._layers[:-1]:
            qkv = self._project(layer, x, rotations[layer.group])
            self._write(layer, qkv, plans[layer.group], kv)
            x = self._finish(layer, x, self._attend(layer, qkv, plans[layer.group], kv))
        # Of the last layer only the rows whose logits are wanted go past keys and values.
        layer = self._layers[-1]
        qkv = self._project(layer, x, rotations[layer.group])
        self._write(layer, qkv, plans[layer.group], kv)
        if not len(rows):
            return np.empty((0, self.config.vocab_size), dtype=np.float32)
        last = [plan.last_row(row) for row, plan in enumerate(_where(plans[layer.group], wanted))]
        x = self._finish(layer, x[rows], self._attend(layer, qkv[rows], last, kv))
        return self._logits(x)

    def _project(self, layer: _Layer, x: Float32, rotation: NDArray[np.complex64]) -> Float32:
        """Rotated queries and keys, and values: [N, heads + 2 kv_heads, head_dim]."""
        config = self.config
        qkv: Float32 = _normed(x, config.rms_norm_eps) @ layer.qkv
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        qkv = qkv.reshape(len(x), -1, config.head_dim)
        qk = qkv[:, : -config.num_key_value_heads]
        qk *= _inverse_rms(qk, config.rms_norm_eps)[..., None]
        qk *= layer.qk_norm
        pairs = qk.view(np.complex64)
        pairs *= rotation
        return qkv

    def _write(self, layer: _Layer, qkv: Float32, plans: Sequence[ChunkPlan], kv: PagedKV) -> None:
        kv_heads = self.config.num_key_value_heads
        keys = kv.k[layer.group][layer.index_in_group]
        values = kv.v[layer.group][layer.index_in_group]
        for plan in plans:
            for run in plan.writes:
                rows = slice(plan.row + run.start - plan.start, plan.row + run.stop - plan.start)
                slots = slice(run.slot, run.slot + run.stop - run.start)
                keys[:, slots] = qkv[rows, -2 * kv_heads : -kv_heads].swapaxes(0, 1)
                values[:, slots] = qkv[rows, -kv_heads:].swapaxes(0, 1)

    def _attend(self, layer: _Layer, qkv: Float32, plans: Sequence[ChunkPlan], kv: PagedKV) -> Float32:
        """Attention output before the output projection: [N, heads * head_dim]."""
        config = self.config
        heads = config.num_attention_heads
        out = np.empty((len(qkv), heads, config.head_dim), dtype=np.float32)
        keys = kv.k[layer.group][layer.index_in_group]
        values = kv.v[layer.group][layer.index_in_group]
        for plan in plans:
            rows = slice(plan.row, plan.row + plan.stop - plan.start)
            attend(qkv[rows, :heads], plan, keys, values, out[rows])
        return out.reshape(len(qkv), -1)

    def _finish(self, layer: _Layer, x: Float32, attended: Float32) -> Float32:
        """The layer after attention: output projection, feed-forward, both residuals. Changes ``x``."""
        eps = self.config.rms_norm_eps
        mixed: Float32 = attended @ layer.out
        if layer.out_bias is not None:
            mixed += layer.out_bias
        x += _scaled_norm(mixed, layer.post_attention, eps)
        x += _scaled_norm(_feed_forward(layer, _normed(x, eps)), layer.post_feedforward, eps)
        return x

    def _logits(self, x: Float32) -> Float32:
        logits: Float32 = _scaled_norm(x, self._norm, self.config.rms_norm_eps) @ self._head.T
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits /= np.float32(cap)
            np.tanh(logits, out=logits)
            logits *= np.float32(cap)
        return logits


def _where(plans: Sequence[ChunkPlan], wanted: Sequence[bool]) -> list[ChunkPlan]:
    return [plan for plan, want in zip(plans, wanted, strict=True) if want]


def _inverse_rms(x: Float32, eps: float) -> Float32:
    """1 / root mean square over the last axis, which it drops."""
    power: Float32 = np.einsum("...i,...i->...", x, x)
    power *= np.float32(1 / x.shape[-1])
    power += np.float32(eps)
    np.sqrt(power, out=power)
    return np.reciprocal(power, out=power)


def _normed(x: Float32, eps: float) -> Float32:
    return x * _inverse_rms(x, eps)[:, None]


def _scaled_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """RMSNorm with a weight, in place."""
    x *= _inverse_rms(x, eps)[:, None]
    x *= weight
    return x


def _feed_forward(layer: _Layer, x: Float32) -> Float32:
    gate_up: Float32 = x @ layer.gate_up
    gate, up = np.split(gate_up, 2, axis=1)
    # gelu(g) = g/2 (1 + tanh(c (g + 0.044715 g^3))); the half is in the weights of up.
    inner = gate * gate
    inner *= _GELU_CUBIC * _GELU_SCALE
    inner += _GELU_SCALE
    inner *= gate
    np.tanh(inner, out=inner)
    inner += 1
    inner *= gate
    inner *= up
    down: Float32 = inner @ layer.down
    return down


def _load_layer(config: Gemma3Config, source: TensorSource, layer: int, group: int, index: int) -> _Layer:
    def read(name: str) -> Float32:
        return source.read(f"layers.{layer}.{name}")

    dim, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    query_scale = np.float32(config.query_pre_attn_scalar**-0.5)
    q_norm = interleave((read("self_attn.q_norm.weight") + 1) * query_scale, dim)
    k_norm = interleave(read("self_attn.k_norm.weight") + 1, dim)
    qkv_bias = None
    if config.attention_bias:
        biases = [read(f"self_attn.{name}_proj.bias") for name in "qkv"]
        qkv_bias = np.concatenate([interleave(biases[0], dim), interleave(biases[1], dim), biases[2]])
    return _Layer(
        qkv=_fused(
            read("input_layernorm.weight") + 1,
            interleave(read("self_attn.q_proj.weight"), dim),
            interleave(read("self_attn.k_proj.weight"), dim),
            read("self_attn.v_proj.weight"),
        ),
        qkv_bias=qkv_bias,
        qk_norm=np.concatenate([np.tile(q_norm, (heads, 1)), np.tile(k_norm, (kv_heads, 1))]),
        out=_fused(None, read("self_attn.o_proj.weight")),
        out_bias=read("self_attn.o_proj.bias") if config.attention_bias else None,
        post_attention=read("post_attention_layernorm.weight") + 1,
        gate_up=_fused(
            read("pre_feedforward_layernorm.weight") + 1,
            read("mlp.gate_proj.weight"),
            read("mlp.up_proj.weight") * np.float32(0.5),
        ),
        down=_fused(None, read("mlp.down_proj.weight")),
        post_feedforward=read("post_feedforward_layernorm.weight") + 1,
        group=group,
        index_in_group=index,
    )


def _fused(input_norm: Float32 | None, *matrices: Float32) -> Float32:
    """[out, in] matrices side by side as one [in, out] matrix, with the weight of the norm before it."""
    fused = np.ascontiguousarray(np.concatenate(matrices).T)
    if input_norm is not None:
        fused *= input_norm[:, None]
    return fused
