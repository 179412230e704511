"""What of a model's ``config.json`` decides vLLM's cache groups: the attention of its layers. Local files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vswa_plugin.blocks import CacheGroup
from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.files import read_json_object

_FULL, _SLIDING = "full_attention", "sliding_attention"
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
    "full_attention_interval": "linear attention",
    "global_head_dim": "heads of several sizes",
    "hybrid_override_pattern": "state space layers",
    "layers_block_type": "state space layers",
    "num_global_key_value_heads": "heads of several sizes",
}
#: More is a mistake in the file: windows are listed layer by layer.
_MOST_LAYERS, _MOST_TOKENS = 4_096, 1 << 30


class ModelShape(NamedTuple):
    """:param windows: attention window of each layer that has a cache of its own, in tokens; None: global.
    :param context_length: in tokens; ``vocab_size``; None where config.json lacks them.
    """

    windows: tuple[int | None, ...]
    context_length: int | None
    vocab_size: int | None


def load_shape(model_path: str) -> ModelShape:
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
    return parse_shape(raw, str(path))


def parse_shape(raw: Mapping[str, Any], where: str) -> ModelShape:
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
                f"{where}: expected full and sliding attention with one block size, got {what} ({key}); "
                "--engine vllm does not serve such models yet"
            )
    layers = _positive(text, "num_hidden_layers", where, _MOST_LAYERS)
    if layers is None:
        raise ConfigError(f"{where}: expected num_hidden_layers, got none")
    windows = _windows(text, model_type, layers, where)
    # The last layers of some models read the cache of earlier ones, and have none.
    shared = _positive({**text, "shared": text.get("num_kv_shared_layers") or None}, "shared", where) or 0
    return ModelShape(
        windows[: max(1, layers - shared)],
        _positive(text, "max_position_embeddings", where),
        _positive(text, "vocab_size", where),
    )


def cache_groups(windows: Sequence[int | None], block_size: int) -> tuple[CacheGroup, ...]:
    """The groups that vLLM makes of layers with these windows.

    Kinds of layers come in the order of their first layer. Each is split into groups of as many layers as the
    rarest kind has; of as many as the most frequent one has, where that is less than one and a half times
    as many.
    """
    layers: dict[int | None, int] = {}
    for window in windows:
        layers[window] = layers.get(window, 0) + 1
    fewest, most = min(layers.values()), max(layers.values())
    size = most if 2 * most < 3 * fewest else fewest
    of_groups = [window for window, count in layers.items() for _ in range(-(-count // size))]
    return tuple(CacheGroup(number, window, block_size) for number, window in enumerate(of_groups))


def _windows(text: Mapping[str, Any], model_type: str, layers: int, where: str) -> tuple[int | None, ...]:
    # Some checkpoints say 0 for none.
    window = _positive(
        {**text, "sliding_window": text.get("sliding_window") or None}, "sliding_window", where
    )
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        return _listed(kinds, window, layers, where)
    if window is None or not text.get("use_sliding_window", not model_type.startswith("qwen")):
        return (None,) * layers
    if "max_window_layers" in text:
        first = _positive({"first": text["max_window_layers"] or None}, "first", where) or 0
        return tuple(None if layer < first else window for layer in range(layers))
    # Hugging Face's name had a leading underscore for some releases.
    named = {
        "sliding_window_pattern": text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
    }
    pattern = _positive(named, "sliding_window_pattern", where, _MOST_LAYERS) or _PATTERNS.get(model_type)
    if pattern is None:
        return (window,) * layers
    return tuple(window if (layer + 1) % pattern else None for layer in range(layers))


def _listed(kinds: list[Any], window: int | None, layers: int, where: str) -> tuple[int | None, ...]:
    if len(kinds) != layers:
        raise ConfigError(f"{where}: layer_types: expected one for each of {layers} layers, got {len(kinds)}")
    if unknown := [kind for kind in kinds if kind not in (_FULL, _SLIDING)]:
        raise ConfigError(
            f"{where}: layer_types: expected {_FULL} and {_SLIDING} alone, got {shown(unknown[0])}; "
            "--engine vllm does not serve such models yet"
        )
    if window is None and _SLIDING in kinds:
        raise ConfigError(f"{where}: expected a sliding_window, because layer_types has {_SLIDING}, got none")
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def _positive(text: Mapping[str, Any], key: str, where: str, most: int = _MOST_TOKENS) -> int | None:
    value = text.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ConfigError(f"{where}: {key}: expected an integer in [1, {most}], got {shown(value)}")
    return value
