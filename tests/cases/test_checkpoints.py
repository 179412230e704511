"""Checkpoints as people have them: configs that disagree, quantised weights, parts that are missing."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from vswa_plugins.gemma3_cpu.model.config import Gemma3Config, load_config
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint
from vswa_plugins.gemma3_cpu.weights.source import load_model

from vswa_plugin.errors import ConfigError

SMALL = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 300, "num_hidden_layers": 2}
FULL_ROPE = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000}
SLIDING_ROPE = {"rope_type": "default", "rope_theta": 10_000}
WEIGHTS, HEAD = "model.safetensors", "lm_head.weight"


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Tensor]


def read_weights(path: Path) -> Tensors:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), raw[start:stop])
    return tensors


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        end = offset + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    blobs = b"".join(tensor.data for tensor in tensors.values())
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + blobs)


class Checkpoint:
    """A small one of two sliding layers; a test changes what it is about."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        make_checkpoint(directory, overrides=SMALL)

    def configure(self, *without: str, **changes: Any) -> None:
        config = {key: value for key, value in self.config.items() if key not in without}
        self.write("config.json", {**config, **changes})

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.directory / "config.json").read_text())
        return config

    def write(self, name: str, content: object) -> None:
        (self.directory / name).write_text(json.dumps(content))

    def change_weights(self, change: Callable[[Tensors], Tensors]) -> None:
        path = self.directory / WEIGHTS
        write_weights(path, change(read_weights(path)))

    def multimodal(self, outer: Mapping[str, Any], **text: Any) -> None:
        """As a Gemma 3 with a vision part, whose text part has names and a configuration of its own."""
        self.write(
            "config.json",
            {
                "model_type": "gemma3",
                "architectures": ["Gemma3ForConditionalGeneration"],
                "text_config": {**self.config, **text},
                "vision_config": {"model_type": "siglip_vision_model"},
                **outer,
            },
        )
        self.change_weights(lambda tensors: {f"language_model.{name}": t for name, t in tensors.items()})


class Loaded(NamedTuple):
    """What came of loading.

    :param config: None where it was refused.
    :param said: the refusal, or the warnings.
    """

    config: Gemma3Config | None
    said: str


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "m")


@pytest.fixture
def loaded(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> Callable[[], Loaded]:
    def load() -> Loaded:
        where = str(checkpoint.directory)
        try:
            with caplog.at_level(logging.WARNING):
                config = load_config(checkpoint.directory)
                load_model(checkpoint.directory, config)
        except ConfigError as error:
            return Loaded(None, str(error).replace(where, "the directory"))
        said = "\n".join(each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING)
        return Loaded(config, said.replace(where, "the directory"))

    return load


Load = Callable[[], Loaded]

# -- rotary embeddings -----------------------------------------------------------------------------------

ROPES = {
    "linear": ("rope_scaling", {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
    "linear, older name of the type": ("rope_scaling", {"rope_scaling": {"factor": 8.0, "type": "linear"}}),
    "by layer type": (
        "rope_parameters",
        {"rope_parameters": {"full_attention": FULL_ROPE, "sliding_attention": SLIDING_ROPE}},
    ),
    "by layer type, one of them": ("rope_parameters", {"rope_parameters": {"full_attention": FULL_ROPE}}),
    "rope_scaling by layer type": (
        "rope_scaling",
        {"rope_scaling": {"full_attention": FULL_ROPE, "sliding_attention": SLIDING_ROPE}},
    ),
    "a factor without a type": ("rope_scaling", {"rope_scaling": {"factor": 8.0}}),
}


@pytest.mark.parametrize("case", ROPES)
def test_a_scaling_of_positions_is_obeyed_or_named(checkpoint: Checkpoint, loaded: Load, case: str) -> None:
    key, changes = ROPES[case]
    checkpoint.configure("rope_scaling", **changes)
    found = loaded()
    factor = None if found.config is None else found.config.rope_full.factor

    assert 8.0 == factor or key in found.said


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000}},
        {"rope_scaling": {"factor": 4.0, "rope_type": "yarn"}},
    ],
    ids=["not by layer type", "yarn"],
)
def test_a_scaling_that_is_not_served_is_refused(
    checkpoint: Checkpoint, loaded: Load, changes: dict[str, Any]
) -> None:
    checkpoint.configure("rope_scaling", **changes)
    found = loaded()

    assert found.config is None
    assert "rope" in found.said


# -- the matrix that turns hidden states into tokens -------------------------------------------------------


def with_head(name: str = HEAD, *, same: bool = False) -> Callable[[Tensors], Tensors]:
    """Adds the matrix: the embedding once more, or another one."""

    def add(tensors: Tensors) -> Tensors:
        embedding = next(t for n, t in tensors.items() if n.endswith("embed_tokens.weight"))
        other = np.random.default_rng(0).standard_normal(embedding.shape).astype("<f2").tobytes()
        return {**tensors, name: embedding if same else Tensor("F16", embedding.shape, other)}

    return add


def test_a_head_that_is_the_embedding_once_more_changes_nothing(checkpoint: Checkpoint, loaded: Load) -> None:
    checkpoint.change_weights(with_head(same=True))
    found = loaded()

    assert found.config is not None
    assert found.config.tie_word_embeddings


def test_a_head_of_its_own_is_used_where_the_config_says_so(checkpoint: Checkpoint, loaded: Load) -> None:
    checkpoint.configure(tie_word_embeddings=False)
    checkpoint.change_weights(with_head())
    found = loaded()

    assert found.config is not None
    assert not found.config.tie_word_embeddings


def test_a_head_that_is_not_there_is_named(checkpoint: Checkpoint, loaded: Load) -> None:
    checkpoint.configure(tie_word_embeddings=False)
    found = loaded()

    assert found.config is None
    assert HEAD in found.said


