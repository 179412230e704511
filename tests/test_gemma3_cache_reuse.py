"""The embedded engine's cache: which pages a sequence holds, and what the next one reuses of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from vswa_plugins.gemma3_cpu.cache import CacheManager, GroupSpec

from tests.gemma3_cache_helpers import GLOBAL, SLIDING, compute, drop, opened, run, short, tokens, two_windows

# -- pages -----------------------------------------------------------------------------------------


def test_a_fresh_pool_hands_out_pages_in_order_and_freed_ones_lowest_first() -> None:
    manager = two_windows(enable_block_reuse=False)
    first, second = opened(manager, tokens(16)), opened(manager, tokens(8, 100))
    first.reserve(16)
    second.reserve(8)

    assert [first.tables[GLOBAL], second.tables[GLOBAL]] == [[0, 1, 2, 3], [4, 5]]

    first.close()
    second.reserve(9)

    assert second.tables[GLOBAL] == [4, 5, 0]


def test_blocks_that_left_the_window_are_let_go_after_each_step() -> None:
    sequence = opened(two_windows(), tokens(30))
    compute(sequence, 16)

    # The token at 16 sees [9, 16]: block 2 and what follows.
    assert sequence.tables[SLIDING] == [-1, -1, 2, 3]
    assert sequence.tables[GLOBAL] == [0, 1, 2, 3]


def test_tables_stay_the_same_lists() -> None:
    sequence = opened(two_windows(), tokens(30))
    before = [id(table) for table in sequence.tables]
    compute(sequence, 30)

    assert before == [id(table) for table in sequence.tables]


def test_uncommitted_blocks_are_freed_at_once_when_they_leave_the_window() -> None:
    manager = two_windows()
    sequence = opened(manager, tokens(4), new=30)
    compute(sequence, 30)

    # Blocks 6 and 7 are in the window; of the stale ones only the prompt's is kept for reuse.
    assert {state: manager.stats()[f"blocks_{state}_8"] for state in ("used", "free", "droppable")} == {
        "used": 3,
        "free": 46,
        "droppable": 1,
    }


# -- reuse -----------------------------------------------------------------------------------------


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    manager = two_windows()
    run(manager, tokens(16))

    assert [run(manager, tokens(16)), run(manager, tokens(17))] == [12, 16]


def test_output_is_never_kept_for_reuse() -> None:
    manager = two_windows()
    sequence = opened(manager, tokens(6), new=20)
    compute(sequence, 25)
    sequence.close()

    assert {group: len(held) for group, held in manager.resident().items()} == {0: 1, 1: 1}
    assert run(manager, tokens(26)) == 4


def test_blocks_can_be_reused_as_soon_as_their_chunk_is_computed() -> None:
    manager = two_windows()
    sequence = opened(manager, tokens(40))
    compute(sequence, 16)

    assert opened(manager, tokens(40)).cached_tokens == 16


def test_salts_share_nothing() -> None:
    manager = two_windows()
    found = [run(manager, tokens(9), salt=salt) for salt in (None, "a", "b", None, "a")]

    assert found == [0, 0, 0, 8, 8]


def test_without_reuse_nothing_outlives_its_sequence() -> None:
    manager = two_windows(enable_block_reuse=False)

    assert [run(manager, tokens(20)), run(manager, tokens(20))] == [0, 0]
    assert {0: set(), 1: set()} == manager.resident()
    assert [short(event)[0] for event in manager.flush_events()] == ["created", "created"]


@pytest.mark.parametrize(
    ("sliding", "global_end", "reused"),
    [
        (range(125), 125, 4000),
        (range(109, 125), 125, 4000),
        (range(110, 125), 125, 0),
        ([*range(51), *range(110, 125)], 125, 1632),
        ([*range(61), *range(100, 111)], 125, 1952),
        ([*range(61), *range(90, 111)], 125, 3552),
        ([*range(51), *range(100, 125)], 125, 4000),
        ([], 125, 0),
        (range(125), 60, 1920),
        ([*range(41), *range(109, 125)], 60, 1312),
    ],
)
def test_reuse_is_what_the_real_manager_reuses(sliding: Sequence[int], global_end: int, reused: int) -> None:
    """gemma-3-1b, 32 tokens a block, a prompt of 4,001 tokens, with these blocks left."""
    manager = two_windows(200, 200, window=512, bs=32, max_chunk_tokens=256)
    prompt = tokens(4001)
    run(manager, prompt)
    drop(manager, GLOBAL, prompt, range(global_end, min(global_end + 1, 125)))
    drop(manager, SLIDING, prompt, [i for i in range(global_end) if i not in sliding])

    assert reused == opened(manager, prompt).cached_tokens


@pytest.mark.parametrize(("held", "reused"), [([4], 0), ([0, 4], 4), ([0, 2, 4], 4), ([0, 3, 4], 4)])
def test_what_one_window_cuts_is_settled_again_with_the_others(held: list[int], reused: int) -> None:
    """The first window is content at the end of the prompt, but not where the second one cuts it."""
    groups = [GroupSpec(0, 4, 20), GroupSpec(1, 8, 20), GroupSpec(2, None, 20)]
    manager = CacheManager(groups, 4, 100, max_chunk_tokens=32)
    run(manager, tokens(21))
    drop(manager, 0, tokens(21), [i for i in range(5) if i not in held])
    drop(manager, 1, tokens(21), [1, 2, 3, 4])

    assert reused == opened(manager, tokens(21)).cached_tokens


def test_a_hit_holds_only_the_blocks_that_it_needs() -> None:
    manager = two_windows()
    run(manager, tokens(33))
    sequence = opened(manager, tokens(33))

    assert sequence.cached_tokens == 32
    assert sequence.tables[SLIDING][:6] == [-1] * 6
    assert manager.stats()["blocks_used_8"] == 2
    assert manager.stats()["blocks_used_global"] == 8


def test_of_two_that_compute_the_same_block_the_second_takes_over_the_page_of_the_first() -> None:
    manager = two_windows()
    first, second = opened(manager, tokens(12)), opened(manager, tokens(12))
    compute(first, 8)
    second.reserve(8)
    assert not set(first.tables[GLOBAL]) & set(second.tables[GLOBAL])
    second.advance(8)
    manager.check()

    assert first.tables == second.tables
    assert manager.stats()["blocks_used_global"] == 2
