"""Model files whose numbers make no sense, one by one: refused by what is wrong, before memory is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vswa_plugins.gemma3_cpu.model.config import load_config, parse_config
from vswa_plugins.gemma3_cpu.weights.checkpoint import DEFAULT_CONFIG, make_checkpoint
from vswa_plugins.gemma3_cpu.weights.gguf_file import GgufFile
from vswa_plugins.gemma3_cpu.weights.gguf_import import read_config
from vswa_plugins.gemma3_cpu.weights.gguf_tokenizer import read_vocabulary
from vswa_plugins.gemma3_cpu.weights.safetensors import SafetensorsSource
from vswa_plugins.gemma3_cpu.weights.source import find_model

from tests.gemma3_gguf_helpers import checkpoint as checkpoint
from tests.gemma3_gguf_helpers import gguf_file as gguf_file
from vswa_plugin.errors import ConfigError

SMALL = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 300, "num_hidden_layers": 2}
NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 1_025}, "num_hidden_layers: expected at most 1024, got 1025"),
        ({"head_dim": 2**62}, "head_dim: expected at most 8192"),
        ({"vocab_size": 2**25}, "vocab_size: expected at most"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings: expected at most"),
        ({"sliding_window": 2**31}, "sliding_window: expected at most"),
        ({"sliding_window_pattern": 2**31}, "sliding_window_pattern: expected at most"),
        ({"rms_norm_eps": INFINITE}, "rms_norm_eps: expected a finite number above 0, got inf"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a finite number above 0"),
        (
            {"final_logit_softcapping": NAN},
            "final_logit_softcapping: expected a finite number above 0, got nan",
        ),
        ({"eos_token_id": [1] * 5_000}, "eos_token_id: expected at most 1024 token ids"),
        ({"eos_token_id": -1}, "eos_token_id: expected at most 1024 token ids, got -1"),
        ({"rope_theta": INFINITE}, "rope_theta of full_attention: expected a positive number, got inf"),
        ({"rope_scaling": {"rope_type": "linear", "factor": NAN}}, "factor of full_attention"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"full_attention": 8.0}}, "rope_scaling: expected an object for each layer type"),
        ({"rope_scaling": {"full_attention": {}, "factor": 8.0}}, "rope_scaling: expected the keys"),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}},
            },
            "rope_scaling: expected factor 4.0 as in rope_parameters, got 8.0",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_number_of_a_config_that_no_model_has_is_refused_by_its_key(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config({**DEFAULT_CONFIG, **changes})

    assert named in str(error.value)
    assert len(str(error.value)) < 600


def test_the_text_part_of_a_config_has_the_last_word_on_tied_embeddings_and_a_warning_names_both(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outer = {"model_type": "gemma3", "tie_word_embeddings": True}
    text = {**DEFAULT_CONFIG, "tie_word_embeddings": False}

    assert not parse_config({**outer, "text_config": text}).tie_word_embeddings
    assert "tie_word_embeddings is true, and false in text_config, which is obeyed" in caplog.text


def test_a_config_that_its_tensors_contradict_is_refused_before_the_engine_is_sized_by_it(
    tmp_path: Path,
) -> None:
    make_checkpoint(tmp_path / "m", overrides=SMALL)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_key_value_heads": 4, "head_dim": 4_096}))

    with pytest.raises(ConfigError, match=r"expected shape .* by config.json"):
        find_model(tmp_path / "m")


def test_the_directory_of_an_adapter_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(ConfigError, match=r"config.json: not found; this is a LoRA adapter"):
        load_config(tmp_path)


# -- safetensors ------------------------------------------------------------------------------------------


def write(directory: Path, entries: dict[str, Any], data: bytes = bytes(16)) -> Path:
    header = json.dumps(entries).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return directory


def tensor(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, "'b': expected 8 bytes at .*, where .* ends at"),
        ({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, "'b': expected 4 bytes at .*, where .* ends at"),
        ({"a": tensor(4, 8, [1])}, "'a': expected 4 bytes at"),
        ({"a": tensor(0, 8, [1])}, "'a': expected 4 bytes at .* by its shape, got 8"),
        ({"a": tensor(8, 4, [1])}, "'a': expected 4 bytes at"),
        ({"a": tensor(0, 4, [2**32, 2**32])}, "'a': expected 73786976294838206464 bytes at .* truncated"),
        ({"a": tensor(0, 2**63, [2**61])}, "'a': expected .* truncated"),
        ({"a": tensor(-4, 0, [1])}, "'a': Expected `int` >= 0"),
        ({"a": tensor(0, 4, [-1])}, "'a': Expected `int` >= 0"),
        ({"a": tensor(0, 4, [1] * 9)}, "'a': Expected `array` of length <= 8"),
        ({"model.a": tensor(0, 4, [1]), "language_model.model.a": tensor(4, 8, [1])}, "each tensor .* once"),
        ({"vision_tower.a": tensor(0, 4, [1])}, "1 tensors of a vision part and no other: the text part is "),
        ({"a": tensor(0, 4, [1], "BOOL")}, "expected dtype F32, F16, BF16, got 'BOOL'$"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tensors_that_do_not_lie_as_the_format_has_it_are_refused(
    tmp_path: Path, entries: dict[str, Any], named: str
) -> None:
    ends = (entry["data_offsets"][1] for entry in entries.values())
    directory = write(tmp_path, entries, bytes(min(16, max(ends))))

    with pytest.raises(ConfigError, match=named):
        SafetensorsSource(directory)


def test_two_heads_are_compared_whatever_their_types(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float16)
    data = values.tobytes() + values.astype(np.float32).tobytes() + values[::-1].tobytes()
    entries = {
        "a": tensor(0, 8, [2, 2], "F16"),
        "b": tensor(8, 24, [2, 2]),
        "c": tensor(24, 32, [2, 2], "F16"),
    }
    source = SafetensorsSource(write(tmp_path, entries, data))

    assert source.same("a", "b")
    assert not source.same("a", "c")


# -- GGUF -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", NAN),
        ("block_count", 1_000_000),
        ("block_count", 1.5),
        ("block_count", "6"),
        ("embedding_length", INFINITE),
        ("attention.head_count", 2**63),
        ("attention.sliding_window_pattern", 0),
        ("attention.sliding_window_pattern", "x" * 6),
        ("attention.sliding_window_pattern", np.ones(3, bool)),
        ("rope.freq_base", NAN),
        ("rope.scaling.type", 1),
        ("attention.layer_norm_rms_epsilon", INFINITE),
    ],
    ids=str,
)
def test_a_value_of_a_gguf_file_that_is_none_of_a_model_is_refused_by_its_key(
    gguf_file: Path, key: str, value: Any
) -> None:
    source = GgufFile(gguf_file)
    source.metadata[f"gemma3.{key}"] = value

    with pytest.raises(ConfigError, match=f"gemma3.{key}: expected"):
        read_config(source)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("tokens", np.zeros(3), "expected tokenizer.ggml.tokens as texts"),
        ("scores", ["a"], "scores as numbers"),
        ("token_type", 1, "token_type as whole numbers"),
        ("bos_token_id", "two", "bos_token_id: expected an id below"),
        ("scores", np.array([NAN]), "expected a score and a type|finite numbers"),
    ],
    ids=str,
)
def test_a_vocabulary_of_other_types_is_refused(gguf_file: Path, key: str, value: Any, named: str) -> None:
    metadata = {**GgufFile(gguf_file).metadata, f"tokenizer.ggml.{key}": value}

    with pytest.raises(ConfigError, match=named):
        read_vocabulary(metadata, "m.gguf")


def test_a_piece_of_which_all_cuts_would_be_too_many_is_refused(gguf_file: Path) -> None:
    metadata = dict(GgufFile(gguf_file).metadata)
    metadata["tokenizer.ggml.tokens"] = ["x" * 1_000_000, *metadata["tokenizer.ggml.tokens"][1:]]

    with pytest.raises(ConfigError, match="tokens: expected at most 256 characters each, got 1000000"):
        read_vocabulary(metadata, "m.gguf")


def test_tensors_of_a_gguf_file_that_overlap_are_refused_by_the_second(gguf_file: Path) -> None:
    file = GgufFile(gguf_file)
    file.check_places()
    first, second = sorted(file.tensors, key=lambda name: file.tensors[name].offset)[:2]
    file.tensors[second] = file.tensors[second]._replace(offset=file.tensors[first].offset + 4)

    with pytest.raises(ConfigError, match=f"tensor {second}: expected it behind {first}"):
        file.check_places()


def test_a_safetensors_file_with_more_behind_its_last_tensor_is_refused(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("ab") as file:
        file.write(b"0")

    with pytest.raises(ConfigError, match="expected the file to end where its last tensor does"):
        SafetensorsSource(checkpoint)
