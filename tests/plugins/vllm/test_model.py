"""vLLM's cache groups from config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.vllm.grouping import Layer, cache_groups, layout_of
from vswa_plugins.vllm.model import Precision, load_shape, parse_shape

from tests.properties import examples
from vswa_plugin.engine.presets import PRESETS
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
    return [group.window_size for group in cache_groups(parse_shape(config, "config.json").layers, 16)]


def of_windows(*windows: int | None) -> list[Layer]:
    return [Layer(window) for window in windows]


QWEN35 = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 32,
    "full_attention_interval": 4,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
}
QWEN3_NEXT = {**QWEN35, "model_type": "qwen3_next", "num_hidden_layers": 48, "num_key_value_heads": 2}
del QWEN3_NEXT["mamba_ssm_dtype"]
GEMMA4_31B = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 60,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
    "sliding_window": 1024,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "num_global_key_value_heads": 4,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
}
GEMMA4_E4B = {
    **GEMMA4_31B,
    "num_hidden_layers": 42,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 7,
    "sliding_window": 512,
    "num_kv_shared_layers": 18,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
}

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


#: Kind or window and tokens per block of the groups, as vLLM 0.33's own grouping makes them of such layers.
SEVERAL_SIZES: list[tuple[dict[str, Any], Precision, list[tuple[str, int]]]] = [
    (GEMMA4_E4B, Precision(), [("512", 32)] * 5 + [("global", 16)]),
    ({"text_config": GEMMA4_31B}, Precision(), [("1024", 16)] * 5 + [("global", 32)]),
    # With four GPUs there is one global head on each, as with eight; of the others there are four, and two.
    (GEMMA4_31B, Precision(4), [("1024", 16)] * 5 + [("global", 32)]),
    (GEMMA4_31B, Precision(8), [("1024", 16)] * 5 + [("global", 16)]),
    # An eighth of the bytes beside seven: what does not divide is filled up.
    ({**GEMMA4_31B, "global_head_dim": 384}, Precision(), [("1024", 16)] * 5 + [("global", 16)]),
    (QWEN35, Precision(), [("recurrent", 528)] * 3 + [("global", 528)]),
    (QWEN35, Precision(kv_cache_dtype="fp8"), [("recurrent", 1056)] * 3 + [("global", 1056)]),
    (QWEN35, Precision(mamba_ssm_cache_dtype="bfloat16"), [("recurrent", 272)] * 3 + [("global", 272)]),
    (QWEN3_NEXT, Precision(), [("recurrent", 544)] * 3 + [("global", 544)]),
    (QWEN3_NEXT, Precision(2), [("recurrent", 544)] * 3 + [("global", 544)]),
    (QWEN3_NEXT, Precision(4), [("recurrent", 272)] * 3 + [("global", 272)]),
]


@pytest.mark.parametrize(("config", "precision", "expected"), SEVERAL_SIZES)
def test_blocks_of_several_sizes_and_states(
    config: dict[str, Any], precision: Precision, expected: list[tuple[str, int]]
) -> None:
    layout = layout_of(parse_shape(config, "c", precision).layers, 16, "m").check()

    assert expected == [(group.label, group.block_size) for group in layout.groups]
    assert "vllm_hybrid" == layout.rule or len({size for _, size in expected}) == 1


def test_the_derived_groups_are_those_of_the_presets() -> None:
    made = {"gemma-4-e4b": GEMMA4_E4B, "gemma-4-31b": GEMMA4_31B, "qwen3.5-9b": QWEN35}
    made |= {"qwen3-next-80b": QWEN3_NEXT, "gpt-oss-20b": GPT_OSS}

    for name, config in made.items():
        layout = layout_of(parse_shape(config, "c").layers, 16, "m")
        assert PRESETS[name].layout("m") == layout, name


def test_a_block_size_that_a_state_fits_in_is_kept() -> None:
    layers = parse_shape(QWEN35, "c").layers

    assert [{1024}, {528}, {600}] == [
        {group.block_size for group in cache_groups(layers, size)} for size in (1024, 33, 600)
    ]


def test_where_all_layers_see_the_same_they_are_one_group_however_many_bytes_they_keep() -> None:
    assert [(None, 16)] == [
        (group.window_size, group.block_size) for group in cache_groups([Layer(None, 2), Layer(None, 3)], 16)
    ]


def test_groups_are_numbered_in_order_and_have_the_block_size() -> None:
    groups = cache_groups(of_windows(128, None, 128), 32)

    assert [(0, 128, 32), (1, 128, 32), (2, None, 32)] == [
        (group.group_id, group.window_size, group.block_size) for group in groups
    ]


def test_kinds_of_nearly_as_many_layers_have_one_group_each() -> None:
    assert [128, None] == [
        group.window_size for group in cache_groups([Layer(128)] * 12 + [Layer(None)] * 13, 16)
    ]
    assert [128, 128, None] == [
        group.window_size for group in cache_groups([Layer(128)] * 3 + [Layer(None)] * 2, 16)
    ]


@examples(200)
@given(layers=st.lists(st.sampled_from([None, 128, 512]), min_size=1, max_size=70))
def test_all_groups_can_hold_their_layers_with_little_waste(layers: list[int | None]) -> None:
    groups = [group.window_size for group in cache_groups(of_windows(*layers), 16)]
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

    assert (131_072, 262_208, {None, 4096}) == (
        shape.context_length,
        shape.vocab_size,
        {layer.window for layer in shape.layers},
    )


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
        ({**GEMMA3_1B, "global_head_dim": 512}, "heads of one size in a model of the type 'gemma3_text'"),
        ({**MISTRAL, "linear_attn_config": {"kda_layers": [1]}}, "got linear attention of another kind"),
        ({**MISTRAL, "full_attention_interval": 4}, "qwen3_next, qwen3_5 where attention is linear"),
        ({**QWEN35, "linear_key_head_dim": None}, "expected linear_key_head_dim, by which vLLM sizes"),
        ({**MISTRAL, "sliding_window": True}, "sliding_window: expected an integer"),
        ({**GPT_OSS, "num_kv_shared_layers": "2"}, "num_kv_shared_layers: expected an integer"),
        ({**MISTRAL, "max_window_layers": -1}, "max_window_layers: expected an integer"),
        ({**GEMMA3_1B, "_sliding_window_pattern": "6"}, "_sliding_window_pattern: expected an integer"),
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

    assert 24 == len(load_shape(str(tmp_path)).layers)
