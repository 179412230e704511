"""Write the golden logits of tests/plugins/gemma3_cpu/test_model.py: ``python make_gemma3_golden.py [OUT]``.

Needs ``pip install torch transformers`` beside this project. Each file holds a config.json, the seed of the
weights (made again by ``make_checkpoint``), a prompt longer than the window, and the logits that Hugging Face
transformers computes for it in float32 at some positions.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint, write_safetensors
from vswa_plugins.gemma3_cpu.weights.safetensors import SafetensorsSource

GOLDEN_DIR = Path(__file__).parent / "data" / "gemma3_golden"

TINY: dict[str, Any] = {
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "sliding_window_pattern": 3,
    "vocab_size": 320,
}
VISION = {
    "hidden_size": 16,
    "image_size": 16,
    "intermediate_size": 16,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 8,
}


class Variant(msgspec.Struct):
    """One checkpoint: its config.json over the default one, and how its weights are laid out in files."""

    overrides: dict[str, Any]
    prompt_len: int = 75
    positions: tuple[int, ...] = (0, 5, 15, 16, 17, 33, 74)
    shards: int = 1
    multimodal: bool = False


VARIANTS = {
    "default": Variant({}, 1100, (0, 511, 512, 1099)),
    "pattern": Variant({**TINY, "num_hidden_layers": 7, "sliding_window_pattern": 6}),
    "layer_types": Variant(
        {
            **TINY,
            "num_hidden_layers": 5,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 37,
            "layer_types": [
                f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full", "sliding")
            ],
        }
    ),
    "rope_scaling": Variant(
        {**TINY, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 50000}
    ),
    "rope_parameters": Variant(
        {
            **{key: value for key, value in TINY.items() if not key.startswith("rope_")},
            "rope_theta": None,
            "rope_local_base_freq": None,
            "rope_parameters": {
                "full_attention": {"factor": 4.0, "rope_theta": 200000.0, "rope_type": "linear"},
                "sliding_attention": {"rope_theta": 5000.0, "rope_type": "default"},
            },
        }
    ),
    "softcapping": Variant({**TINY, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "bias": Variant({**TINY, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "untied_sharded": Variant({**TINY, "tie_word_embeddings": False}, shards=3),
    "large_scores": Variant({**TINY, "head_dim": 48, "query_pre_attn_scalar": 3}),
    "multimodal": Variant(TINY, multimodal=True),
}


def write_checkpoint(variant: Variant, seed: int, directory: Path) -> None:
    """The variant as a Hugging Face directory."""
    make_checkpoint(directory, seed=seed, overrides=variant.overrides, shards=variant.shards)
    if variant.multimodal:
        _as_multimodal(directory)


def _as_multimodal(directory: Path) -> None:
    """Give a text checkpoint the ``text_config`` and the tensor names of the 4B and larger sizes."""
    config_file = directory / "config.json"
    text = json.loads(config_file.read_text())
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "image_token_index": text["vocab_size"] - 1,
        "model_type": "gemma3",
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "vision_config": VISION,
    }
    config_file.write_text(json.dumps(config))
    source = SafetensorsSource(directory)
    tensors = {f"language_model.model.{name}": source.read(name) for name in source.shapes()}
    tensors["vision_tower.vision_model.post_layernorm.weight"] = np.ones(VISION["hidden_size"], np.float32)
    write_safetensors(directory / "model.safetensors", tensors)


def weights_digest(directory: Path) -> str:
    """SHA-256 over all tensors: tells a changed weight generator from a wrong model."""
    source, digest = SafetensorsSource(directory), hashlib.sha256()
    for name in sorted(source.shapes()):
        digest.update(name.encode() + source.read(name).tobytes())
    return digest.hexdigest()


def prompt(variant: Variant, seed: int) -> NDArray[np.int64]:
    return np.random.RandomState(seed + 1).randint(
        0, variant.overrides.get("vocab_size", 4096), variant.prompt_len
    )


def reference_logits(directory: Path, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits at every position by transformers: [len(token_ids), vocab_size]."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    lost = [name for name in report["missing_keys"] if "vision" not in name and "multi_modal" not in name]
    if lost:
        raise SystemExit(f"{directory}: transformers did not find {lost}")
    with torch.no_grad():
        logits = model(torch.tensor(token_ids)[None]).logits[0]
    return np.asarray(logits.float().numpy())


def write_golden(name: str, variant: Variant, out: Path, seed: int) -> None:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / name
        write_checkpoint(variant, seed, directory)
        token_ids = prompt(variant, seed)
        logits = reference_logits(directory, token_ids)[list(variant.positions)]
        about: Mapping[str, Any] = {
            "seed": seed,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "variant": msgspec.to_builtins(variant),
            "weights_sha256": weights_digest(directory),
        }
    np.savez_compressed(out / f"{name}.npz", about=json.dumps(about), token_ids=token_ids, logits=logits)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN_DIR
    out.mkdir(parents=True, exist_ok=True)
    for seed, (name, variant) in enumerate(VARIANTS.items()):
        write_golden(name, variant, out, seed)


if __name__ == "__main__":
    main()
