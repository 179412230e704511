"""vLLM's cache groups from config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.vllm.model import cache_groups, load_shape, parse_shape

from tests.properties import examples
from vswa_plugin.errors import ConfigError

GEMMA3_1B = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 26,
    "sliding_window": 512,
    "max_position_embeddings": 32_768,
    "vocab_size": 262_144,
}
GPT_OSS = {"model_type": "gpt_oss", "num_hidden_layers": 24, "sliding_window": 128}
MISTRAL = {"model_type": "mistral", "num_hidden_layers": 4, "sliding_window": 4096}
QWEN = {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 4096, "max_window_layers": 3}


def windows(config: dict[str, Any]) -> list[int | None]:
    return [group.window_size for group in cache_groups(parse_shape(config, "config.json").windows, 16)]


#: The groups that vLLM made of these models (0.26 to 0.33 on a GPU, 0.32 on a processor).
MADE: list[tuple[dict[str, Any], list[int | None]]] = [
    (GEMMA3_1B, [512] * 6 + [None]),
    ({**GEMMA3_1B, "num_hidden_layers": 6}, [512] * 5 + [None]),
    ({"text_config": {**GEMMA3_1B, "num_hidden_layers": 34, "sliding_window": 1024}}, [1024] * 6 + [None]),
    ({**GEMMA3_1B, "num_hidden_layers": 48, "sliding_window": 1024}, [1024] * 5 + [None]),
    ({**GEMMA3_1B, "num_hidden_layers": 62, "sliding_window": 1024}, [1024] * 6 + [None]),
    (GPT_OSS, [128, None]),
]


@pytest.mark.parametrize(("config", "expected"), MADE)
def test_the_groups_are_those_that_vllm_made(config: dict[str, Any], expected: list[int | None]) -> None:
    assert expected == windows(config)


def test_groups_are_numbered_in_order_and_have_the_block_size() -> None:
    groups = cache_groups((128, None, 128), 32)

    assert [(0, 128, 32), (1, 128, 32), (2, None, 32)] == [
        (group.group_id, group.window_size, group.block_size) for group in groups
    ]


def test_kinds_of_nearly_as_many_layers_have_one_group_each() -> None:
    assert [128, None] == [group.window_size for group in cache_groups((128,) * 12 + (None,) * 13, 16)]
    assert [128, 128, None] == [group.window_size for group in cache_groups((128,) * 3 + (None,) * 2, 16)]


@examples(200)
@given(layers=st.lists(st.sampled_from([None, 128, 512]), min_size=1, max_size=70))
def test_all_groups_can_hold_their_layers_with_little_waste(layers: list[int | None]) -> None:
    groups = [group.window_size for group in cache_groups(layers, 16)]
    counts = {kind: layers.count(kind) for kind in layers}
    size = max(-(-count // groups.count(kind)) for kind, count in counts.items())

    assert list(counts) == list(dict.fromkeys(groups)), (
        "kinds in the order of their first layer, side by side"
    )
    for kind, count in counts.items():
        assert (groups.count(kind) - 1) * size < count <= groups.count(kind) * size


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 3}, [None]),
        (MISTRAL, [4096]),
        ({**MISTRAL, "sliding_window": None}, [None]),
        ({**MISTRAL, "sliding_window": 0}, [None]),
        (QWEN, [None]),
        ({**QWEN, "use_sliding_window": True}, [None, None, None, 4096]),
        ({**GPT_OSS, "layer_types": ["full_attention", "sliding_attention"] * 12}, [None, 128]),
        ({**GEMMA3_1B, "sliding_window_pattern": 2}, [512, None]),
        ({**GEMMA3_1B, "_sliding_window_pattern": 2}, [512, None]),
        ({**GEMMA3_1B, "model_type": "gemma2"}, [512, None]),
        ({**GPT_OSS, "num_kv_shared_layers": 23}, [128]),
    ],
)
def test_windows_of_layers_are_read_as_each_family_writes_them(
    config: dict[str, Any], expected: list[int | None]
) -> None:
    assert expected == windows(config)


def test_a_multimodal_gemma_3_may_leave_its_context_out() -> None:
    shape = parse_shape({"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34}}, "c")

    assert (131_072, 262_208, {None, 4096}) == (shape.context_length, shape.vocab_size, set(shape.windows))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "num_hidden_layers, got none"),
        ({"num_hidden_layers": "4"}, r"num_hidden_layers: expected an integer in \[1, 4096\], got '4'"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected an integer"),
        ({**GPT_OSS, "layer_types": ["full_attention"]}, "one for each of 24 layers, got 1"),
        (
            {**MISTRAL, "layer_types": ["linear_attention"] * 4},
            "got 'linear_attention'; --engine vllm does not",
        ),
        ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "expected a sliding_window"),
        ({**GEMMA3_1B, "global_head_dim": 512}, "got heads of several sizes"),
        ({**MISTRAL, "sliding_window": True}, "sliding_window: expected an integer"),
        ({**MISTRAL, "max_position_embeddings": -1}, "max_position_embeddings: expected an integer"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        windows(config)


def test_the_directory_must_hold_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the directory of a Hugging Face checkpoint"):
        load_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))

    assert 24 == len(load_shape(str(tmp_path)).windows)
