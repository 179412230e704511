"""The cache manager of the embedded engine, rule by rule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.cache import CacheManager, CacheSequence, GroupSpec
from vswa_plugins.gemma3_cpu.cache.hashing import block_key, salt_id

from vswa_plugin.errors import ConfigError, InvalidRequest, InvariantError

SLIDING, GLOBAL = 0, 1


def two_windows(
    sliding: int = 50, global_: int = 50, *, window: int = 8, bs: int = 4, **options: Any
) -> CacheManager:
    groups = [GroupSpec(0, window, sliding), GroupSpec(1, None, global_)]
    options.setdefault("max_chunk_tokens", 16)
    return CacheManager(groups, bs, 8192, **options)


def tokens(n: int, first: int = 0) -> list[int]:
    return list(range(first, first + n))


def compute(sequence: CacheSequence, upto: int, chunk: int = 16) -> None:
    while sequence.computed_tokens < upto:
        step = min(chunk, upto - sequence.computed_tokens)
        sequence.reserve(sequence.computed_tokens + step)
        sequence.advance(step)


def opened(
    manager: CacheManager, prompt: Sequence[int], new: int = 1, salt: str | None = None
) -> CacheSequence:
    sequence = manager.open(prompt, new, salt)
    assert sequence is not None
    return sequence


def run(manager: CacheManager, prompt: Sequence[int], new: int = 1, salt: str | None = None) -> int:
    """One request from start to end; how many tokens it reused."""
    sequence = opened(manager, prompt, new, salt)
    compute(sequence, len(prompt))
    compute(sequence, len(prompt) + new - 1)
    sequence.close()
    manager.check()
    return sequence.cached_tokens


def short(event: dict[str, Any]) -> tuple[Any, ...]:
    """An event without its constant parts: kind, group, and what it names."""
    data = event["data"]
    blocks = [block["block_hash"] for block in data.get("blocks", [])]
    return data["type"], event["layer_group_id"], blocks or data.get("block_hashes")


def hashes(prompt: Sequence[int], bs: int = 4) -> list[int]:
    chain: list[int] = []
    for i in range(0, len(prompt) - bs + 1, bs):
        chain.append(block_key(prompt[i : i + bs], chain[-1] if chain else None))
    return chain


def drop(manager: CacheManager, group: int, prompt: Sequence[int], blocks: Sequence[int]) -> None:
    """Evict given blocks of ``prompt`` from one group, as pressure from other requests would."""
    store = manager._store
    path = store.tree.walk(
        None, [tuple(prompt[i : i + store.block_size]) for i in block_starts(manager, prompt)]
    )
    for block in blocks:
        store._evict(group, path[block].pages[group])
    manager.check()


def block_starts(manager: CacheManager, prompt: Sequence[int]) -> range:
    bs = manager._store.block_size
    return range(0, len(prompt) - bs + 1, bs)


# -- hashes ----------------------------------------------------------------------------------------


def test_block_keys_are_those_of_tensorrt_llm() -> None:
    first, salted = block_key([1, 2, 3, 4], None), block_key([1, 2, 3, 4], None, 123)

    assert (first, block_key([5, 6], first)) == (924206229973855, 6875034662206558884)
    assert (salted, block_key([5, 6], salted)) == (6280297290684427985, 18177682803760873588)


def test_a_salt_counts_in_the_first_block_only() -> None:
    assert block_key([5, 6], 7, salt_id("a")) == block_key([5, 6], 7)
    assert int.from_bytes(bytes.fromhex("ca978112ca1bbdca"), "little") == salt_id("a")


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


# -- eviction --------------------------------------------------------------------------------------


def test_stale_sliding_blocks_go_first_then_tails() -> None:
    manager = two_windows()
    prompt = tokens(24)
    run(manager, prompt)
    names = hashes(prompt)
    manager.flush_events()
    for g in (SLIDING, GLOBAL):
        store = manager._store
        for page in store.take(g, 50):
            store.pools[g].release(page)
        manager.check()

    # Without its global page nothing of a block can be reused, but here the sliding ones are gone already.
    assert [
        ("removed", 0, [names[i] for i in (0, 1, 2, 3, 5, 4)]),
        ("removed", 1, names[::-1]),
    ] == [short(event) for event in manager.flush_events()]


def test_a_hit_queues_anew_what_it_needed_and_nothing_else() -> None:
    manager = two_windows()
    run(manager, tokens(24))
    sequence = opened(manager, tokens(13))
    assert sequence.cached_tokens == 12
    sequence.close()
    pool = manager._store.pools[SLIDING]
    order = [pool.nodes[page].hash for page in pool.droppable]  # type: ignore[union-attr]
    names = hashes(tokens(24))

    # The token at 12 sees [5, 12]: blocks 1 and 2, released last block first.
    assert [names[i] for i in (0, 3, 5, 4, 2, 1)] == order


def test_losing_a_sliding_block_leaves_the_global_one() -> None:
    manager = two_windows()
    run(manager, tokens(17))
    manager.flush_events()
    drop(manager, SLIDING, tokens(17), [3])

    assert [("removed", 0, hashes(tokens(17))[3:])] == [short(event) for event in manager.flush_events()]


def test_losing_a_global_block_loses_all_below_it_in_all_groups() -> None:
    manager = two_windows()
    run(manager, tokens(16))
    run(manager, tokens(8) + tokens(8, 100))
    names, fork = hashes(tokens(16)), hashes(tokens(8) + tokens(8, 100))
    manager.flush_events()
    drop(manager, GLOBAL, tokens(16), [1])
    events = [short(event) for event in manager.flush_events()]

    assert [event[:2] for event in events] == [("removed", 0), ("removed", 1)]
    for _, _, gone in events:
        assert {*names[1:], *fork[2:]} == set(gone)
        assert names[1] == gone[-1]
        assert gone.index(names[3]) < gone.index(names[2])
    assert {0: {names[0]}, 1: {names[0]}} == manager.resident()


def test_a_recomputed_hole_is_stored_for_its_group_only() -> None:
    manager = two_windows()
    run(manager, tokens(17))
    manager.flush_events()
    drop(manager, SLIDING, tokens(17), [2])
    manager.flush_events()

    assert run(manager, tokens(17)) == 8
    assert [("stored", 0, [hashes(tokens(17))[2]])] == [short(event) for event in manager.flush_events()]


def test_without_a_global_group_nodes_without_pages_do_not_pile_up() -> None:
    manager = CacheManager([GroupSpec(0, 4, 6)], 4, 100, max_chunk_tokens=16)
    for i in range(20):
        run(manager, tokens(17, 100 * i))

    assert len(manager._store.tree.roots[None].children) <= 6


# -- events ----------------------------------------------------------------------------------------


def test_created_comes_first_once_per_group_in_order_of_ids() -> None:
    manager = CacheManager([GroupSpec(1, None, 9), GroupSpec(0, 8, 7)], 4, 128)
    common = {"hash_algo": "v1_block_key"}

    assert [
        {
            "event_id": 0,
            "data": {"type": "created", "num_blocks_per_cache_level": [7]},
            "window_size": 8,
            **common,
            "layer_group_id": 0,
        },
        {
            "event_id": 1,
            "data": {"type": "created", "num_blocks_per_cache_level": [9]},
            "window_size": 128,
            **common,
            "layer_group_id": 1,
        },
    ] == manager.flush_events()


def test_stored_is_as_tensorrt_llm_writes_it() -> None:
    manager = two_windows(bs=2)
    manager.flush_events()
    run(manager, [7, 8, 9], salt="a")
    name = block_key([7, 8], None, salt_id("a"))
    block = {
        "type": "stored_block",
        "block_hash": name,
        "tokens": [
            {"type": "unique_token", "token_id": 7, "token_extra_id": 0},
            {"type": "unique_token", "token_id": 8, "token_extra_id": 0},
        ],
        "cache_level": 0,
        "priority": 35,
        "mm_keys": [],
        "cache_salt": "a",
    }
    stored, _ = manager.flush_events()

    assert {
        "event_id": 2,
        "data": {"type": "stored", "parent_hash": None, "blocks": [block]},
        "window_size": 8,
        "hash_algo": "v1_block_key",
        "layer_group_id": 0,
    } == stored


def test_stored_blocks_of_one_step_make_one_event_per_group() -> None:
    manager = two_windows()
    manager.flush_events()
    prompt = tokens(32)
    names = hashes(prompt)
    sequence = opened(manager, prompt)
    compute(sequence, 24, chunk=8)
    first = manager.flush_events()
    compute(sequence, 32)
    second = manager.flush_events()

    assert [("stored", 0, names[:6]), ("stored", 1, names[:6])] == [short(event) for event in first]
    assert [("stored", 0, names[6:]), ("stored", 1, names[6:])] == [short(event) for event in second]
    assert [names[5]] * 2 == [event["data"]["parent_hash"] for event in second]


def test_removals_are_told_before_the_next_stored_block() -> None:
    manager = two_windows(sliding=6, global_=12)
    run(manager, tokens(16))
    manager.flush_events()
    run(manager, tokens(20, 100))
    kinds = [short(event)[:2] for event in manager.flush_events()]

    assert kinds[:3] == [("removed", 0), ("stored", 0), ("stored", 1)]


def test_a_full_event_buffer_loses_the_oldest_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    manager = two_windows(event_buffer_max_size=3)
    with caplog.at_level(logging.WARNING):
        run(manager, tokens(9))
        run(manager, tokens(9, 100))
    events = manager.flush_events()

    assert [event["event_id"] for event in events] == [3, 4, 5]
    assert manager.stats()["kv_events_dropped"] == 3
    assert len([r for r in caplog.records if "event_buffer_max_size=3" in r.message]) == 1


def test_a_buffer_of_zero_turns_events_off() -> None:
    manager = two_windows(event_buffer_max_size=0)
    run(manager, tokens(30))

    assert manager.flush_events() == []
    assert len(manager.resident()[1]) == 7


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
