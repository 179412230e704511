"""What of a model's ``config.json`` decides vLLM's cache groups: what its layers keep. Local files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.files import read_json_object

from .grouping import Layer

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
#: Layers of linear attention keep a state there whose size is known: gated delta networks.
_DELTA = ("qwen3_next", "qwen3_5")
#: In these families each so many-th layer has global attention, where config.json lists no kinds of layers.
_PATTERNS = {
    "cohere2": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3_text": 6,
    "gemma3n": 5,
    "gemma3n_text": 5,
    "gpt_oss": 2,
}
#: Of Gemma 3, where config.json leaves it out as it does for the models with 4B parameters and more.
_GEMMA3 = {"max_position_embeddings": 131_072, "sliding_window": 4_096, "vocab_size": 262_208}
#: What vLLM keeps in another way than one block size for all layers: its groups cannot be told from here.
_OTHERWISE = {
    "attn_layer_period": "state space layers",
    "compress_ratios": "compressed attention",
    "hybrid_override_pattern": "state space layers",
    "layers_block_type": "state space layers",
    "linear_attn_config": "linear attention of another kind",
}
#: Bytes of a number, by the names that vLLM's options and config.json have for them.
_WIDTHS = {"auto": 2, "float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
#: More is a mistake in the file: windows are listed layer by layer.
_MOST_LAYERS, _MOST_TOKENS = 4_096, 1 << 30


class Precision(NamedTuple):
    """What of the engine's options decides how many bytes a layer keeps; the names are vLLM's.

    :param tensor_parallel_size: GPUs among which the heads of a layer are divided.
    """

    tensor_parallel_size: int = 1
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    mamba_cache_dtype: str = "auto"
    mamba_ssm_cache_dtype: str = "auto"


DEFAULT_PRECISION = Precision()


class ModelShape(NamedTuple):
    """:param layers: those that keep a cache of their own.
    :param context_length: in tokens; ``vocab_size``; None where config.json lacks them.
    """

    layers: tuple[Layer, ...]
    context_length: int | None
    vocab_size: int | None


def load_shape(model_path: str, precision: Precision = DEFAULT_PRECISION) -> ModelShape:
    """The shape of the checkpoint in a directory.

    :raises ConfigError: there is none, or it is malformed or of a kind that is not served.
    """
    path = Path(model_path) / "config.json"
    try:
        raw = read_json_object(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"--model-path {model_path}: expected the directory of a Hugging Face checkpoint with a "
            f"config.json, got {error}"
        ) from error
    return parse_shape(raw, str(path), precision)


def parse_shape(raw: Mapping[str, Any], where: str, precision: Precision = DEFAULT_PRECISION) -> ModelShape:
    """The shape in a parsed config.json; of a multimodal model, that of its text part.

    :raises ConfigError: a value of the wrong type, or layers that are not served.
    """
    nested = raw.get("text_config")
    text: dict[str, Any] = dict(nested) if isinstance(nested, dict) else dict(raw)
    model_type = str(text.get("model_type") or raw.get("model_type") or "")
    if model_type.startswith("gemma3"):
        text = {**_GEMMA3, **text}
    for key, what in _OTHERWISE.items():
        if text.get(key):
            raise ConfigError(
                f"{where}: expected full, sliding and linear attention as of Gemma, gpt-oss and Qwen, got "
                f"{what} ({key}); --engine vllm does not serve such models yet"
            )
    layers = _positive(text, "num_hidden_layers", where, _MOST_LAYERS)
    if layers is None:
        raise ConfigError(f"{where}: expected num_hidden_layers, got none")
    kinds = _kinds(text, model_type, layers, where)
    sizes = _Sizes(text, model_type, precision, where)
    # The last layers of some models read the cache of earlier ones, and have none.
    shared = _positive(text, "num_kv_shared_layers", where, or_none=True) or 0
    return ModelShape(
        tuple(map(sizes.layer, kinds[: max(1, layers - shared)])),
        _positive(text, "max_position_embeddings", where),
        _positive(text, "vocab_size", where),
    )


class _Sizes:
    """How many bytes the layers of a model keep, by what its config.json says; 1 where all keep as many."""

    def __init__(self, text: Mapping[str, Any], model_type: str, precision: Precision, where: str) -> None:
        self._text, self._where, self._precision = text, where, precision
        self._several = model_type.startswith("gemma4") or model_type.startswith(_DELTA)
        if not self._several and (text.get("global_head_dim") or text.get("num_global_key_value_heads")):
            raise ConfigError(
                f"{where}: expected heads of one size in a model of the type {model_type!r}, got those of "
                "several (global_head_dim); --engine vllm does not serve such models yet"
            )

    def layer(self, kind: int | str | None) -> Layer:
        if kind == _LINEAR:
            return Layer(None, self._state(), recurrent=True)
        assert not isinstance(kind, str)
        return Layer(kind, self._token(kind is None) if self._several else 1)

    def _token(self, is_global: bool) -> int:
        """Keys and values of a token."""
        heads, size = self._number("num_key_value_heads"), self._number("head_dim")
        if is_global:
            size = _positive(self._text, "global_head_dim", self._where, or_none=True) or size
            if self._text.get("attention_k_eq_v"):
                shared = _positive(self._text, "num_global_key_value_heads", self._where, or_none=True)
                heads = shared or heads
        width = self._width(self._precision.kv_cache_dtype)
        return 2 * width * size * max(1, heads // self._precision.tensor_parallel_size)

    def _state(self) -> int:
        """A state of a gated delta network: that of its convolution, and a matrix for each head."""
        heads, width = self._number("linear_num_value_heads"), self._number("linear_value_head_dim")
        keys = self._number("linear_num_key_heads") * self._number("linear_key_head_dim")
        convolution = (self._number("linear_conv_kernel_dim") - 1) * (2 * keys + heads * width)
        matrices = heads * width * self._number("linear_key_head_dim")
        kept = self._width(self._precision.mamba_cache_dtype)
        stated = self._precision.mamba_ssm_cache_dtype
        if stated == "auto":
            stated = self._text.get("mamba_ssm_dtype") or self._precision.mamba_cache_dtype
        whole = convolution * kept + matrices * self._width(stated)
        return whole // self._precision.tensor_parallel_size

    def _width(self, name: object) -> int:
        """Bytes of a number; ``auto``: as the model computes, which is in 16 bits unless it is told."""
        return _WIDTHS.get(str(self._precision.dtype if name == "auto" else name), 1)

    def _number(self, key: str) -> int:
        value = _positive(self._text, key, self._where)
        if value is None:
            raise ConfigError(f"{self._where}: expected {key}, by which vLLM sizes the blocks, got none")
        return value


def _kinds(text: Mapping[str, Any], model_type: str, layers: int, where: str) -> tuple[int | str | None, ...]:
    """The window of each layer, None where it sees all, or that its attention is linear."""
    window = _positive(text, "sliding_window", where, or_none=True)
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        return _listed(kinds, window, layers, model_type, where)
    if model_type.startswith(_DELTA):
        every = _positive(text, "full_attention_interval", where, _MOST_LAYERS) or 4
        return tuple(_LINEAR if (layer + 1) % every else None for layer in range(layers))
    if text.get("full_attention_interval"):
        raise ConfigError(
            f"{where}: expected a model of the types {', '.join(_DELTA)} where attention is linear "
            f"(full_attention_interval), got {model_type!r}; --engine vllm does not serve such models yet"
        )
    if window is None or not text.get("use_sliding_window", not model_type.startswith("qwen")):
        return (None,) * layers
    if "max_window_layers" in text:
        first = _positive(text, "max_window_layers", where, or_none=True) or 0
        return tuple(None if layer < first else window for layer in range(layers))
    # Hugging Face's name had a leading underscore for some releases.
    name = "sliding_window_pattern" if text.get("sliding_window_pattern") else "_sliding_window_pattern"
    pattern = _positive(text, name, where, _MOST_LAYERS) or _PATTERNS.get(model_type)
    if pattern is None:
        return (window,) * layers
    return tuple(window if (layer + 1) % pattern else None for layer in range(layers))


def _listed(
    kinds: list[Any], window: int | None, layers: int, model_type: str, where: str
) -> tuple[int | str | None, ...]:
    if len(kinds) != layers:
        raise ConfigError(f"{where}: layer_types: expected one for each of {layers} layers, got {len(kinds)}")
    known = [_FULL, _SLIDING, *[_LINEAR] * model_type.startswith(_DELTA)]
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ConfigError(
            f"{where}: layer_types: expected {' and '.join(known)} alone, got {shown(unknown[0])}; "
            "--engine vllm does not serve such models yet"
        )
    if window is None and _SLIDING in kinds:
        raise ConfigError(f"{where}: expected a sliding_window, because layer_types has {_SLIDING}, got none")
    of_kind: dict[str, int | str | None] = {_FULL: None, _SLIDING: window, _LINEAR: _LINEAR}
    return tuple(of_kind[kind] for kind in kinds)


def _positive(
    text: Mapping[str, Any], key: str, where: str, most: int = _MOST_TOKENS, *, or_none: bool = False
) -> int | None:
    """:param or_none: some checkpoints say 0 for none."""
    value = text.get(key)
    if value is None or (or_none and not value):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ConfigError(f"{where}: {key}: expected an integer in [1, {most}], got {shown(value)}")
    return value
