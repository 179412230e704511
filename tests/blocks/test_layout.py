"""Cache layouts that make no sense are refused with what was expected."""

from __future__ import annotations

import pytest

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.errors import ConfigError, unknown_choice

GEMMA = CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 32)), "trtllm_v2", "gemma")


def test_a_sensible_layout_passes() -> None:
    assert GEMMA.check() is GEMMA
    assert GEMMA.block_size == 32
    assert [group.label for group in GEMMA.groups] == ["512", "global"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), "expected at least one cache group, got none"),
        (
            (CacheGroup(0, 512, 32), CacheGroup(0, None, 32)),
            r"expected each cache group id once, got \[0, 0\]",
        ),
        (
            (CacheGroup(0, 500, 32),),
            "multiple of the block size .32 tokens., got 500; choose a tokens_per_block",
        ),
        ((CacheGroup(0, 0, 32),), "expected a positive window, got 0"),
        ((CacheGroup(0, None, 0),), "expected a positive block size, got 0"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(groups: tuple[CacheGroup, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheLayout(groups, "trtllm_v2", "gemma").check()


def test_an_unknown_group_is_named_with_the_declared_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown cache group 9; .* 0 \(window 512\), 1 \(window global\)"):
        GEMMA.group(9)


def test_differing_block_sizes_have_no_common_one() -> None:
    layout = CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 64)), "vllm", "gemma")

    with pytest.raises(ConfigError, match=r"expected one block size for all cache groups, got \[32, 64\]"):
        _ = layout.block_size


def test_an_unknown_choice_is_met_with_the_known_ones_and_a_guess() -> None:
    assert unknown_choice("mode", "aggg", ["prefill", "agg"]) == (
        "unknown mode 'aggg': did you mean 'agg'? Known: agg, prefill"
    )
    assert unknown_choice("mode", "zzz", ["agg"]) == "unknown mode 'zzz'. Known: agg"
