"""The embedded engine's cache: who is let in, and what it finds wrong with itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.cache import CacheManager, CacheSequence, GroupSpec

from tests.gemma3_cache_helpers import GLOBAL, SLIDING, compute, opened, run, tokens, two_windows
from vswa_plugin.errors import ConfigError, InvalidRequest, InvariantError

# -- admission -------------------------------------------------------------------------------------


@given(
    bs=st.integers(1, 5),
    blocks=st.integers(1, 4),
    chunk=st.integers(1, 12),
    steps=st.lists(st.integers(1, 12), min_size=1, max_size=30),
)
def test_a_sliding_group_never_holds_more_than_is_reserved(
    bs: int, blocks: int, chunk: int, steps: list[int]
) -> None:
    group = GroupSpec(0, bs * blocks, 1)
    total = sum(min(step, chunk) for step in steps)
    most, computed = group.most_held(total, bs, chunk), 0
    for step in steps:
        upto = computed + min(step, chunk)
        first_visible = max(0, computed - bs * blocks + 1) // bs
        assert -(-upto // bs) - first_visible <= most
        computed = upto


@pytest.mark.parametrize(("bs", "window", "chunk"), [(32, 512, 256), (4, 8, 5), (1, 3, 2), (3, 3, 7)])
def test_the_reservation_of_a_sliding_group_is_not_larger_than_needed(
    bs: int, window: int, chunk: int
) -> None:
    group = GroupSpec(0, window, 1)
    held = max(-(-(h + chunk) // bs) - group.stale_end(h, bs) for h in range(10 * (window + chunk)))

    assert held == group.most_held(10**6, bs, chunk)


def test_a_request_waits_until_those_that_run_leave_it_room() -> None:
    manager = two_windows(sliding=100, global_=10)
    first = opened(manager, tokens(20), new=4)

    assert manager.open(tokens(17, 100), 1) is None
    assert manager.open(tokens(16, 100), 1) is None
    assert manager.open(tokens(15, 100), 1) is not None
    first.close()
    assert manager.open(tokens(20, 200), 4) is not None


def test_reused_blocks_count_as_room_taken() -> None:
    manager = two_windows(sliding=100, global_=8)
    run(manager, tokens(17))
    opened(manager, tokens(17))

    assert manager.open(tokens(17), 1) is None


@pytest.mark.parametrize(
    ("prompt_len", "new", "words"),
    [
        (0, 5, "got 0 prompt tokens and max_tokens 5"),
        (5, 0, "got 5 prompt tokens and max_tokens 0"),
        (
            8000,
            200,
            "8000 prompt tokens and up to 200 output tokens make 8200, but a sequence has at most 8192",
        ),
        (300, 10, "need 78 blocks of 4 tokens in the pool of window global, which has 50"),
    ],
)
def test_a_request_that_never_fits_is_refused_with_the_numbers(prompt_len: int, new: int, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        two_windows().check_fits(prompt_len, new)


def test_open_refuses_what_never_fits() -> None:
    with pytest.raises(InvalidRequest, match="pool of window 8, which has 5"):
        two_windows(sliding=5).open(tokens(100), 1)


@pytest.mark.parametrize(
    ("groups", "bs", "words"),
    [
        ([], 4, "at least one cache group"),
        ([GroupSpec(0, 8, 5), GroupSpec(0, None, 5)], 4, "each id once"),
        ([GroupSpec(0, 10, 5)], 4, "multiple of the block size"),
        ([GroupSpec(0, 8, 0)], 4, "a block at least"),
        ([GroupSpec(0, 8, 5)], 0, "block_size of at least 1"),
    ],
)
def test_sizes_that_cannot_work_are_refused(groups: list[GroupSpec], bs: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CacheManager(groups, bs, 100)


# -- misuse and self-check -------------------------------------------------------------------------


def test_more_than_was_admitted_is_a_bug() -> None:
    sequence = opened(two_windows(), tokens(10), new=2)
    with pytest.raises(InvariantError, match="12 in all"):
        sequence.reserve(13)
    with pytest.raises(InvariantError, match="at most 0 computed"):
        sequence.advance(1)
    sequence.close()
    sequence.close()
    with pytest.raises(InvariantError, match="closed sequence"):
        sequence.reserve(4)


def test_a_step_longer_than_the_chunk_is_a_bug() -> None:
    with pytest.raises(InvariantError, match="at most 16 tokens a step"):
        opened(two_windows(), tokens(40)).reserve(17)


def corrupt_holders(manager: CacheManager, sequence: CacheSequence) -> None:
    manager._store.pools[GLOBAL].holders[0] += 1


def corrupt_free(manager: CacheManager, sequence: CacheSequence) -> None:
    manager._store.pools[GLOBAL]._free.append(sequence.tables[GLOBAL][-1])


def corrupt_table(manager: CacheManager, sequence: CacheSequence) -> None:
    sequence.tables[SLIDING][-1] = sequence.tables[SLIDING][-2]


def corrupt_reservation(manager: CacheManager, sequence: CacheSequence) -> None:
    manager._reserved[SLIDING] -= 1


def corrupt_pins(manager: CacheManager, sequence: CacheSequence) -> None:
    sequence.tail.pins += 1


def corrupt_ancestor(manager: CacheManager, sequence: CacheSequence) -> None:
    manager._store.pools[GLOBAL].release(sequence.tables[GLOBAL][0])


@pytest.mark.parametrize(
    "corrupt",
    [corrupt_holders, corrupt_free, corrupt_table, corrupt_reservation, corrupt_pins, corrupt_ancestor],
)
def test_check_finds_what_is_broken(corrupt: Any) -> None:
    manager = two_windows()
    sequence = opened(manager, tokens(22))
    compute(sequence, 22)
    manager.check()
    corrupt(manager, sequence)

    with pytest.raises(InvariantError, match="KV cache: "):
        manager.check()
