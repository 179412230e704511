"""A model directory without weights: config.json as in a profile, a tokenizer with a word for each id.

vLLM fills the weights at random (``load_format: dummy``), so nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

#: What ``make_checkpoint`` needs for the files that are kept of it.
_SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def write_model(directory: Path, config: Mapping[str, Any]) -> None:
    """Write the directory, which must not be there yet."""
    make_checkpoint(directory, overrides=_SMALL)
    for weights in directory.glob("*.safetensors*"):
        weights.unlink()
    made = {**json.loads((directory / "config.json").read_text()), **config}
    made = {key: value for key, value in made.items() if value is not None}
    layers, pattern = made["num_hidden_layers"], made["sliding_window_pattern"]
    made["layer_types"] = [
        "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)
    ]
    (directory / "config.json").write_text(json.dumps(made, indent=1))
    _extend_tokenizer(directory / "tokenizer.json", made["vocab_size"])


def _extend_tokenizer(path: Path, size: int) -> None:
    """Random weights draw any id of the vocabulary, and each must give some text for a chunk to be sent."""
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    taken = set(vocabulary.values()) | {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary |= {f"w{number}": number for number in range(size) if number not in taken}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
