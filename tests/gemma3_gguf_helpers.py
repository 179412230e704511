"""A small model, and the GGUF file that llama.cpp's converter would make of it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vswa_plugins.gemma3_cpu.model.config import load_config
from vswa_plugins.gemma3_cpu.model.model import Chunk, PagedKV, group_layers
from vswa_plugins.gemma3_cpu.model.tensors import expected_shapes
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint
from vswa_plugins.gemma3_cpu.weights.gguf_import import gguf_name
from vswa_plugins.gemma3_cpu.weights.gguf_tokenizer import BYTE, CONTROL, NORMAL
from vswa_plugins.gemma3_cpu.weights.safetensors import SafetensorsSource
from vswa_plugins.gemma3_cpu.weights.source import load_model

from tests.make_gemma3_golden import TINY

MODEL = {**TINY, "vocab_size": 4096, "max_position_embeddings": 2048, "sliding_window": 64}
BLOCKS = 8
needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None, reason="needs the package gguf: pip install 'vswa-plugin[gguf]'"
)


def write_gguf(path: Path, checkpoint: Path, quantization: str = "F32", **changes: Any) -> Path:
    """``checkpoint`` as llama.cpp's converter writes it; ``changes`` replace metadata, None drops a key."""
    import gguf
    from gguf.quants import quantize

    config, tensors = load_config(checkpoint), SafetensorsSource(checkpoint)
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "gemma3"))
    skip, shapes = changes.pop("skip", None), expected_shapes(config)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": MODEL["sliding_window_pattern"],
        **changes,
    }
    for key, value in values.items():
        if value is not None:
            writer.add_uint32(f"gemma3.{key}", value)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    pieces, scores, kinds = pieces_of(checkpoint)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for name in shapes:
        if name == skip:
            continue
        array = tensors.read(name)
        kind = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else quantization]
        stored = array + np.float32(1) if name.endswith("norm.weight") else array
        writer.add_tensor(gguf_name(name), quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces_of(checkpoint: Path) -> tuple[list[str], list[float], list[int]]:
    """A tokenizer.json with merges as SentencePiece's pieces, scores and kinds."""
    raw = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].__getitem__)
    special = {token["content"] for token in raw["added_tokens"]}
    first = {"".join(pair): -float(rank) for rank, pair in reversed([*enumerate(raw["model"]["merges"])])}
    kinds = [CONTROL if p in special else BYTE if p.startswith("<0x") else NORMAL for p in pieces]
    return pieces, [first.get(piece, -1e6 - i) for i, piece in enumerate(pieces)], kinds


def logits(directory: Path, prompt_len: int = 150) -> np.ndarray[Any, np.dtype[np.float32]]:
    model = load_model(directory)
    prompt = np.random.RandomState(3).randint(300, 4096, prompt_len)
    groups = group_layers(model.config)
    kv = PagedKV(model.config, groups, [BLOCKS] * len(groups), 32)
    return model.forward([Chunk(prompt, 0, [list(range(BLOCKS))] * len(groups))], kv)[0]


# Imported as `x as x`: pytest finds a fixture by its name in the module, ruff sees that it is meant.
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf") / "random"
    make_checkpoint(directory, seed=7, overrides=MODEL)
    return directory


@pytest.fixture(scope="module")
def gguf_file(checkpoint: Path) -> Path:
    pytest.importorskip("gguf", reason="pip install 'vswa-plugin[gguf]'")
    return write_gguf(checkpoint.parent / "random.gguf", checkpoint)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vswa-plugin"
