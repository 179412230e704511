"""Manager V1's events: their order, what is not told, and how they go through the adapter."""

from __future__ import annotations

import pytest
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from tests.gemma3_v1_helpers import (
    GLOBAL,
    SLIDING,
    Mirror,
    compute,
    layout_of,
    lose,
    names,
    opened,
    run,
    short,
    tokens,
    two_windows,
)
from vswa_plugin.blocks.hashing import block_hashes, sequence_hashes
from vswa_plugin.publishing.residency import Residency

both = pytest.mark.parametrize("contiguous", [False, True], ids=["past holes", "contiguous"])


@both
def test_windows_are_created_smallest_first_each_with_its_own_blocks_per_level(contiguous: bool) -> None:
    manager = two_windows(sliding=50, global_=60, host=7, contiguous=contiguous, dp_rank=3)

    assert [
        {
            "event_id": i,
            "data": {"type": "created", "num_blocks_per_cache_level": [blocks, 7]},
            "window_size": window,
            "attention_dp_rank": 3,
        }
        for i, (window, blocks) in enumerate([(8, 50), (8192, 60)])
    ] == manager.flush_events()


def test_full_blocks_are_told_after_each_chunk_and_the_rest_at_the_end() -> None:
    manager = two_windows()
    manager.flush_events()
    sequence = opened(manager, tokens(20), 7)
    chain = names([*tokens(20), *tokens(4, 50)])

    compute(sequence, 16)
    told = list(map(short, manager.flush_events()))
    assert [("stored", 8192, chain[:3]), ("stored", 8, chain[:3])] == told, "the last token does not count"
    compute(sequence, 20)
    told = list(map(short, manager.flush_events()))
    assert [("stored", 8192, chain[3:5]), ("stored", 8, chain[3:5])] == told, "now it does"
    compute(sequence, 26)
    sequence.close(tokens(7, 50))
    smallest, largest = manager.flush_events()
    assert [8, 8192] == [smallest["window_size"], largest["window_size"]]
    blocks = largest["data"]["blocks"]
    assert (chain[4], chain[5:]) == (
        largest["data"]["parent_hash"],
        [block["block_hash"] for block in blocks[:-1]],
    )
    assert [54, 55] == [token["token_id"] for token in blocks[-1]["tokens"]]


@pytest.mark.parametrize("new", [1, 2])
def test_a_contiguous_manager_tells_sliding_blocks_at_the_end_only(new: int) -> None:
    manager = two_windows(contiguous=True)
    manager.flush_events()
    sequence = opened(manager, tokens(14), new)
    chain = names(tokens(12))

    compute(sequence, 14)
    # A request of one step has ended before its blocks would be stored.
    assert [("stored", 8192, chain)] * (new - 1) == list(map(short, manager.flush_events()))
    compute(sequence, 13 + new)
    sequence.close(tokens(new, 50))
    smallest, largest = map(short, manager.flush_events())
    assert (8, 4) == (smallest[1], len(smallest[2]))
    assert (8192, 4 if new == 1 else 1) == (largest[1], len(largest[2]))


def test_an_event_goes_on_behind_a_block_that_is_there_already() -> None:
    manager = two_windows()
    run(manager, tokens(24))
    chain = names(tokens(24))
    lose(manager, GLOBAL, tokens(24), [1, 3])
    manager.flush_events()
    compute(opened(manager, tokens(24)), 24)
    told = [event for event in manager.flush_events() if event["window_size"] == 8192]

    assert [(chain[0], [chain[1], chain[3]])] == [
        (event["data"]["parent_hash"], short(event)[2]) for event in told
    ]


def test_a_block_whose_predecessor_is_gone_leaves_without_an_event() -> None:
    manager = two_windows()
    run(manager, tokens(20))
    manager.flush_events()
    lose(manager, SLIDING, tokens(20), [1, 2, 4])
    chain = names(tokens(20))

    assert [("removed", 8, [chain[1], chain[4]])] == list(map(short, manager.flush_events()))
    assert {chain[0], chain[3]} == set(manager.resident()[SLIDING])


def test_losses_wait_for_the_next_blocks_of_their_window_or_the_end_of_the_step() -> None:
    manager = two_windows(sliding=8, global_=8)
    for first in (0, 100):
        run(manager, tokens(12, first))
    manager.flush_events()
    run(manager, tokens(12, 200))
    told = [each[:2] for each in map(short, manager.flush_events())]

    assert [("removed", 8192), ("stored", 8192), ("removed", 8), ("stored", 8)] == told
    lose(manager, GLOBAL, tokens(12, 200), [2])
    lose(manager, SLIDING, tokens(12, 200), [2])
    assert [("removed", 8), ("removed", 8192)] == [each[:2] for each in map(short, manager.flush_events())]


