"""What a prompt can reuse under TensorRT-LLM V2's rules: to the token, inside blocks too."""

from __future__ import annotations

from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.cache.spec import GroupSpec
from vswa_plugins.gemma3_cpu.cache.v2 import CacheManager, CacheSequence

from tests.gemma3_v2_helpers import (
    BS,
    GLOBAL,
    SLIDING,
    Memory,
    compute,
    hashes,
    opened,
    run,
    tokens,
    two_windows,
)
from vswa_plugin.errors import ConfigError, InvalidRequest, InvariantError


@pytest.mark.parametrize(
    ("prompt", "cached"),
    [
        (tokens(22), 21),
        (tokens(20), 19),
        (tokens(30), 22),
        ([*tokens(18), 99], 18),
        ([*tokens(16), 99], 16),
        ([*tokens(3), 99, 99], 3),
        ([99, *tokens(22)], 0),
        ([0], 0),
    ],
    ids=["again", "whole blocks", "longer", "inside a block", "boundary", "first block", "new", "one token"],
)
def test_reuse_ends_where_the_tokens_do_but_before_the_last_of_the_prompt(
    prompt: list[int], cached: int
) -> None:
    manager = two_windows()
    run(manager, tokens(22))

    assert cached == run(manager, prompt)


def test_the_block_that_shares_most_is_gone_on_in_and_the_first_of_equals() -> None:
    manager = two_windows()
    for first, second in ([1, 9], [1, 2], [3, 9], [3, 8]):
        run(manager, [*tokens(4), first, second, 50 + first, 50 + second, 0])
    _lose_sliding_page(manager, [*tokens(4), 3, 9, 53, 59])

    assert 6 == run(manager, [*tokens(4), 1, 2, 77, 77, 77])
    # Both children share one token; the first has no sliding page any more, which is not looked at before.
    assert 4 == run(manager, [*tokens(4), 3, 7, 77, 77, 77])


def test_no_block_is_gone_on_in_among_32_children_or_where_that_is_switched_off() -> None:
    switched_off, crowded = two_windows(enable_partial_reuse=False), two_windows(400, 400)
    run(switched_off, tokens(11))
    for child in range(32):
        cached = run(crowded, [*tokens(4), 100 + child, 1, 2, 3])

    assert (4, 8) == (run(switched_off, tokens(7)), run(switched_off, tokens(9)))
    # The tail that is not full has exactly these tokens: no part of a block, a block.
    assert 11 == run(switched_off, tokens(12))
    assert (4, 4) == (cached, run(crowded, [*tokens(4), 100, 1, 2, 3, 4][:8]))
    assert 8 == run(crowded, [*tokens(4), 100, 1, 2, 3, 4]), "a whole block is found by its tokens"


def test_one_missing_sliding_block_costs_the_run_back_to_a_complete_window() -> None:
    manager = two_windows()
    run(manager, tokens(25))
    _lose_sliding_page(manager, tokens(20))

    # Of blocks 0 to 5 the window before token 24 needs 4 and 5; before token 16 it needs 2 and 3.
    assert 16 == opened(manager, tokens(25)).cached_tokens


def test_a_block_that_is_gone_on_in_is_copied_and_stays_as_it_was() -> None:
    manager, memory = _with_memory()
    first, second = tokens(14), [*tokens(10), 90, 91, 92, 93, 94]
    _run_with(manager, memory, first)
    running = opened(manager, second, 3)
    memory.check_sequence(running, second)

    assert (10, [SLIDING, GLOBAL]) == (running.cached_tokens, [group for group, *_ in memory.moves])
    _compute_with(running, memory, second)
    memory.check_tree(manager)
    assert 13 == opened(manager, first).cached_tokens


def test_a_request_that_fills_the_pool_goes_on_from_a_block_start_for_want_of_room_for_the_copy() -> None:
    tight, roomy = two_windows(50, 6), two_windows(50, 7)
    for manager in (tight, roomy):
        run(manager, [*tokens(21), 99])

    # The copy of block 5 and block 5 itself would be a seventh page.
    assert (20, 21) == (run(tight, [*tokens(21), 98, 98], 1), run(roomy, [*tokens(21), 98, 98], 1))


def test_a_request_waits_for_the_room_that_its_copy_takes() -> None:
    manager = two_windows(50, 13)
    run(manager, [*tokens(21), 99])
    other = opened(manager, tokens(24, 200))

    assert manager.open([*tokens(21), 98, 98], 1) is None
    manager.check()
    other.close()
    assert 21 == opened(manager, [*tokens(21), 98, 98]).cached_tokens


