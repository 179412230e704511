"""A Hugging Face ``config.json`` of a Gemma 3 text model; local checks of a model directory."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vswa_plugin.errors import ConfigError, shown, unknown_choice
from vswa_plugin.files import read_json_object

logger = logging.getLogger(__name__)

TEXT_MODEL_TYPE = "gemma3_text"
MULTIMODAL_MODEL_TYPE = "gemma3"
MODEL_TYPES = (MULTIMODAL_MODEL_TYPE, TEXT_MODEL_TYPE)
SLIDING = "sliding_attention"
FULL = "full_attention"

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"

#: The most that a model of tomorrow may have of each; a larger number is a mistake in the file. Much is sized
#: by these before a tensor is read.
MOST = {
    "num_hidden_layers": 1_024,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "head_dim": 8_192,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
    "sliding_window": 1 << 30,
    "sliding_window_pattern": 1_024,
    "_sliding_window_pattern": 1_024,
}
_MAX_END_TOKENS = 1_024
#: Wavelengths and factors beyond are none of a model, and not all of them are numbers of float32.
_MAX_ROPE = 1e30
#: What a rotary setting may hold; the last one is of no effect in the kinds that are served.
_ROPE_KEYS = ("rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings")


class Rope(msgspec.Struct, frozen=True):
    """Rotary embedding of one layer type: base wavelength, and the factor of linear scaling (1 = none)."""

    theta: float
    factor: float = 1.0


class Gemma3Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that changes the result of a Gemma 3 text model. Defaults are Hugging Face's.

    :param layer_types: one of ``sliding_attention`` and ``full_attention`` per layer.
    :param sliding_window: tokens that a sliding layer's query sees, itself included.
    :param eos_token_ids: from config.json and generation_config.json.
    """

    layer_types: tuple[str, ...]
    vocab_size: int = 262_208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256.0
    sliding_window: int | None = 4096
    rope_sliding: Rope = Rope(10_000.0)
    rope_full: Rope = Rope(1_000_000.0)
    final_logit_softcapping: float | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = (1,)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    def windows(self) -> tuple[int | None, ...]:
        """Attention window of each layer in tokens; None for a global layer."""
        return tuple(self.sliding_window if kind == SLIDING else None for kind in self.layer_types)

    @property
    def groups(self) -> tuple[int | None, ...]:
        """The distinct windows, in the order of the first layer that has each: one cache group each."""
        return tuple(dict.fromkeys(self.windows()))

    def rope(self, window: int | None) -> Rope:
        """The rotary embedding of the layers with that window."""
        return self.rope_full if window is None else self.rope_sliding


class _Fields:
    """Typed reads of one JSON object; errors name the file and the key."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = raw
        self._where = where

    def value(self, key: str, kind: Any, default: Any) -> Any:
        """The value of ``key`` as ``kind``; ``default`` where it is absent or null."""
        raw = self._raw.get(key)
        if raw is None:
            return default
        try:
            return msgspec.convert(raw, kind)
        except (msgspec.ValidationError, OverflowError) as error:
            raise ConfigError(f"{self._where}: {key}: {error}") from error

    def count(self, key: str, default: int) -> int:
        """A positive number that is no larger than in any model."""
        number = int(self.value(key, int, default))
        if number <= 0:
            raise self.fail(key, f"expected a positive number, got {shown(number)}")
        if number > MOST[key]:
            raise self.fail(key, f"expected at most {MOST[key]}, got {shown(number)}")
        return number

    def measure(self, key: str, default: float | None) -> Any:
        """A finite positive number."""
        number = self.value(key, float, default)
        if number is not None and not 0 < number < math.inf:
            raise self.fail(key, f"expected a finite number above 0, got {number}")
        return number

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """The id or ids at ``key``."""
        ids = self.value(key, int | list[int], default)
        if ids is None:
            return ()
        found = (ids,) if isinstance(ids, int) else tuple(ids)
        if len(found) > _MAX_END_TOKENS or not all(0 <= each < MOST["vocab_size"] for each in found):
            raise self.fail(key, f"expected at most {_MAX_END_TOKENS} token ids, got {shown(ids)}")
        return found

    def fail(self, key: str, message: str) -> ConfigError:
        return ConfigError(f"{self._where}: {key}: {message}")


def load_config(model_dir: str | Path) -> Gemma3Config:
    """Check that ``model_dir`` has config, weights and tokenizer, and parse its config.json.

    :raises ConfigError: what is missing or not supported, with its path.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        what = "a file" if directory.exists() else "nothing there"
        raise ConfigError(
            f"model directory {directory}: expected a Hugging Face model directory, found {what}; "
            "`vswa make-model DIR` writes a small random one"
        )
    raw = _read_json(directory / CONFIG_FILE, _why_no_config(directory))
    config = parse_config(raw, str(directory / CONFIG_FILE))
    _check_files(directory)
    return _with_generation_eos(config, directory / GENERATION_CONFIG_FILE)


