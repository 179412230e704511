"""Cache layouts that make no sense are refused with what was expected."""

from __future__ import annotations

import msgspec
import pytest

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
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
        ((CacheGroup(0, None, 32, "sliding"),), "expected a window for a sliding group, got none"),
        ((CacheGroup(0, None, 32, "chunked"),), "expected chunks of a multiple of the block size"),
        ((CacheGroup(0, None, 32, "chunked", 48),), "expected chunks of a multiple .*32 tokens.*got 48"),
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


def test_differing_block_sizes_are_counted_in_common_multiples_and_named_in_common_parts() -> None:
    layout = CacheLayout((CacheGroup(0, 512, 48), CacheGroup(1, None, 64)), "vllm_hybrid", "gemma").check()

    assert (layout.block_size, layout.hash_block_size, layout.plain) == (192, 16, False)
    assert (GEMMA.block_size, GEMMA.hash_block_size, GEMMA.plain) == (32, 32, True)


@pytest.mark.parametrize(
    ("resumption", "message"),
    [
        (Resumption(24, 16), "alignment that is a multiple of the hash block size, got 24 and 16"),
        (Resumption(32, 0), "alignment that is a multiple of the hash block size, got 32 and 0"),
        (Resumption(64, 64), "cache group 0: expected a block size that is a multiple .*64 tokens.*got 32"),
        (Resumption(16, 16), "cache group 0: expected a block size that divides the alignment .*got 32"),
        (Resumption(32, 32, lookahead=-1), "a lookahead and least_tokens of 0 or more, got -1 and 0"),
    ],
)
def test_a_resumption_that_does_not_fit_the_groups_is_refused(resumption: Resumption, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        msgspec.structs.replace(GEMMA, resumption=resumption).check()


def test_a_layout_is_plain_only_where_nothing_is_out_of_the_ordinary() -> None:
    odd = [
        CacheGroup(0, 512, 32, drops_last=True),
        CacheGroup(0, None, 32, "recurrent"),
        CacheGroup(0, None, 32, "chunked", 64),
        CacheGroup(0, None, 32, "a later one"),
    ]

    for group in odd:
        assert not msgspec.structs.replace(GEMMA, groups=(group, GEMMA.groups[1])).check().plain
    assert msgspec.structs.replace(GEMMA, resumption=Resumption(32, 32)).plain
    assert not msgspec.structs.replace(GEMMA, resumption=Resumption(32, 32, lookahead=1)).plain
    assert ["512", "recurrent", "chunk64", "a later one"] == [group.label for group in odd]
    assert {0: "a later one"} == CacheLayout(tuple(odd[-1:]), "vllm_hybrid", "m").unknown_kinds


def test_an_unknown_choice_is_met_with_the_known_ones_and_a_guess() -> None:
    assert unknown_choice("mode", "aggg", ["prefill", "agg"]) == (
        "unknown mode 'aggg': did you mean 'agg'? Known: agg, prefill"
    )
    assert unknown_choice("mode", "zzz", ["agg"]) == "unknown mode 'zzz'. Known: agg"
