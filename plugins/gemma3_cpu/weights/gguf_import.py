"""A GGUF file becomes an ordinary Hugging Face directory, once.

llama.cpp's Gemma files differ from Hugging Face's in names, in the order of dimensions, and in the weights of
the norms: Hugging Face multiplies by (1 + w), the file holds 1 + w. Query and key rows are in the same order.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswa_plugin.errors import ConfigError, shown

from ..model.config import (
    CONFIG_FILE,
    FULL,
    GENERATION_CONFIG_FILE,
    MOST,
    SLIDING,
    TEXT_MODEL_TYPE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    WEIGHTS_INDEX_FILE,
    Gemma3Config,
    parse_config,
)
from ..model.tensors import Float32, expected_shapes
from .gguf_file import GgufFile, require_gguf
from .gguf_tokenizer import Vocabulary, read_vocabulary, tokenizer_config, tokenizer_json

logger = logging.getLogger(__name__)

ARCHITECTURE = "gemma3"
#: Every sixth layer is global, and sliding layers rotate with this base, in all Gemma 3.
_PATTERN = 6
_LOCAL_ROPE_BASE = 10_000.0
#: The 27B scales queries by hidden_size / heads; the others by head_dim. Only its depth tells them apart.
_LAYERS_OF_27B = 62
_MOST = max(MOST.values())

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
_TOP_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def import_gguf(file: str | Path, directory: str | Path, overwrite: bool = False) -> None:
    """Write ``file`` as a Hugging Face directory: config, weights, tokenizer, chat template.

    The directory appears whole or not at all, unless it was there before.

    :param overwrite: write into a directory that is not empty.
    :raises ConfigError: not a GGUF file of a Gemma 3, a damaged one, a directory that is not empty, or the
        package ``gguf`` is missing.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: expected a directory to write a model to, found a file")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(f"{target}: not empty; choose a new directory, or give --overwrite")
    source = GgufFile(file)
    raw, vocabulary = read_config(source), read_vocabulary(source.metadata, source.path)
    config = parse_config(raw, str(source.path))
    names = check_tensors(source, config)
    require_gguf()
    source.check_places()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_json(scratch / CONFIG_FILE, raw)
        _write_json(scratch / GENERATION_CONFIG_FILE, _generation_config(vocabulary))
        _write_json(scratch / TOKENIZER_FILE, tokenizer_json(vocabulary), indent=None)
        settings = tokenizer_config(vocabulary, config.max_position_embeddings)
        _write_json(scratch / "tokenizer_config.json", settings)
        write_weights(scratch / WEIGHTS_FILE, source, names)
        _move(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_config(source: GgufFile) -> dict[str, Any]:
    """The content of ``config.json`` by the file's metadata.

    :raises ConfigError: another architecture, a part of a split file, or a missing value.
    """
    fields = _Metadata(source)
    architecture = source.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ConfigError(
            f"{source.path}: expected general.architecture {ARCHITECTURE!r}, the text part of a Gemma 3, "
            f"got {architecture!r}"
        )
    if (parts := source.metadata.get("split.count", 1)) not in (0, 1):
        raise ConfigError(
            f"{source.path}: expected a whole file, got one of {shown(parts)} parts; "
            "join them first: llama-gguf-split --merge FIRST-PART OUT"
        )
    vocabulary = read_vocabulary(source.metadata, source.path)
    layers, hidden = fields.count("block_count"), fields.count("embedding_length")
    heads = fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length")
    if fields.count("attention.value_length", head_dim) != head_dim:
        raise fields.fail("attention.value_length", f"expected key_length ({head_dim})")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": vocabulary.special.get("bos_token"),
        "eos_token_id": vocabulary.end_ids,
        "final_logit_softcapping": source.metadata.get(f"{ARCHITECTURE}.final_logit_softcapping") or None,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length"),
        "layer_types": _layer_types(fields, layers),
        "max_position_embeddings": fields.count("context_length"),
        "model_type": TEXT_MODEL_TYPE,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": fields.count("attention.head_count_kv", heads),
        "pad_token_id": vocabulary.special.get("pad_token"),
        "query_pre_attn_scalar": hidden // heads if layers == _LAYERS_OF_27B else head_dim,
        "rms_norm_eps": _shortest(fields.number("attention.layer_norm_rms_epsilon")),
        "rope_local_base_freq": fields.number("rope.freq_base_swa", _LOCAL_ROPE_BASE),
        "rope_scaling": _rope_scaling(fields),
        "rope_theta": fields.number("rope.freq_base", 1_000_000.0),
        "sliding_window": fields.count("attention.sliding_window"),
        "tie_word_embeddings": _TOP_NAMES["lm_head.weight"] not in source.tensors,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": _vocab_size(source, vocabulary),
    }