def test_output_is_not_reused() -> None:
    manager = two_windows()
    run(manager, tokens(8), new=9)

    assert 8 == run(manager, tokens(20))


def test_without_block_reuse_nothing_outlives_its_sequence() -> None:
    manager = two_windows(enable_block_reuse=False)
    run(manager, tokens(20))

    assert (0, {SLIDING: {}, GLOBAL: {}}) == (run(manager, tokens(20)), manager.resident())
    assert 50 == manager.stats()["blocks_free_8"]


def test_cache_salts_share_nothing() -> None:
    manager = two_windows()

    assert (0, 0, 0) == tuple(run(manager, tokens(9), salt=salt) for salt in (None, "a", "b"))
    assert (8, 8) == (run(manager, tokens(9), salt="a"), run(manager, tokens(9)))
    held = set(manager.resident()[GLOBAL])
    assert held == {h for salt in (None, "a", "b") for h in hashes(tokens(9), salt=salt)}


def test_a_salt_of_which_nothing_was_committed_leaves_nothing() -> None:
    manager = two_windows()
    opened(manager, tokens(9), salt="a").close()

    assert {} == manager._store.tree.roots


def test_a_tail_that_was_evicted_before_the_next_block_was_computed_ends_committing() -> None:
    # Before token 7 a window of one block sees block 1 only, so block 0 is stale while it is the tail.
    manager = CacheManager([GroupSpec(SLIDING, BS, 10)], BS, 64)
    running = opened(manager, tokens(12))
    compute(running, 7, chunk=7)
    _lose_sliding_page(manager, tokens(4))
    compute(running, 12)
    running.close()

    assert {SLIDING: {}} == manager.resident()
    manager.check()


def test_admission_counts_the_most_pages_that_open_sequences_can_hold() -> None:
    manager = two_windows(50, 9)
    first = opened(manager, tokens(16), 4)

    assert manager.open(tokens(16), 1) is None
    with pytest.raises(InvalidRequest, match="in the pool of window global, which has 9"):
        manager.open(tokens(36), 1)
    with pytest.raises(InvariantError, match="20 in all"):
        compute(first, 21)
    first.close()
    assert 15 == opened(manager, tokens(16)).cached_tokens


def test_groups_with_pages_of_one_size_share_a_pool() -> None:
    manager = two_windows(4, 10, layers=(3, 3))

    with pytest.raises(InvalidRequest, match="windows 8 and global, which has 14"):
        manager.open(tokens(48), 1)
    # Alone, the sliding group's 4 blocks would not do: a window and a chunk can be 7.
    assert (0, 23) == (run(manager, tokens(24), 1), run(manager, tokens(24), 1))
    used = [page for pool in manager._store.device for page in pool.queue]
    assert ({0, 1}, 1) == ({page.group for page in used}, len(manager._store.device))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 10}, "multiple of the block size"),
        ({"sliding": 0}, "0 blocks"),
        ({"host": (-1, 0)}, "-1 host blocks"),
        ({"max_chunk_tokens": 0}, "max_chunk_tokens"),
    ],
    ids=["window", "no blocks", "host blocks", "chunk"],
)
def test_sizes_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        two_windows(**settings)


def _lose_sliding_page(manager: CacheManager, prefix: list[int]) -> None:
    """Evict the sliding page of the last block of ``prefix``, as pressure would."""
    path, _ = manager._store.tree.walk(tuple(prefix), None, False)
    page = path[-1].pages[SLIDING]
    assert page is not None
    manager._store.pool(page).remove(page)
    manager._store._lose(page)
    manager.check()


def _with_memory() -> tuple[CacheManager, Memory]:
    memory = Memory(two_windows()._store.groups, BS)
    return two_windows(mover=memory.move), memory


def _run_with(manager: CacheManager, memory: Memory, prompt: list[int]) -> None:
    sequence = opened(manager, prompt)
    _compute_with(sequence, memory, prompt)
    sequence.close()


def _compute_with(sequence: CacheSequence, memory: Memory, prompt: list[int]) -> None:
    sequence.reserve(len(prompt))
    memory.write(sequence, prompt, range(sequence.computed_tokens, len(prompt)))
    sequence.advance(len(prompt) - sequence.computed_tokens)
