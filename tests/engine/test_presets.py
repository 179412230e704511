"""The cache groups of known models, and the ranks that serve them."""

from __future__ import annotations

import math

import pytest

from vswa_plugin.blocks.layout import FULL
from vswa_plugin.blocks.reuse import RULES
from vswa_plugin.engine.presets import (
    PRESETS,
    TRTLLM,
    VLLM,
    described,
    listed_models,
    preset_named,
    rank_setup,
)
from vswa_plugin.errors import ConfigError

#: Bytes a token of one layer, by preset: of global attention, and of the others; or bytes of a state.
BYTES_A_TOKEN = {
    "gemma-4-e4b": (2 * 2 * 512 * 2, 2 * 2 * 256 * 2),
    "gemma-4-31b": (2 * 4 * 512 * 2, 2 * 16 * 256 * 2),
}
#: Bytes a token of attention, bytes of a state, and of what the engine's blocks are multiples.
STATES = {
    "qwen3.5-9b": (2 * 4 * 256 * 2, 32 * 128 * 128 * 4 + (2 * 16 * 128 + 32 * 128) * 3 * 2, 16),
    "qwen3-next-80b": (2 * 2 * 256 * 2, 32 * 128 * 128 * 2 + (2 * 16 * 128 + 32 * 128) * 3 * 2, 16),
    "kimi-linear-48b": ((512 + 64) * 2, 32 * 128 * 128 * 4 + 3 * 32 * 128 * 3 * 2, 128),
    "nemotron-h-8b": (2 * 8 * 128 * 2, 128 * 64 * 128 * 2 + (128 * 64 + 2 * 8 * 128) * 3 * 2, 16),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_model_has_a_layout_that_its_rule_takes(name: str) -> None:
    preset = preset_named(name)
    layout = preset.layout(name)

    assert RULES[layout.rule].needs(layout, 10_000) is not None
    assert any(group.kind == FULL for group in layout.groups)
    assert (
        "trtllm_v2" if preset.engine == TRTLLM else "vllm" if layout.plain else "vllm_hybrid"
    ) == layout.rule
    assert preset.source.startswith(f"https://huggingface.co/{preset.model}/")
    assert f"{name} " in listed_models()


@pytest.mark.parametrize("name", BYTES_A_TOKEN)
def test_blocks_of_all_groups_have_the_same_bytes(name: str) -> None:
    of_full, of_others = BYTES_A_TOKEN[name]
    bytes_of = {
        (of_full if group.kind == FULL else of_others) * group.block_size
        for group in preset_named(name).layout(name).groups
    }

    assert 1 == len(bytes_of)


@pytest.mark.parametrize("name", STATES)
def test_a_block_of_attention_holds_a_state_and_no_smaller_one_would(name: str) -> None:
    a_token, state, multiple = STATES[name]
    (size,) = {group.block_size for group in preset_named(name).layout(name).groups}

    assert multiple * math.ceil(state / (multiple * a_token)) == size


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-oss", "128, global"),
        ("gemma-4-31b", "5 x 1024 /16, global /32"),
        ("llama-4-scout-hybrid", "3 x chunk8192 /16, global /16"),
        ("deepseek-v4-flash", "3 x 128 /64, global /256, 8 /4, 128 /8"),
    ],
)
def test_groups_are_described_in_a_few_words(name: str, words: str) -> None:
    assert words == described(name)


def test_memory_is_counted_by_the_global_group() -> None:
    setup = rank_setup("gemma-4-31b", 1_000, 0.25, None, 8_192)

    assert (*[500] * 5, 1_000) == setup.blocks
    assert (10,) * 6 == setup.layers
    assert 8_192 == setup.chunk_tokens
    sliding, full = rank_setup("gemma-3-1b", 1_000, 0.5, 64, 8_192).blocks
    assert (500, 1_000) == (sliding, full)
    # A window of 1,024 with a chunk of 512 and a block more.
    assert 49 == rank_setup("gemma-3-27b", 10, 0.5, 32, 8_192).blocks[0]


@pytest.mark.parametrize(
    ("name", "block_size", "said"),
    [
        ("gemma-4-32b", None, "unknown model 'gemma-4-32b': did you mean 'gemma-4-31b'"),
        ("gemma-4-31b", 32, r"expected none for gemma-4-31b, of which vLLM chooses the blocks \(16 and 32"),
        ("gemma-3-1b", 48, "a block size that divides the windows of gemma-3-1b, got 48"),
    ],
)
def test_a_setup_that_no_engine_has_is_refused(name: str, block_size: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rank_setup(name, 100, 0.5, block_size, 8_192)


def test_models_of_both_engines_are_known() -> None:
    assert {TRTLLM, VLLM} == {each.engine for each in PRESETS.values()}
