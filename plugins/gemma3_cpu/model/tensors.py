"""The tensors of a Gemma 3 text model: names, shapes, and what a source of them offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vswa_plugin.errors import ConfigError

from .config import Gemma3Config

Float32 = NDArray[np.float32]

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_MAX_NAMES = 5


class TensorSource(Protocol):
    """Named tensors of a Gemma 3 text model under canonical names, e.g. ``layers.0.mlp.up_proj.weight``."""

    #: Where the tensors come from, for messages.
    where: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor, without reading it."""

    def read(self, name: str) -> Float32:
        """One tensor as a contiguous float32 array that the caller may keep and change."""


def expected_shapes(config: Gemma3Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model with its shape."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        "norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _layer_shapes(config).items()}
    return shapes


def check_tensors(config: Gemma3Config, source: TensorSource) -> None:
    """Compare names and shapes with the configuration, before anything is read.

    :raises ConfigError: names what is missing, left over, or of another shape.
    """
    expected, actual = expected_shapes(config), dict(source.shapes())
    if config.tie_word_embeddings:
        actual.pop(HEAD, None)
    missing, extra = expected.keys() - actual.keys(), actual.keys() - expected.keys()
    if missing:
        raise ConfigError(f"{source.where}: missing {_some(missing)} of a Gemma 3 of {_size(config)}")
    if extra:
        raise ConfigError(f"{source.where}: unknown {_some(extra)} for a Gemma 3 of {_size(config)}")
    for name, shape in expected.items():
        if actual[name] != shape:
            raise ConfigError(
                f"{source.where}: tensor {name}: expected shape {list(shape)} by config.json, "
                f"got {list(actual[name])}"
            )


def _layer_shapes(config: Gemma3Config) -> dict[str, tuple[int, ...]]:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (dim,),
        "self_attn.k_norm.weight": (dim,),
        "post_attention_layernorm.weight": (hidden,),
        "pre_feedforward_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "post_feedforward_layernorm.weight": (hidden,),
    }
    if config.attention_bias:
        for name, size in (("q", queries), ("k", keys), ("v", keys), ("o", hidden)):
            shapes[f"self_attn.{name}_proj.bias"] = (size,)
    return shapes


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _MAX_NAMES} more" if len(ordered) > _MAX_NAMES else ""
    return f"tensor {', '.join(ordered[:_MAX_NAMES])}{more}"


def _size(config: Gemma3Config) -> str:
    return f"{config.num_hidden_layers} layers, hidden {config.hidden_size}"
