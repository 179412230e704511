"""KV events and eviction under TensorRT-LLM V2's rules: what is told, of which group, in which order."""

from __future__ import annotations

from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.cache.buffer import EventBuffer
from vswa_plugins.gemma3_cpu.cache.v2.events import EventLog
from vswa_plugins.gemma3_cpu.cache.v2.tree import Tree

from tests.gemma3_v2_helpers import (
    GLOBAL,
    SLIDING,
    Announced,
    compute,
    hashes,
    opened,
    run,
    short,
    tokens,
    two_windows,
)


def told(manager: Any) -> list[tuple[Any, ...]]:
    return [short(event) for event in manager.flush_events()]


def quiet(manager: Any) -> Any:
    manager.flush_events()
    return manager


def test_created_comes_first_with_what_a_level_has_room_for_in_all_groups() -> None:
    device, both = two_windows(140, 240).flush_events(), two_windows(110, 150, host=(50, 70)).flush_events()

    assert [(0, 8, 0), (1, 8192, 1)] == [
        (event["event_id"], event["window_size"], event["layer_group_id"]) for event in device
    ]
    assert [[156]] * 2 == [event["data"]["num_blocks_per_cache_level"] for event in device]
    assert [[116, 53]] * 2 == [event["data"]["num_blocks_per_cache_level"] for event in both]


def test_events_name_their_rank_where_there_are_several() -> None:
    assert {2} == {event["attention_dp_rank"] for event in two_windows(dp_rank=2).flush_events()}
    assert not any("attention_dp_rank" in event for event in two_windows().flush_events())


def test_each_chunk_is_stored_and_the_last_with_the_tail_that_is_not_full() -> None:
    manager = quiet(two_windows())
    running = opened(manager, tokens(22), 5)
    chain = hashes(tokens(22))

    compute(running, 16)
    # Blocks 0 and 1 have left the window by now; they are stored all the same.
    first = manager.flush_events()
    assert [("stored", g, chain[:4]) for g in (SLIDING, GLOBAL)] == [short(event) for event in first]
    assert {None} == {event["data"]["parent_hash"] for event in first}
    compute(running, 22)
    second = manager.flush_events()
    assert [("stored", g, chain[4:]) for g in (SLIDING, GLOBAL)] == [short(event) for event in second]
    assert {chain[3]} == {event["data"]["parent_hash"] for event in second}
    assert [4, 2] == [len(block["tokens"]) for block in second[0]["data"]["blocks"]]
    compute(running, 26)
    running.close()
    assert [] == manager.flush_events(), "output is not committed"


def test_a_longer_block_replaces_the_one_that_it_covers() -> None:
    manager = two_windows()
    run(manager, tokens(6))
    old, new = hashes(tokens(6))[1], hashes(tokens(8))[1]
    quiet(manager)
    run(manager, tokens(8))

    assert [
        ("removed", SLIDING, [old]),
        ("removed", GLOBAL, [old]),
        ("stored", SLIDING, [new]),
        ("stored", GLOBAL, [new]),
    ] == told(manager)


def test_a_tail_with_which_another_block_begins_is_not_stored() -> None:
    manager = two_windows()
    run(manager, tokens(8))
    run(quiet(manager), tokens(6))

    assert [] == told(manager)


def test_a_page_of_a_replaced_block_is_freed_once_its_sequence_closes() -> None:
    manager = two_windows()
    first = opened(manager, tokens(6))
    compute(first, 6)
    run(manager, tokens(8))
    manager.check()
    first.close()
    manager.check()

    assert (2, 48) == (manager.stats()["blocks_droppable_8"], manager.stats()["blocks_free_8"])


def test_stale_sliding_pages_are_evicted_first_then_tails_from_their_end() -> None:
    manager = two_windows(8, 50)
    chain = hashes(tokens(24))
    run(manager, tokens(24))
    quiet(manager)
    for first in range(100, 180, 10):
        run(manager, tokens(4, first))

    removed = [event for event in told(manager) if event[0] == "removed"]
    # Blocks 0 and 1 left the window after the first chunk, 2 and 3 after the second, each time 0 and 2 last.
    assert [("removed", SLIDING, [chain[block]]) for block in (1, 0, 3, 2, 5, 4)] == removed
    assert set(chain) <= set(manager.resident()[GLOBAL]), "of the sliding group only"


