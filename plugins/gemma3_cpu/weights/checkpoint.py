"""A small random Gemma 3 as a Hugging Face directory with a real tokenizer: for demo, tests, benchmarks."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswa_plugin.errors import ConfigError

from ..model.config import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    WEIGHTS_INDEX_FILE,
    Gemma3Config,
    parse_config,
)
from ..model.tensors import Float32, expected_shapes

BOS, EOS, PAD, END_OF_TURN = 2, 1, 0, 5
#: Special tokens and single bytes: made unlikely, so that greedy text is text and does not end at once.
_RARE_TOKENS = 6 + 256

#: config.json of the default checkpoint: five sliding layers and a global one, like Gemma 3.
DEFAULT_CONFIG: Mapping[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "final_logit_softcapping": None,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 8192,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "pad_token_id": PAD,
    "query_pre_attn_scalar": 32,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 4096,
}

# The turn format is Gemma's; a system message goes in front of the first user message, as Gemma has no
# system role. Content is text or a list of parts.
CHAT_TEMPLATE = """{{ bos_token }}
{%- set state = namespace(system='') %}
{%- for message in messages %}
    {%- set state.text = '' %}
    {%- if message['content'] is string %}
        {%- set state.text = message['content'] | trim %}
    {%- else %}
        {%- for part in message['content'] or [] %}
            {%- if part['type'] == 'text' %}{% set state.text = state.text ~ part['text'] | trim %}{% endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] in ['system', 'developer'] %}
        {%- set state.system = state.system ~ state.text ~ '\\n\\n' %}
    {%- else %}
        {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
        {{- '<start_of_turn>' ~ role ~ '\\n' ~ state.system ~ state.text ~ '<end_of_turn>\\n' }}
        {%- set state.system = '' %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


def make_checkpoint(
    directory: str | Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    overrides: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> None:
    """Write a random checkpoint: config, bfloat16 weights, tokenizer, chat template, generation config.

    The same seed and overrides give the same weights on every machine.

    :param overwrite: write into a directory that is not empty.
    :param overrides: keys of config.json that replace those of :data:`DEFAULT_CONFIG`.
    :param shards: files to spread the weights over.
    :raises ConfigError: the directory is not empty, or the overrides are no Gemma 3.
    """
    root = Path(directory)
    raw = {**DEFAULT_CONFIG, **(overrides or {})}
    config = parse_config(raw, f"overrides for {root}")
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root}: expected a directory to write a checkpoint to, found a file")
    if root.is_dir() and any(root.iterdir()) and not overwrite:
        raise ConfigError(f"{root}: not empty; choose a new directory, or give --overwrite")
    root.mkdir(parents=True, exist_ok=True)
    _write_json(root / CONFIG_FILE, raw)
    _write_json(root / GENERATION_CONFIG_FILE, _generation_config())
    _write_tokenizer(root)
    _write_weights(root, random_tensors(config, seed), shards)


def random_tensors(config: Gemma3Config, seed: int) -> dict[str, Float32]:
    """Weights under canonical names, scaled so that answers depend on the whole prompt and rarely tie."""
    # RandomState's stream is frozen by NumPy's compatibility policy; Generator's may change between releases.
    random = np.random.RandomState(seed)
    tensors = {}
    for name, shape in sorted(expected_shapes(config).items()):
        values = random.standard_normal(shape).astype(np.float32)
        tensors[name] = values * np.float32(_scale(name, shape, config)) + np.float32(_shift(name))
    # Signs at random: the tied output matrix would otherwise favour the token just read.
    tensors["norm.weight"] = np.sign(tensors["norm.weight"]) - 1
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name][:_RARE_TOKENS] *= np.float32(0.25)
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write float32 arrays as bfloat16, and arrays of other types as what they are (float16)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, array in tensors.items():
        dtype, blob = ("F16", array.tobytes()) if array.dtype == np.float16 else ("BF16", _bfloat16(array))
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blobs)


def _bfloat16(array: NDArray[Any]) -> bytes:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _scale(name: str, shape: tuple[int, ...], config: Gemma3Config) -> float:
    """Standard deviation of a tensor's entries."""
    if name in ("embed_tokens.weight", "lm_head.weight"):
        return 3 / math.sqrt(
            config.hidden_size
        )  # logits of standard deviation 3: the top two differ by about 1
    if name.endswith("norm.weight"):
        return 0.1
    return 0.1 if len(shape) == 1 else math.sqrt(1 / shape[-1])


def _shift(name: str) -> float:
    """Mean of a tensor's entries."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.5  # attention that prefers some tokens, far ones too
    if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
        return 3.0  # layers outweigh the token's own embedding: otherwise the answer repeats the last token
    return 0.0


def _write_weights(root: Path, tensors: Mapping[str, Float32], shards: int) -> None:
    named = {name if name == "lm_head.weight" else f"model.{name}": array for name, array in tensors.items()}
    (root / WEIGHTS_INDEX_FILE).unlink(missing_ok=True)
    if shards == 1:
        write_safetensors(root / WEIGHTS_FILE, named)
        return
    (root / WEIGHTS_FILE).unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: named[name] for name in list(named)[shard::shards]}
        write_safetensors(root / file, part)
        weight_map |= dict.fromkeys(part, file)
    size = sum(2 * array.size for array in named.values())
    _write_json(root / WEIGHTS_INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_tokenizer(root: Path) -> None:
    packed = resources.files("vswa_plugins.gemma3_cpu").joinpath("data", "tokenizer.json.gz").read_bytes()
    text = gzip.decompress(packed)
    (root / TOKENIZER_FILE).write_bytes(text)
    added = json.loads(text)["added_tokens"]
    _write_json(root / "tokenizer_config.json", _tokenizer_config(added))
    _write_json(root / "special_tokens_map.json", _special_tokens())


def _tokenizer_config(added: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    decoder = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": DEFAULT_CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_special_tokens(),
    }


def _special_tokens() -> dict[str, str]:
    return {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


def _generation_config() -> dict[str, Any]:
    return {
        "bos_token_id": BOS,
        "do_sample": True,
        "eos_token_id": [EOS, END_OF_TURN],
        "pad_token_id": PAD,
        "top_k": 64,
        "top_p": 0.95,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