@both
def test_sliding_out_is_not_told_and_losses_of_one_window_are_one_event(contiguous: bool) -> None:
    manager = two_windows(sliding=9, window=4, contiguous=contiguous)
    run(manager, tokens(16))
    run(manager, tokens(16, 50))
    manager.flush_events()
    sequence = opened(manager, tokens(16, 100))
    sequence.reserve(16)
    removed = [event for event in manager.flush_events() if event["data"]["type"] == "removed"]

    assert [4] == [event["window_size"] for event in removed]
    assert 3 == len(removed[0]["data"]["block_hashes"])


def test_only_the_evicted_block_of_a_contiguous_window_is_told() -> None:
    manager = two_windows(contiguous=True)
    run(manager, tokens(20))
    manager.flush_events()
    lose(manager, SLIDING, tokens(20), [1])

    assert [("removed", 8, names(tokens(20))[1:2])] == list(map(short, manager.flush_events()))


def test_a_block_that_was_lost_silently_is_told_again_when_it_is_stored_again() -> None:
    manager = two_windows(contiguous=True)
    mirror = Mirror(manager._groups, 8192, subtrees=True)
    running = opened(manager, tokens(20), 4)
    compute(running, 16)
    lose(manager, GLOBAL, tokens(20), [0])
    assert [] == list(manager.resident()[GLOBAL])
    compute(running, 20)
    running.close([9])
    for event in manager.flush_events():
        mirror.read(event)

    assert set(names(tokens(20))) <= set(manager.resident()[GLOBAL])
    assert manager.resident() == mirror.held


@both
def test_evicted_blocks_move_to_the_host_and_come_back_on_a_hit(contiguous: bool) -> None:
    manager = two_windows(sliding=8, global_=8, window=4, host=20, contiguous=contiguous)
    run(manager, tokens(16))
    manager.flush_events()
    run(manager, tokens(24, 100))
    told = list(map(short, manager.flush_events()))
    gone = [name for kind, window, name in told if kind == "updated" and window == 8192]

    assert {"updated", "stored"} == {kind for kind, _, _ in told}
    assert dict.fromkeys(gone, 1).items() <= manager.resident()[GLOBAL].items()
    assert manager.stats()["blocks_host_global"] == len(gone)
    run(manager, tokens(17))
    back = [
        event["data"]["cache_level"]["new_value"]
        for event in manager.flush_events()
        if event["data"]["type"] == "updated"
        and event["window_size"] == 8192
        and event["data"]["block_hash"] in gone
    ]
    assert back.count(0) == len([name for name in gone if name in names(tokens(16))])


def test_a_full_host_loses_its_oldest_block() -> None:
    manager = two_windows(sliding=8, global_=8, window=4, host=1)
    run(manager, tokens(16))
    run(manager, tokens(24, 100))
    kinds = [short(event)[0] for event in manager.flush_events() if event["window_size"] == 8192]

    assert kinds.index("updated") < kinds.index("removed")


def test_the_oldest_events_are_lost_to_a_full_buffer() -> None:
    manager = two_windows(event_buffer_max_size=3)
    run(manager, tokens(20))

    assert [3, 4, 5] == [event["event_id"] for event in manager.flush_events()]
    assert 3.0 == manager.stats()["kv_events_dropped"]
    manager = two_windows(event_buffer_max_size=0)
    run(manager, tokens(20))
    assert [] == manager.flush_events()


@pytest.mark.parametrize("contiguous", [False, True])
def test_the_adapter_joins_windows_to_groups_and_recovers_silent_losses(contiguous: bool) -> None:
    manager = two_windows(sliding=20, global_=40, contiguous=contiguous, host=3)
    adapter, residency = TrtllmEventAdapter(layout_of(manager)), Residency(layout_of(manager))
    texts = [tokens(30, 100 * i) for i in range(8)]
    for i in range(24):
        run(manager, texts[i * 5 % 8], tokens(3, 2000 + i))
        for raw in manager.flush_events():
            for event in adapter.feed(raw):
                residency.apply(event)
    told = residency.resident()
    held = {
        group_id: {
            hashed
            for text in texts
            for name, hashed in zip(names(text), sequence_hashes(block_hashes(text, 4)), strict=True)
            if name in resident
        }
        for group_id, resident in manager.resident().items()
    }
    known = {hashed for text in texts for hashed in sequence_hashes(block_hashes(text, 4))}
    told = {group_id: hashes & known for group_id, hashes in told.items()}

    assert 0 == residency.unattributed
    assert all(held.values())
    assert held == told
