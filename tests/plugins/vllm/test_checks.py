"""What vLLM's events say of its groups, against the layout that was declared."""

from __future__ import annotations

from typing import Any

import pytest
from vswa_plugins.vllm.checks import LayoutCheck

from tests.vllm_events_helpers import SIZE, layout_of
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout


def stored(group: int | None = 0, **says: Any) -> dict[str, Any]:
    window = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 8}
    return {"type": "BlockStored", "block_size": SIZE, "group_idx": group, **window, **says}


GLOBAL = {"kv_cache_spec_kind": "full_attention", "kv_cache_spec_sliding_window": None}


def said(*events: object) -> list[str | None]:
    check = LayoutCheck(layout_of(8, None))
    return [check.contradiction(event) for event in events]


@pytest.mark.parametrize(
    "event",
    [
        stored(),
        stored(1, **GLOBAL),
        stored(1, **{**GLOBAL, "kv_cache_spec_sliding_window": 8}),
        stored(kv_cache_spec_kind=None, kv_cache_spec_sliding_window=None),
        {"type": "BlockRemoved", "group_idx": 7},
        {"type": "AllBlocksCleared"},
        stored([1]),
        "no map",
    ],
    ids=str,
)
def test_what_agrees_or_says_nothing_is_no_contradiction(event: object) -> None:
    assert [None, None] == said(event, event)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (stored(1), "cache group 1: expected window global, got a window of 8 tokens"),
        (stored(0, **GLOBAL), "cache group 0: expected window 8, got global attention"),
        (stored(kv_cache_spec_sliding_window=16), "cache group 0: expected window 8, got a window of 16"),
        (stored(2), "expected events of cache groups [0, 1], got some of 2"),
        (stored(None), "expected events of cache groups [0, 1], got some of None"),
        (stored(block_size=16), "cache group 0: expected blocks of 4 tokens, got blocks of 16"),
    ],
)
def test_a_contradiction_says_what_was_expected_each_time(event: object, message: str) -> None:
    texts = said(stored(), event, event)

    assert texts[0] is None
    assert message in str(texts[1]) and texts[1] == texts[2]


def test_a_group_without_a_number_is_the_only_one() -> None:
    assert LayoutCheck(layout_of(8)).contradiction(stored(None)) is None


#: A state, a full group of larger blocks than the hash unit, and one that gives the unit.
SEVERAL = CacheLayout(
    (CacheGroup(0, None, 16, "recurrent"), CacheGroup(1, None, 16), CacheGroup(2, 8, 4)), "vllm_hybrid", "m"
)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (stored(0, block_size=16, kv_cache_spec_kind="mamba", kv_cache_spec_sliding_window=None), None),
        (stored(1, block_size=16, **GLOBAL), None),
        (stored(2), None),
        # A full group stores the end of a prompt as an entry of one hash unit; others store whole blocks.
        (stored(1, **GLOBAL), None),
        (stored(1, block_size=8, **GLOBAL), "expected blocks of 16 tokens, got blocks of 8"),
        (stored(0, kv_cache_spec_kind="mamba"), "expected blocks of 16 tokens, got blocks of 4"),
        (stored(2, block_size=16), "expected blocks of 4 tokens, got blocks of 16"),
        (stored(0, block_size=16, **GLOBAL), "expected window recurrent, got the kind 'full_attention'"),
        (
            stored(1, block_size=16, kv_cache_spec_kind="mamba"),
            "expected window global, got the kind 'mamba'",
        ),
    ],
)
def test_groups_of_other_kinds_and_sizes_are_compared_too(event: object, message: str | None) -> None:
    found = LayoutCheck(SEVERAL).contradiction(event)

    assert found is None if message is None else message in str(found)