def _why_no_config(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return "this is a LoRA adapter: give the directory of the model that it was trained for"
    return "a Hugging Face model directory has one"


def parse_config(raw: Mapping[str, Any], where: str = CONFIG_FILE) -> Gemma3Config:
    """The configuration in a parsed config.json; ``where`` is its path, for messages.

    :raises ConfigError: a wrong model_type, a value of the wrong type, or a setting that is not supported.
    """
    text = _text_part(raw, where)
    fields = _Fields(text, where)
    _refuse_unsupported(fields)
    layer_types = _layer_types(fields)
    rope_sliding, rope_full = _ropes(fields)
    heads, kv_heads = fields.count("num_attention_heads", 8), fields.count("num_key_value_heads", 4)
    if heads % kv_heads:
        raise fields.fail(
            "num_key_value_heads", f"expected a divisor of {heads} attention heads, got {kv_heads}"
        )
    head_dim = fields.count("head_dim", 256)
    if head_dim % 2:
        raise fields.fail("head_dim", f"expected an even number, got {head_dim}")
    outer = _Fields(raw, where)
    return Gemma3Config(
        layer_types=layer_types,
        vocab_size=fields.count("vocab_size", 262_208),
        hidden_size=fields.count("hidden_size", 2304),
        intermediate_size=fields.count("intermediate_size", 9216),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.count("max_position_embeddings", 131_072),
        rms_norm_eps=fields.measure("rms_norm_eps", 1e-6),
        query_pre_attn_scalar=fields.measure("query_pre_attn_scalar", 256.0),
        sliding_window=_sliding_window(fields, text, layer_types),
        rope_sliding=rope_sliding,
        rope_full=rope_full,
        final_logit_softcapping=fields.measure("final_logit_softcapping", None),
        attention_bias=fields.value("attention_bias", bool, False),
        tie_word_embeddings=_tied(outer, fields, where),
        bos_token_id=fields.value("bos_token_id", int, 2),
        eos_token_ids=outer.token_ids("eos_token_id", None) or fields.token_ids("eos_token_id", 1),
    )


def _sliding_window(fields: _Fields, text: Mapping[str, Any], layer_types: tuple[str, ...]) -> int | None:
    if SLIDING in layer_types:
        if "sliding_window" in text and text["sliding_window"] is None:
            raise fields.fail("sliding_window", "expected a positive window for the sliding layers, got None")
        return fields.count("sliding_window", 4096)
    return None


def _tied(outer: _Fields, text: _Fields, where: str) -> bool:
    """Where both parts have the key, that of the text part is the last word."""
    key = "tie_word_embeddings"
    whole, part = outer.value(key, bool, None), text.value(key, bool, None)
    if whole is not None and part is not None and whole != part:
        logger.warning(
            "%s: %s is %s, and %s in text_config, which is obeyed",
            where,
            key,
            str(whole).lower(),
            str(part).lower(),
        )
    chosen = whole if part is None else part
    return True if chosen is None else bool(chosen)


def _read_json(path: Path, why: str) -> Mapping[str, Any]:
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not found; {why}") from error


def _text_part(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"{where}: {unknown_choice('model_type', str(model_type), MODEL_TYPES)}")
    if model_type == TEXT_MODEL_TYPE:
        return raw
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(
            f"{where}: model_type 'gemma3' needs an object 'text_config', got {type(text).__name__}"
        )
    logger.info("%s: a multimodal Gemma 3; only its text part is loaded, images are not accepted", where)
    return text


def _refuse_unsupported(fields: _Fields) -> None:
    if fields.value("use_bidirectional_attention", bool, False):
        raise fields.fail("use_bidirectional_attention", "only causal attention is supported, got true")
    activation = fields.value("hidden_activation", str, "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise fields.fail("hidden_activation", f"only 'gelu_pytorch_tanh' is supported, got {activation!r}")
    if fields.value("attn_logit_softcapping", float, None) is not None:
        # Hugging Face's Gemma 3 reads the key and never applies it; to follow it keeps the logits equal.
        logger.warning(
            "attn_logit_softcapping is set: Gemma 3 does not apply it, neither here nor in transformers"
        )


def _layer_types(fields: _Fields) -> tuple[str, ...]:
    layers = fields.count("num_hidden_layers", 26)
    named = fields.value("layer_types", list[str], None)
    if named is None:
        # Hugging Face's name had a leading underscore for some releases.
        pattern = fields.count("sliding_window_pattern", fields.count("_sliding_window_pattern", 6))
        return tuple(SLIDING if (layer + 1) % pattern else FULL for layer in range(layers))
    if len(named) != layers:
        raise fields.fail("layer_types", f"expected one for each of {layers} layers, got {len(named)}")
    for kind in named:
        if kind not in (SLIDING, FULL):
            raise fields.fail("layer_types", unknown_choice("layer type", kind, (SLIDING, FULL)))
    return tuple(named)


def _ropes(fields: _Fields) -> tuple[Rope, Rope]:
    """Sliding and full rotary settings, from the older flat keys or from those by layer type."""
    parameters = _by_layer_type(fields, "rope_parameters")
    scaling = fields.value("rope_scaling", dict[str, Any], {})
    # A flat one has always been that of the global layers.
    nested = bool({SLIDING, FULL} & scaling.keys())
    by_type = _by_layer_type(fields, "rope_scaling") if nested else {FULL: scaling}
    full = _united(fields, parameters.get(FULL, {}), by_type.get(FULL, {}))
    full.setdefault("rope_theta", fields.value("rope_theta", float, 1_000_000.0))
    sliding = _united(fields, parameters.get(SLIDING, {}), by_type.get(SLIDING, {}))
    sliding.setdefault("rope_theta", fields.value("rope_local_base_freq", float, 10_000.0))
    return _rope(sliding, fields, SLIDING), _rope(full, fields, FULL)


def _by_layer_type(fields: _Fields, key: str) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any] | None] = fields.value(key, dict[str, Any], {})
    if not all(kind in (SLIDING, FULL) for kind in settings):
        names = ", ".join(sorted(settings))
        raise fields.fail(key, f"expected the keys {SLIDING!r} and {FULL!r}, got {names[:200]}")
    if not all(each is None or isinstance(each, dict) for each in settings.values()):
        raise fields.fail(key, f"expected an object for each layer type, got {shown(settings)}")
    return {kind: each or {} for kind, each in settings.items()}


