"""The host tier, and what a transfer of a finished prompt brings."""

from __future__ import annotations

from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.cache.api import DEVICE, HOST
from vswa_plugins.gemma3_cpu.cache.v2 import CacheManager, CacheSequence

from tests.gemma3_v2_helpers import (
    BS,
    GLOBAL,
    SLIDING,
    Announced,
    Memory,
    compute,
    hashes,
    opened,
    run,
    short,
    tokens,
    two_windows,
)
from vswa_plugin.errors import InvariantError


class Engine:
    """A manager, and a memory that is written as a model would."""

    def __init__(self, sliding: int, global_: int, host: tuple[int, int] = (0, 0), **options: Any) -> None:
        self.chunk = options.setdefault("max_chunk_tokens", 16)
        self.memory = Memory(two_windows(layers=options.get("layers", (5, 1)))._store.groups, BS)
        self.manager: CacheManager = two_windows(
            sliding, global_, host=host, mover=self.memory.move, **options
        )
        self.announced = Announced()

    def run(self, prompt: list[int]) -> int:
        sequence = opened(self.manager, prompt)
        self.memory.check_sequence(sequence, prompt)
        self.compute(sequence, prompt)
        sequence.close()
        return sequence.cached_tokens

    def compute(self, sequence: CacheSequence, prompt: list[int]) -> None:
        while sequence.computed_tokens < len(prompt):
            upto = min(len(prompt), sequence.computed_tokens + self.chunk)
            sequence.reserve(upto)
            self.memory.write(sequence, prompt, range(sequence.computed_tokens, upto))
            sequence.advance(upto - sequence.computed_tokens)
            self.memory.check_sequence(sequence, prompt)
            self.check()

    def check(self) -> list[tuple[object, ...]]:
        """What was told since the last call."""
        self.manager.check()
        events = self.manager.flush_events()
        self.announced.apply(events)
        assert self.announced.held == self.manager.resident()
        self.memory.check_tree(self.manager)
        return [short(event) for event in events]


def test_what_is_evicted_moves_to_the_host_and_comes_back_when_it_is_hit() -> None:
    engine = Engine(50, 8, host=(0, 8))
    engine.run(tokens(17))
    chain = hashes(tokens(17))
    held = opened(engine.manager, tokens(16, 100))
    engine.check()
    held.reserve(16)

    # The room for 4 pages: 3 were free. Nothing of the sliding group, whose pool has room.
    assert [("updated", GLOBAL, chain[4], DEVICE, HOST)] == engine.check()
    held.close()
    again = opened(engine.manager, [*tokens(17), 99])
    assert ("updated", GLOBAL, chain[4], HOST, DEVICE) in engine.check()
    assert 17 == again.cached_tokens
    engine.memory.check_sequence(again, tokens(17))
    assert {"blocks_host_8": 0, "blocks_host_global": 0}.items() <= engine.manager.stats().items()


def test_blocks_on_the_host_count_for_matching_until_the_host_is_full_too() -> None:
    engine = Engine(8, 8, host=(8, 8))
    for first in (0, 100):
        engine.run(tokens(24, first))
    levels = engine.manager.resident()
    assert {DEVICE, HOST} == set(levels[GLOBAL].values()) == set(levels[SLIDING].values())

    assert 23 == engine.run(tokens(24))
    for first in (200, 300):
        engine.run(tokens(24, first))
    assert 0 == engine.run(tokens(24)), "lost from the last level"


def test_a_loss_on_the_host_takes_blocks_on_the_device_along() -> None:
    engine = Engine(50, 6, host=(0, 2))
    engine.run(tokens(20))
    for first in (100, 200, 300):
        engine.run(tokens(8, first))

    assert set(engine.manager.resident()[GLOBAL]).isdisjoint(hashes(tokens(20))[2:])


def test_a_known_block_on_the_host_is_used_by_who_computed_it_again() -> None:
    engine = Engine(7, 50, host=(0, 0))
    tiered = Engine(7, 12, host=(3, 50))
    for each in (engine, tiered):
        for prompt in (tokens(24), tokens(20, 100), tokens(20, 200), tokens(24)):
            each.run(prompt)
        chain = hashes(tokens(24))
        assert {DEVICE} == {each.manager.resident()[GLOBAL][block] for block in chain}


def test_pages_that_a_request_needs_may_move_to_the_host_and_back_while_it_opens() -> None:
    engine = Engine(50, 7, host=(0, 4))
    engine.run(tokens(22))
    engine.run([100])
    moves = engine.memory.moves
    moves.clear()

    # The copy of block 5 takes the last room, which block 5 itself, the first in line, makes for it.
    assert 21 == engine.run([*tokens(21), 99])
    levels = [(source.level, target.level) for group, source, target in moves if group == GLOBAL]
    away, back, copied = (DEVICE, HOST), (HOST, DEVICE), (DEVICE, DEVICE)
    # The second to leave makes room for block 5.
    assert [away, away, back, copied] == levels


