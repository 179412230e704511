"""What the first line of a trace says of an engine's cache, and what becomes of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given

from tests.layout_samples import layouts
from tests.properties import examples
from vswa_plugin.accuracy.headers import TraceHeader, header_of, layout_of
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.errors import ConfigError

FULL, SWA = {"kind": "full"}, {"kind": "swa", "window": 100}


def layout(groups: list[dict[str, Any]], block_size: int = 16, **more: Any) -> CacheLayout:
    said = {"format": "vllm", "block_size": block_size, "groups": groups, **more}
    return layout_of(msgspec.convert(said, TraceHeader), None, "m")


@examples(300)
@given(layouts())
def test_a_layout_that_is_written_is_read(given_layout: CacheLayout) -> None:
    line = msgspec.json.encode(header_of("vllm", given_layout, "e", "m"))

    assert semantic(given_layout) == semantic(
        layout_of(msgspec.json.decode(line, type=TraceHeader), None, "x")
    )


def semantic(read: CacheLayout) -> CacheLayout:
    """What is stated and what is implied are one."""
    implied = Resumption(read.block_size, read.hash_block_size)
    return msgspec.structs.replace(read, resumption=read.resumption or implied)


def test_groups_of_one_block_size_are_what_they_were() -> None:
    expected = CacheLayout((CacheGroup(0, 100, 16), CacheGroup(1, None, 16)), "vllm", "m")

    assert expected == layout([SWA, FULL])
    assert expected == layout([SWA, FULL], alignment=16, hash_block_size=16, lookahead={"draft_tokens": 2})


def test_block_sizes_that_differ_imply_their_multiples_and_divisors() -> None:
    read = layout([{**SWA, "block_size": 24}, FULL])

    assert ("vllm_hybrid", None, 48, 8) == (
        read.rule,
        read.resumption,
        read.block_size,
        read.hash_block_size,
    )


def test_a_group_that_is_not_cacheable_keeps_its_id_and_counts_for_the_alignment() -> None:
    read = layout(
        [{**SWA, "count": 2, "block_size": 64, "cacheable": False}, FULL, {**SWA, "block_size": 24}]
    )

    assert [(2, None, 16), (3, 100, 24)] == [(g.group_id, g.window_size, g.block_size) for g in read.groups]
    assert Resumption(192, 8) == read.resumption


def test_all_that_a_header_may_state_is_in_the_layout() -> None:
    read = layout(
        [
            {"kind": "mamba", "mode": "align", "block_size": 64, "count": 2},
            {"kind": "full", "block_size": 64, "drop": True, "spec_kind": "mla_attention"},
        ],
        alignment=16,
        hash_block_size=16,
        partial_hits=True,
        lookahead={"hash_tokens": 3, "peek_limit": "num_tokens-1"},
        replay_tokens=128,
        config={"model": "qwen", "tp": 2},
    )

    assert (
        CacheGroup(0, None, 64, "recurrent"),
        CacheGroup(1, None, 64, "recurrent"),
        CacheGroup(2, None, 64, drops_last=True),
    ) == read.groups
    assert Resumption(16, 16, True, 3, True, 128) == read.resumption
    assert '{"model":"qwen","tp":2}' == read.model


def test_an_unknown_kind_is_kept_as_its_text() -> None:
    read = layout([FULL, {"kind": "xlstm", "window": 5}])

    assert ({1: "xlstm"}, "vllm_hybrid") == (read.unknown_kinds, read.rule)


def test_the_rule_that_is_named_is_not_replaced() -> None:
    said = TraceHeader("vllm", 16, rule="mine", groups=header_of("vllm", layout([SWA, FULL]), "", "").groups)

    assert ("mine", "other") == (layout_of(said, None, "m").rule, layout_of(said, "other", "m").rule)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"alignment": 24}, "alignment that is a multiple of the hash block size, got 24 and 16"),
        ({"hash_block_size": 32}, "line 1: expected an alignment that is a multiple of the hash block size"),
        ({"alignment": 32, "hash_block_size": 32}, "a block size that is a multiple of the hash block size"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_the_line(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^line 1: .*{said.removeprefix('line 1: ')}"):
        layout([SWA, FULL], **more)