def _united(fields: _Fields, parameters: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """What ``rope_parameters`` and ``rope_scaling`` say together of one layer type."""
    for key in parameters.keys() & scaling.keys():
        if parameters[key] != scaling[key]:
            raise fields.fail(
                "rope_scaling",
                f"expected {key} {shown(parameters[key])} as in rope_parameters, got {shown(scaling[key])}",
            )
    return {**parameters, **scaling}


def _rope(settings: Mapping[str, Any], fields: _Fields, kind: str) -> Rope:
    if unknown := sorted(settings.keys() - set(_ROPE_KEYS)):
        raise fields.fail(
            f"rope_parameters or rope_scaling of {kind}", unknown_choice("key", unknown[0], _ROPE_KEYS)
        )
    rope_type = settings.get("rope_type") or settings.get("type")
    if rope_type is None and settings.get("factor") is not None:
        raise fields.fail(
            f"rope_parameters or rope_scaling of {kind}",
            f"expected a rope_type with the factor {shown(settings['factor'])}, got none; is it 'linear'?",
        )
    rope_type = rope_type or "default"
    if rope_type not in ("default", "linear"):
        raise fields.fail(
            f"rope type of {kind}", unknown_choice("rope type", str(rope_type), ("default", "linear"))
        )
    theta, factor = settings["rope_theta"], settings.get("factor", 1.0) if rope_type == "linear" else 1.0
    for name, number in (("rope_theta", theta), ("factor", factor)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < _MAX_ROPE:
            raise fields.fail(f"{name} of {kind}", f"expected a positive number, got {shown(number)}")
    return Rope(float(theta), float(factor))


def _check_files(directory: Path) -> None:
    if not (directory / WEIGHTS_FILE).is_file() and not (directory / WEIGHTS_INDEX_FILE).is_file():
        files = ", ".join(sorted(path.name for path in directory.iterdir() if path.is_file())) or "no files"
        raise ConfigError(
            f"model directory {directory}: expected weights in {WEIGHTS_FILE} or {WEIGHTS_INDEX_FILE}, "
            f"found {files}"
        )
    if not (directory / TOKENIZER_FILE).is_file():
        raise ConfigError(
            f"{directory / TOKENIZER_FILE}: not found; the frontend needs it: "
            "copy it from the model's repository"
        )


def _with_generation_eos(config: Gemma3Config, path: Path) -> Gemma3Config:
    """Chat checkpoints name <end_of_turn> as an end token in generation_config.json only."""
    if not path.is_file():
        return config
    fields = _Fields(_read_json(path, ""), str(path))
    eos = tuple(dict.fromkeys(config.eos_token_ids + fields.token_ids("eos_token_id", None)))
    return msgspec.structs.replace(config, eos_token_ids=eos)
