"""The embedded engine's cache: what is evicted first, and what its events tell."""

from __future__ import annotations

import logging

import pytest
from vswa_plugins.gemma3_cpu.cache import CacheManager, GroupSpec
from vswa_plugins.gemma3_cpu.cache.hashing import block_key, salt_id

from tests.gemma3_cache_helpers import (
    GLOBAL,
    SLIDING,
    compute,
    drop,
    hashes,
    opened,
    run,
    short,
    tokens,
    two_windows,
)

# -- hashes ----------------------------------------------------------------------------------------


def test_block_keys_are_those_of_tensorrt_llm() -> None:
    first, salted = block_key([1, 2, 3, 4], None), block_key([1, 2, 3, 4], None, 123)

    assert (first, block_key([5, 6], first)) == (924206229973855, 6875034662206558884)
    assert (salted, block_key([5, 6], salted)) == (6280297290684427985, 18177682803760873588)


def test_a_salt_counts_in_the_first_block_only() -> None:
    assert block_key([5, 6], 7, salt_id("a")) == block_key([5, 6], 7)
    assert int.from_bytes(bytes.fromhex("ca978112ca1bbdca"), "little") == salt_id("a")


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