def test_pages_that_a_request_needs_stay_where_the_host_has_no_room_for_them() -> None:
    engine = Engine(50, 7, host=(0, 1))
    for prompt in (tokens(22), [100], [200]):
        engine.run(prompt)
    assert HOST == engine.manager.resident()[GLOBAL][hashes(tokens(22))[5]]

    assert 21 == engine.run([*tokens(21), 99])
    lost = set(hashes([100])) | set(hashes([200]))
    assert lost.isdisjoint(engine.manager.resident()[GLOBAL]), "others made room"


def test_pages_that_nobody_needs_are_lost_before_those_that_a_request_needs() -> None:
    # One pool for both groups, in line: block 5's pages, which the last request needs, before all others.
    engine = Engine(7, 8, host=(0, 1), layers=(1, 1))
    for prompt in (tokens(22), [100], [200], [300]):
        engine.run(prompt)
    (pool,) = engine.manager._store.device
    first = next(iter(pool.queue))
    assert (0, hashes(tokens(22))[5]) == (len(pool.free), first.node.hash if first.node else None)

    # Room for two copies: one of these pages moves to the only place of the host, the other victim has none.
    assert 21 == engine.run([*tokens(21), 99])


def test_a_known_block_comes_from_the_host_into_the_room_of_the_copy_where_there_is_no_other() -> None:
    engine = Engine(7, 7, host=(0, 14), max_chunk_tokens=32)
    for first in (0, 100):
        engine.run(tokens(25, first))
    assert {HOST} == {engine.manager.resident()[GLOBAL][h] for h in hashes(tokens(24))}

    # All 7 pages are its own while it computes, and it can evict nothing.
    assert 0 == engine.run(tokens(25))
    assert {DEVICE} == {engine.manager.resident()[GLOBAL][h] for h in hashes(tokens(24))}


def test_a_transfer_lacks_all_global_blocks_and_the_last_window_of_sliding_ones() -> None:
    engine = Engine(50, 50)
    prompt = tokens(30)
    sequence = opened(engine.manager, prompt, 4)

    lacking = sequence.reserve_transfer()
    assert (range(5, 8), range(0, 8)) == lacking
    assert [-1] * 5 == sequence.tables[SLIDING][:5]
    engine.check()
    for g, blocks in enumerate(lacking):
        positions = range(blocks.start * BS, min(30, blocks.stop * BS))
        engine.memory.write_group(g, sequence, prompt, positions)
    sequence.receive()
    chain = hashes(prompt)
    assert [("stored", GLOBAL, chain), ("stored", SLIDING, chain[5:])] == engine.check()
    engine.memory.check_sequence(sequence, prompt)
    compute(sequence, 33)
    sequence.close()
    assert 29 == run(engine.manager, prompt)
    assert 0 == run(engine.manager, tokens(18)), "no window is complete there"


def test_a_transfer_lacks_less_where_the_prompt_is_known_in_part() -> None:
    engine = Engine(50, 50)
    engine.run(tokens(22))
    sequence = opened(engine.manager, [*tokens(22), *tokens(8, 70)])

    assert 22 == sequence.cached_tokens
    assert (range(5, 8), range(5, 8)) == sequence.reserve_transfer()
    assert [-1] * 5 == sequence.tables[SLIDING][:5], "what is stale after the prompt is let go"


def test_pages_of_a_transfer_are_nobody_elses_until_it_is_received() -> None:
    manager = two_windows(14, 14)
    sequence = opened(manager, tokens(24))
    sequence.reserve_transfer()
    promised = [[page for page in table if page >= 0] for table in sequence.tables]
    for first in (100, 200, 300):
        run(manager, tokens(20, first))

    assert promised == [[page for page in table if page >= 0] for table in sequence.tables]
    sequence.close()
    manager.check()
    assert 0 == sum(count for name, count in manager.stats().items() if name.startswith("blocks_used"))


def test_a_transfer_is_reserved_first_and_received_once() -> None:
    manager = two_windows()
    sequence = opened(manager, tokens(24))
    with pytest.raises(InvariantError, match="got none"):
        sequence.receive()
    sequence.reserve(4)
    with pytest.raises(InvariantError, match="right after opening"):
        sequence.reserve_transfer()
    sequence.close()
    sequence.close()
    with pytest.raises(InvariantError, match="closed"):
        sequence.reserve(8)