def test_a_hit_moves_only_what_it_needed_to_the_end_of_the_line() -> None:
    manager = two_windows(50, 50)
    chain = hashes(tokens(20))
    run(manager, tokens(20))
    run(manager, tokens(21))
    line = [page.node.hash for page in manager._store.device[0].queue]

    assert [chain[1], chain[0], chain[2], *reversed(chain[3:])] == [h for h in line if h in chain]


def test_the_loss_of_a_global_page_takes_all_blocks_below_from_all_groups() -> None:
    manager = two_windows(50, 7)
    run(manager, tokens(17))
    run(manager, [*tokens(12), *tokens(5, 50)])
    first, second = hashes(tokens(17)), hashes([*tokens(12), *tokens(5, 50)])
    compute(opened(quiet(manager), tokens(16, 100)), 16)

    # Four victims: the tails of both requests, each from its end. The last victim goes first.
    lost = [second[4], second[3], first[4], first[3]]
    assert [("removed", SLIDING, lost), ("removed", GLOBAL, lost)] == told(manager)[:2]
    assert set(first[:3]) <= set(manager.resident()[SLIDING]) & set(manager.resident()[GLOBAL])


def test_a_block_whose_sliding_page_was_recomputed_is_stored_in_that_group_only() -> None:
    manager = two_windows(8, 50)
    run(manager, tokens(24))
    for first in (100, 200):
        run(manager, tokens(16, first))
    assert 0 == run(quiet(manager), tokens(24))

    chain, events = hashes(tokens(24)), told(manager)
    stored = [h for kind, g, named in events if kind == "stored" and g == SLIDING for h in named]
    assert chain == stored
    assert not any(kind == "stored" for kind, g, _ in events if g == GLOBAL)


@pytest.mark.parametrize("host", [0, 3], ids=["removed", "updated"])
def test_blocks_are_not_added_to_an_event_that_came_before_another_of_their_group(host: int) -> None:
    manager = two_windows(3, 50, host=(host, 0))
    run(manager, tokens(8, 100))
    quiet(manager)
    run(manager, tokens(4))
    run(manager, tokens(8))
    chain, victim = hashes(tokens(8)), hashes(tokens(8, 100))[1]

    gone = ("updated", SLIDING, victim, 0, 1) if host else ("removed", SLIDING, [victim])
    kept = [("stored", SLIDING, chain[:1]), ("stored", GLOBAL, chain)]
    assert [*kept, gone, ("stored", SLIDING, chain[1:])] == told(manager)


def test_removals_of_a_group_come_right_before_its_next_stored_block_and_before_those_of_others() -> None:
    log = EventLog(EventBuffer({SLIDING: 8, GLOBAL: 64}, 100), [SLIDING, GLOBAL], [5])
    tree = Tree(2, 4)
    nodes = [tree.add(tree.root(None), tuple(tokens(4, first)))[0] for first in (0, 10, 20)]
    log.flush()
    log.removed(nodes[0], GLOBAL)
    log.removed(nodes[1], SLIDING)
    log.stored(nodes[2], [SLIDING])

    told_now = [short(event)[:2] for event in log.flush()]
    assert [("removed", SLIDING), ("removed", GLOBAL), ("stored", SLIDING)] == told_now


def test_a_full_buffer_loses_the_oldest_events_and_ids_skip() -> None:
    manager = two_windows(event_buffer_max_size=3)
    run(manager, tokens(8))

    assert [1, 2, 3] == [event["event_id"] for event in manager.flush_events()]
    assert 1 == manager.stats()["kv_events_dropped"]


def test_without_a_buffer_there_are_no_events() -> None:
    manager = two_windows(8, 50, event_buffer_max_size=0)
    for first in (0, 100, 0):
        run(manager, tokens(24, first))

    assert [] == manager.flush_events()


def test_salted_blocks_carry_their_salt() -> None:
    manager = quiet(two_windows())
    run(manager, tokens(8), salt="tenant")
    blocks = [block for event in manager.flush_events() for block in event["data"]["blocks"]]

    assert {"tenant"} == {block["cache_salt"] for block in blocks}


def test_events_add_up_to_what_is_resident_while_sequences_take_turns() -> None:
    manager, announced = two_windows(14, 22, host=(3, 4)), Announced()
    running = [opened(manager, [*tokens(12), *tokens(8, first)], 3) for first in (50, 60)]
    for upto in range(14, 23, 2):
        for sequence in running:
            compute(sequence, upto)
            announced.apply(manager.flush_events())
            assert announced.held == manager.resident()
            manager.check()
    for sequence in running:
        sequence.close()
    run(manager, tokens(32, 100))
    announced.apply(manager.flush_events())
    assert announced.held == manager.resident()
