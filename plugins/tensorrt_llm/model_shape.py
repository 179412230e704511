"""What of a model's ``config.json`` matters for its cache: windows, context, vocabulary. Local files only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.files import read_json_object

_SLIDING = "sliding_attention"
#: Where config.json leaves it out, as it does for the Gemma 3 models with 4B parameters and more.
_GEMMA3 = {"sliding_window_pattern": 6, "max_position_embeddings": 131_072, "sliding_window": 4096}
#: More is a mistake in the file: windows are listed layer by layer.
_MOST = {"num_hidden_layers": 4_096, "sliding_window_pattern": 4_096}
_MOST_TOKENS = 1 << 30


class ModelShape(NamedTuple):
    """:param windows: attention window of each layer in tokens; None: global.
    :param context_length: in tokens; None where config.json lacks it.
    :param vocab_size: None where config.json lacks it.
    :param architecture: e.g. ``Gemma3ForCausalLM``; empty where config.json lacks it.
    """

    windows: tuple[int | None, ...]
    context_length: int | None
    vocab_size: int | None
    architecture: str


def load_shape(model_path: str, *, weights: bool) -> ModelShape:
    """Check that the directory holds a model and read its shape.

    :param weights: whether it must hold weights too.
    :raises ConfigError: what is missing or malformed, with its path.
    """
    directory = Path(model_path)
    path = directory / "config.json"
    try:
        raw = read_json_object(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"--model-path {model_path}: expected the directory of a Hugging Face checkpoint with a "
            f"config.json, got {error}"
        ) from error
    if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer.model").is_file():
        raise ConfigError(f"{directory}: expected a tokenizer.json or tokenizer.model, found neither")
    if weights and not {".safetensors", ".bin"} & {file.suffix for file in directory.iterdir()}:
        raise ConfigError(f"{directory}: expected weights (*.safetensors or *.bin), found none")
    return parse_shape(raw, str(path))


def parse_shape(raw: Mapping[str, Any], where: str) -> ModelShape:
    """The shape in a parsed config.json; of a multimodal model, that of its text part.

    :raises ConfigError: a value of the wrong type.
    """
    nested = raw.get("text_config")
    text: dict[str, Any] = dict(nested) if isinstance(nested, dict) else dict(raw)
    if str(text.get("model_type") or raw.get("model_type") or "").startswith("gemma3"):
        # Hugging Face's name had a leading underscore for some releases.
        text.setdefault("sliding_window_pattern", text.get("_sliding_window_pattern") or 6)
        text = {**_GEMMA3, **text}
    layers = _positive(text, "num_hidden_layers", where)
    if layers is None:
        raise ConfigError(f"{where}: expected num_hidden_layers, got none")
    architectures = raw.get("architectures")
    return ModelShape(
        _windows(text, layers, where),
        _positive(text, "max_position_embeddings", where),
        _positive(text, "vocab_size", where),
        str(architectures[0]) if isinstance(architectures, list) and architectures else "",
    )


def _windows(text: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    window = _positive(text, "sliding_window", where)
    if window is None or text.get("use_sliding_window") is False:
        return (None,) * layers
    types = text.get("layer_types")
    if isinstance(types, list):
        if len(types) != layers:
            raise ConfigError(
                f"{where}: layer_types: expected one for each of {layers} layers, got {len(types)}"
            )
        return tuple(window if kind == _SLIDING else None for kind in types)
    pattern = _positive(text, "sliding_window_pattern", where)
    if pattern is None:
        return (window,) * layers
    return tuple(window if (layer + 1) % pattern else None for layer in range(layers))


def _positive(text: Mapping[str, Any], key: str, where: str) -> int | None:
    value = text.get(key)
    if value is None:
        return None
    most = _MOST.get(key, _MOST_TOKENS)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ConfigError(
            f"{where}: {key}: expected a positive integer of at most {most}, got {shown(value)}"
        )
    return value