def check_tensors(source: GgufFile, config: Gemma3Config) -> dict[str, str]:
    """Hugging Face's canonical name -> the file's, for every tensor of the model.

    :raises ConfigError: names what is missing, left over or of another shape.
    """
    names: dict[str, str] = {}
    for name, shape in expected_shapes(config).items():
        theirs = gguf_name(name)
        if theirs not in source.tensors:
            raise ConfigError(
                f"{source.path}: missing tensor {theirs} of a Gemma 3 of {config.num_hidden_layers} layers; "
                f"the file has {len(source.tensors)} tensors: is it a whole text model?"
            )
        actual = source.tensors[theirs].shape
        if actual != shape:
            raise ConfigError(
                f"{source.path}: tensor {theirs}: expected shape {list(shape)} by the metadata, "
                f"got {list(actual)}"
            )
        names[name] = theirs
    if extra := sorted(source.tensors.keys() - set(names.values())):
        raise ConfigError(
            f"{source.path}: unknown tensor {', '.join(extra[:5])}: expected the {len(names)} of a Gemma 3 "
            f"of {config.num_hidden_layers} layers, got {len(source.tensors)}"
        )
    return names


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor.

    >>> gguf_name("layers.3.mlp.up_proj.weight")
    'blk.3.ffn_up.weight'
    """
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}"


def write_weights(path: Path, source: GgufFile, names: Mapping[str, str]) -> None:
    """Dequantize tensor by tensor into one safetensors file.

    A tensor of plain floats keeps its type. A quantized one becomes float16: at bfloat16's size it keeps
    three more bits of what the quantization left. One that float16 cannot hold becomes float32.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Types are known once a tensor has been read: reserve room for the longest header, write it at the end.
    room = 8 + 64 + sum(160 + len(name) for name in names)
    room += -room % 8
    with path.open("wb") as file:
        file.seek(room)
        for name, dtype, array in _stored_tensors(source, names):
            start = file.tell() - room
            file.write(array.tobytes())
            header[name] = {
                "dtype": dtype,
                "shape": list(array.shape),
                "data_offsets": [start, file.tell() - room],
            }
        text = json.dumps(header).encode()
        file.seek(0)
        file.write((room - 8).to_bytes(8, "little") + text.ljust(room - 8))


def _stored_tensors(source: GgufFile, names: Mapping[str, str]) -> Iterator[tuple[str, str, NDArray[Any]]]:
    for name, theirs in names.items():
        values = source.read(theirs)
        if name.endswith("norm.weight"):
            values -= np.float32(1)
        logger.debug("%s: %s of type %s", source.path, theirs, source.type_name(theirs))
        full = name if name == "lm_head.weight" else f"model.{name}"
        yield full, *_narrow(values, source.type_name(theirs))


def _narrow(values: Float32, type_name: str) -> tuple[str, NDArray[Any]]:
    """The type's name in safetensors, and the values in it."""
    if values.ndim == 1 or type_name in ("F32", "F64"):
        return "F32", values
    if type_name == "BF16":
        return "BF16", (values.view(np.uint32) >> 16).astype("<u2")
    if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        return "F32", values
    return "F16", values.astype("<f2")


class _Metadata:
    """Reads of ``gemma3.*``; errors name file and key."""

    def __init__(self, source: GgufFile) -> None:
        self._source = source

    def value(self, key: str) -> Any:
        return self._source.metadata.get(f"{ARCHITECTURE}.{key}")

    def number(self, key: str, default: Any = None) -> Any:
        value = self.value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fail(key, "expected a positive number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number that is no larger than any that a model is sized by."""
        value = self.number(key, default)
        if value != int(value) or value > _MOST:
            raise self.fail(key, f"expected a whole number of at most {_MOST}")
        return int(value)

    def fail(self, key: str, expected: str) -> ConfigError:
        value = self.value(key)
        got = "nothing" if value is None else shown(value)
        return ConfigError(f"{self._source.path}: {ARCHITECTURE}.{key}: {expected}, got {got}")


def _layer_types(fields: _Metadata, layers: int) -> list[str]:
    key = "attention.sliding_window_pattern"
    value = fields.value(key)
    if isinstance(value, np.ndarray):
        if len(value) != layers:
            raise fields.fail(key, f"expected one value for each of {layers} layers")
        return [SLIDING if sliding else FULL for sliding in value]
    pattern = fields.count(key, _PATTERN)
    if layers > MOST["num_hidden_layers"]:
        raise fields.fail("block_count", f"expected at most {MOST['num_hidden_layers']} layers")
    return [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]


def _rope_scaling(fields: _Metadata) -> dict[str, Any] | None:
    """The larger sizes stretch the positions of their global layers."""
    kind = fields.value("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind != "linear":
        raise fields.fail("rope.scaling.type", "expected 'linear' or 'none'")
    return {"rope_type": "linear", "factor": fields.number("rope.scaling.factor")}


def _vocab_size(source: GgufFile, vocabulary: Vocabulary) -> int:
    """Rows of the embedding: at least as many as there are tokens."""
    name = _TOP_NAMES["embed_tokens.weight"]
    if name not in source.tensors:
        raise ConfigError(f"{source.path}: missing tensor {name}: is it a whole text model?")
    rows = source.tensors[name].shape[0]
    if rows < len(vocabulary.pieces):
        raise ConfigError(
            f"{source.path}: tensor {name}: expected a row for each of {len(vocabulary.pieces)} tokens, "
            f"got {rows}"
        )
    return rows


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-06, where the file holds 9.999999974752427e-07."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "bos_token_id": vocabulary.special.get("bos_token"),
        "do_sample": True,
        "eos_token_id": vocabulary.end_ids,
        "pad_token_id": vocabulary.special.get("pad_token"),
        "top_k": 64,
        "top_p": 0.95,
    }


def _move(scratch: Path, target: Path) -> None:
    """Move what was written to the target directory."""
    os.chmod(scratch, 0o755)  # mkdtemp makes it readable for its owner alone
    try:
        os.rename(scratch, target)
    except OSError:
        if not target.is_dir():
            raise
        for path in scratch.iterdir():
            os.replace(path, target / path.name)
        (target / WEIGHTS_INDEX_FILE).unlink(missing_ok=True)


def _write_json(path: Path, value: Mapping[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