def test_a_head_that_the_config_denies_is_used_or_named(checkpoint: Checkpoint, loaded: Load) -> None:
    checkpoint.change_weights(with_head())
    found = loaded()
    used = found.config is not None and not found.config.tie_word_embeddings

    assert used or "lm_head" in found.said or "tie_word_embeddings" in found.said


def test_a_head_that_only_the_text_part_of_the_config_knows_is_used_or_named(
    checkpoint: Checkpoint, loaded: Load
) -> None:
    checkpoint.multimodal({"tie_word_embeddings": True}, tie_word_embeddings=False)
    checkpoint.change_weights(with_head(f"language_model.{HEAD}"))
    found = loaded()
    used = found.config is not None and not found.config.tie_word_embeddings

    assert used or "lm_head" in found.said or "tie_word_embeddings" in found.said


def test_where_the_two_configs_disagree_on_a_head_that_is_not_there_it_is_not_used_or_they_are_named(
    checkpoint: Checkpoint, loaded: Load
) -> None:
    checkpoint.multimodal({"tie_word_embeddings": False}, tie_word_embeddings=True)
    found = loaded()
    tied = found.config is not None and found.config.tie_word_embeddings

    assert tied or "tie_word_embeddings" in found.said


# -- weights ---------------------------------------------------------------------------------------------


def quantised(dtype: str, suffix: str = ".weight") -> Callable[[Tensors], Tensors]:
    """Projections as ``dtype`` of one byte a value."""

    def change(tensors: Tensors) -> Tensors:
        changed: Tensors = {}
        for name, tensor in tensors.items():
            if not name.endswith("proj.weight"):
                changed[name] = tensor
                continue
            data = b"\0" * (len(tensor.data) // 2)
            changed[name.removesuffix(".weight") + suffix] = Tensor(dtype, tensor.shape, data)
        return changed

    return change


QUANTISED = {
    "bitsandbytes": ("U8", ".weight"),
    "compressed-tensors": ("F8_E4M3", ".weight"),
    "awq": ("I8", ".qweight"),
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_are_refused(checkpoint: Checkpoint, loaded: Load, method: str) -> None:
    checkpoint.configure(quantization_config={"quant_method": method})
    checkpoint.change_weights(quantised(*QUANTISED[method]))

    assert loaded().config is None


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_are_called_quantised(checkpoint: Checkpoint, loaded: Load, method: str) -> None:
    checkpoint.configure(quantization_config={"quant_method": method})
    checkpoint.change_weights(quantised(*QUANTISED[method]))

    assert "quanti" in loaded().said


def test_tensors_of_the_vision_part_may_be_of_any_type(checkpoint: Checkpoint, loaded: Load) -> None:
    checkpoint.multimodal({})
    name = "vision_tower.vision_model.embeddings.position_ids"
    checkpoint.change_weights(lambda tensors: {**tensors, name: Tensor("I64", (4,), bytes(32))})

    assert loaded().config is not None


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_a_text_model_may_have_the_names_of_a_multimodal_one(
    checkpoint: Checkpoint, loaded: Load, prefix: str
) -> None:
    def renamed(tensors: Tensors) -> Tensors:
        if prefix == "language_model.":
            return {prefix + name: tensor for name, tensor in tensors.items()}
        return {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}

    checkpoint.change_weights(renamed)

    assert loaded().config is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": "gemma3n_text"}, "gemma3n_text"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"eos_token_id": "<eos>"}, "eos_token_id"),
    ],
    ids=str,
)
def test_a_model_of_another_kind_is_refused_by_what_makes_it_another(
    checkpoint: Checkpoint, loaded: Load, changes: dict[str, Any], named: str
) -> None:
    checkpoint.configure(**changes)
    found = loaded()

    assert found.config is None
    assert named in found.said


@pytest.mark.parametrize(
    "without", [("sliding_window_pattern",), ("rope_theta", "rope_local_base_freq")], ids=", ".join
)
def test_keys_that_a_release_leaves_out_have_the_values_of_the_model(
    checkpoint: Checkpoint, loaded: Load, without: tuple[str, ...]
) -> None:
    before = load_config(checkpoint.directory)
    checkpoint.configure(*without)

    assert Loaded(before, "") == loaded()


# -- what chat needs -------------------------------------------------------------------------------------


def said_at_start(directory: Path) -> str:
    """What a worker says before it looks for its brokers, or until it refuses the model."""
    command = [sys.executable, "-m", "vswa_plugin.worker", "--engine", "gemma3_cpu"]
    env = {**os.environ, "NATS_SERVER": "nats://127.0.0.1:1", "ETCD_ENDPOINTS": "http://127.0.0.1:1"}
    said: list[str] = []
    with subprocess.Popen(
        [*command, "--model-path", str(directory)], env=env, stderr=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stderr is not None
        end = threading.Timer(45, worker.kill)
        end.start()
        for line in worker.stderr:
            said.append(line)
            if "NATS" in line:
                break
        end.cancel()
        worker.kill()
    if not said:
        raise RuntimeError("the worker has said nothing")
    return "".join(said).replace(str(directory), "the directory")


@pytest.mark.parametrize("lacks", ["tokenizer_config.json", "chat_template"])
def test_a_worker_without_a_chat_template_says_at_its_start_what_lacks(
    checkpoint: Checkpoint, lacks: str
) -> None:
    file = checkpoint.directory / "tokenizer_config.json"
    if lacks == "chat_template":
        config = json.loads(file.read_text())
        del config["chat_template"]
        checkpoint.write(file.name, config)
    else:
        file.unlink()

    assert re.search("chat.template|tokenizer_config|completions", said_at_start(checkpoint.directory))
