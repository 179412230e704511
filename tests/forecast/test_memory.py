"""What one rank is known to hold: order of use, copies, capacity, and ends that nobody reports."""

from __future__ import annotations

import pytest

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.memory import Memory, Pool
from vswa_plugin.forecast import RankMemory, Shape, Victims
from vswa_plugin.forecast.free import FreeBlocks
from vswa_plugin.wire.events import Cleared, Removed, Stored

SIZE = 8
LAYOUT = CacheLayout((CacheGroup(0, None, SIZE),), "vllm", "m")


def rank(blocks: int | None = 10, *, ends_reported: bool = True) -> RankMemory:
    return RankMemory(Shape(LAYOUT, Memory((Pool((0,), blocks),), "vllm")), ends_reported=ends_reported)


def stored(*names: int, parent: int | None = None, position: int = 0) -> Stored:
    return Stored(0, position, parent, names)


def serve(memory: RankMemory, key: int, *names: int) -> None:
    """A request that has run and ended; its prompt is one token longer than its blocks."""
    memory.sent(key, names, len(names) * SIZE + 1)
    memory.apply(stored(*names))
    memory.ended(key)


def order(free: FreeBlocks) -> list[tuple[int, bool]]:
    return [(key, lost) for key, _, lost in free]


def test_the_last_blocks_of_the_request_that_ended_first_are_evicted_first() -> None:
    memory = rank()
    serve(memory, 1, 11, 12)
    serve(memory, 2, 21, 22)

    assert [Victims(0, (12, 11, 22))] == list(memory.victims([3 + memory.empty(0)]))


def test_what_is_used_again_is_evicted_last() -> None:
    memory = rank()
    serve(memory, 1, 11, 12)
    serve(memory, 2, 21)
    memory.sent(3, [11, 99], 2 * SIZE + 1)
    memory.admitted(3, SIZE)
    memory.ended(3)

    assert [(12,), (21,), (11,)] == [(key,) for key, _ in order(memory.free[0])]


def test_blocks_that_a_running_request_holds_are_no_victims() -> None:
    memory = rank()
    memory.sent(1, [11, 12], 2 * SIZE + 1)
    memory.apply(stored(11, 12))

    assert [] == list(memory.victims([10]))
    assert memory.held(0) == 3


def test_an_empty_block_is_taken_before_any_is_evicted() -> None:
    memory = rank(10)
    serve(memory, 1, 11, 12)

    assert 8 == memory.empty(0)
    assert [] == list(memory.victims([8]))
    assert [Victims(0, (12,))] == list(memory.victims([9]))


def test_the_size_of_a_pool_is_learnt_once_it_evicts() -> None:
    memory = rank(None)
    serve(memory, 1, 11, 12, 13)

    assert 0 == memory.size(0)
    memory.apply(Removed(0, (13,)))
    assert 4 == memory.size(0)


def test_removed_and_cleared_blocks_are_held_no_more() -> None:
    memory = rank()
    serve(memory, 1, 11, 12)
    memory.apply(Removed(0, (12,)))

    assert (True, False) == (memory.holds(0, 11), memory.holds(0, 12))
    memory.apply(Cleared())
    assert not memory.holds(0, 11) and 10 == memory.empty(0)


def test_a_batch_that_an_engine_evicts_from_was_the_first() -> None:
    free = FreeBlocks()
    for key in (1, 2, 3, 4):
        free.add(key, 0)
        if key == 2:
            free.begin()
    free.evicted(3)

    assert [(4, True), (1, True), (2, True)] == order(free)


def test_an_older_copy_takes_its_turn_without_the_block_being_lost() -> None:
    free = FreeBlocks()
    free.add(1, 0)
    free.add(2, 0)
    free.begin()
    free.add(1, 0)

    assert [(1, False), (2, True), (1, True)] == order(free)
    assert 1 == free.forget_copies(5) and 2 == len(free)


def test_a_prompt_that_goes_on_from_an_answer_shows_that_the_request_has_ended() -> None:
    memory = rank(ends_reported=False)
    memory.sent(1, [11], SIZE)
    memory.apply(stored(11))
    memory.apply(stored(12, parent=11, position=1))
    memory.sent(2, [11, 12, 13], 3 * SIZE)

    assert [] == list(memory.running)


def test_a_request_that_stores_nothing_while_another_goes_on_for_long_has_ended() -> None:
    memory = rank(40, ends_reported=False)
    for key, name in ((1, 11), (2, 21)):
        memory.sent(key, [name], SIZE)
        memory.apply(stored(name))
    parent = 21
    for position in range(1, 5):
        memory.apply(stored(100 + position, parent=parent, position=position))
        parent = 100 + position

    assert [2] == list(memory.running)


def test_an_answer_that_goes_on_shows_that_its_request_has_not_ended() -> None:
    memory = rank(40, ends_reported=False)
    for key, name in ((1, 11), (2, 21)):
        memory.sent(key, [name], SIZE)
        memory.apply(stored(name))
    for position in range(1, 5):
        memory.apply(stored(100 + position, parent=[21, 101, 102, 103][position - 1], position=position))
    memory.apply(stored(12, parent=11, position=1))

    assert {1, 2} == set(memory.running)


def test_what_is_queued_is_stored_and_evicts_before_the_turn_of_the_next() -> None:
    memory = rank(4)
    serve(memory, 1, 11, 12)
    alone = memory.forecast([11, 12], 2 * SIZE + 1)
    memory.sent(2, [21, 22], 2 * SIZE + 1)
    behind = memory.forecast([11, 12], 2 * SIZE + 1)
    twin = memory.forecast([21, 22], 2 * SIZE + 1)

    assert (2 * SIZE, 2 * SIZE) == (alone.cached_tokens, alone.now)
    assert (SIZE, 2 * SIZE, 0, SIZE) == behind
    assert (2 * SIZE, 0, 2 * SIZE, 0) == twin


@pytest.mark.parametrize("step", [None, 0, -5])
def test_a_step_that_cannot_be_is_not_taken_for_one(step: int | None) -> None:
    memory = RankMemory(Shape(LAYOUT, Memory((Pool((0, 7), 10), Pool((9,), -1)), "a later one", step)))
    memory.sent(1, [11, 12], 2 * SIZE + 1)

    assert 2 * SIZE == memory.forecast([11, 12], 2 * SIZE + 1).cached_tokens


def test_of_two_copies_that_run_one_comes_free_with_each_end() -> None:
    memory = rank()
    memory.sent(1, [11], SIZE + 1)
    memory.apply(stored(11))
    memory.sent(2, [11], SIZE + 1)
    memory.admitted(2, 0)
    memory.computed(2)
    memory.ended(1)

    assert (1, True) == (len(memory.free[0]), memory.holds(0, 11))
    memory.ended(2)
    assert [(11, False), (11, True)] == order(memory.free[0])
