"""What a rank holds, against a naive model: the wire's net changes always add up to what the engine said."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vswa_plugin.blocks.hashing import block_hashes, sequence_hashes
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import (
    BlocksMoved,
    BlocksRemoved,
    BlocksStored,
    EngineBlock,
    EngineEvent,
    EventsLost,
    GroupCreated,
)
from vswa_plugin.errors import ConfigError
from vswa_plugin.publishing.nodes import NodeTable, plain_hasher
from vswa_plugin.publishing.residency import Residency, Restart
from vswa_plugin.wire.events import Event, Moved, Removed, Stored

BLOCK = 2
LAYOUT = CacheLayout((CacheGroup(0, 4, BLOCK), CacheGroup(1, None, BLOCK)), "trtllm_v2", "m")


def block(path: tuple[int, ...]) -> EngineBlock:
    """The last block of ``path``; engine hashes are names that say which path it is."""
    return EngineBlock("/".join(map(str, path)), (path[-1], path[-1] + 1))


def stored(group: int, path: tuple[int, ...], start: int = 0, tier: str = "device") -> BlocksStored:
    blocks = tuple(block(path[: i + 1]) for i in range(start, len(path)))
    parent = block(path[:start]).hash if start else None
    return BlocksStored(group, parent, blocks, tier)


def named(path: tuple[int, ...]) -> int:
    tokens = [token for step in path for token in (step, step + 1)]
    return sequence_hashes(block_hashes(tokens, BLOCK))[-1]


def test_a_stored_chain_gets_positions_parents_and_dynamos_sequence_hashes() -> None:
    residency = Residency(LAYOUT)

    assert residency.apply(stored(1, (10, 20, 30))) == [
        Stored(1, 0, None, (named((10,)), named((10, 20)), named((10, 20, 30))))
    ]
    assert residency.apply(stored(0, (10, 20, 30, 40), start=3)) == [
        Stored(0, 3, named((10, 20, 30)), (named((10, 20, 30, 40)),))
    ]


def test_blocks_already_held_split_the_run_and_are_not_said_again() -> None:
    residency = Residency(LAYOUT)
    residency.apply(stored(0, (1,)))
    residency.apply(stored(0, (1, 2, 3)))
    residency.apply(BlocksRemoved(0, (block((1,)).hash, block((1, 2, 3)).hash)))

    assert residency.apply(stored(0, (1, 2, 3))) == [
        Stored(0, 0, None, (named((1,)),)),
        Stored(0, 2, named((1, 2)), (named((1, 2, 3)),)),
    ]
    assert residency.apply(stored(0, (1, 2, 3))) == []


def test_a_block_that_was_never_announced_is_removed_in_silence() -> None:
    residency = Residency(LAYOUT)
    residency.apply(stored(1, (1,)))

    assert residency.apply(BlocksRemoved(0, (block((1,)).hash, "never seen"))) == []
    assert residency.resident() == {0: set(), 1: {named((1,))}}


def test_a_block_under_an_unknown_parent_is_counted_and_not_published() -> None:
    residency = Residency(LAYOUT)

    assert residency.apply(stored(1, (7, 8, 9), start=1)) == []
    assert residency.unattributed == 2
    assert residency.resident() == {0: set(), 1: set()}


def test_a_sliding_block_is_named_through_the_nodes_of_the_global_group() -> None:
    residency = Residency(LAYOUT)
    residency.apply(stored(1, (1, 2, 3)))

    assert residency.apply(stored(0, (1, 2, 3), start=2)) == [
        Stored(0, 2, named((1, 2)), (named((1, 2, 3)),))
    ]


def test_a_change_of_tier_keeps_the_block_resident() -> None:
    residency = Residency(LAYOUT)
    residency.apply(stored(1, (1, 2)))
    move = BlocksMoved(1, (block((1,)).hash, "unknown"), "host")

    assert residency.apply(move) == [Moved(1, (named((1,)),), "host")]
    assert residency.apply(move) == []
    assert residency.resident()[1] == {named((1,)), named((1, 2))}


def test_a_block_that_changes_its_tier_amid_a_run_parts_the_run() -> None:
    residency = Residency(LAYOUT)
    residency.apply(stored(1, (1, 2)))
    residency.apply(BlocksRemoved(1, (block((1,)).hash,)))

    assert residency.apply(stored(1, (1, 2, 3), tier="host")) == [
        Stored(1, 0, None, (named((1,)),), "host"),
        Moved(1, (named((1, 2)),), "host"),
        Stored(1, 2, named((1, 2)), (named((1, 2, 3)),), "host"),
    ]


def test_lost_engine_events_clear_everything_and_ask_for_a_new_epoch() -> None:
    residency = Residency(LAYOUT)
    residency.apply(stored(1, (1, 2)))

    with pytest.raises(Restart, match=r"expected engine event id 5, got 9.*event_buffer_max_size"):
        residency.apply(EventsLost(5, 9))
    assert residency.resident() == {0: set(), 1: set()}


def test_after_a_clear_the_node_table_still_names_blocks_mid_chain() -> None:
    residency = Residency(LAYOUT)
    residency.apply(stored(1, (1, 2, 3)))
    residency.clear()

    assert residency.apply(stored(1, (1, 2, 3), start=2)) == [
        Stored(1, 2, named((1, 2)), (named((1, 2, 3)),))
    ]


def test_the_engines_own_word_on_a_window_corrects_the_layout() -> None:
    residency = Residency(LAYOUT)

    assert residency.apply(GroupCreated(0, 4)) == []
    with pytest.raises(
        Restart, match="cache group 0: expected window 4, the engine created it with window 8"
    ):
        residency.apply(GroupCreated(0, 8))
    assert [group.window_size for group in residency.layout.groups] == [8, None]
    with pytest.raises(Restart, match="cache group 2: expected no such group"):
        residency.apply(GroupCreated(2, 16))
    assert residency.apply(stored(2, (1,))) == [Stored(2, 0, None, (named((1,)),))]


def test_an_unknown_group_is_refused_with_the_declared_ones() -> None:
    with pytest.raises(ConfigError, match="unknown cache group 5; the engine declared 0"):
        Residency(LAYOUT).apply(stored(5, (1,)))


def test_a_full_node_table_forgets_the_oldest_that_are_not_resident() -> None:
    residency = Residency(LAYOUT, NodeTable(plain_hasher, limit=8))
    residency.apply(stored(1, (1,)))
    for step in range(100, 130):
        residency.apply(stored(0, (step,)))
        residency.apply(BlocksRemoved(0, (block((step,)).hash,)))

    assert len(residency.nodes) <= 9
    assert residency.apply(BlocksRemoved(1, (block((1,)).hash,))) == [Removed(1, (named((1,)),))]


def test_a_node_table_that_is_full_of_resident_blocks_is_not_walked_at_each_block() -> None:
    limit, added = 80, 2_000
    table, looked_at = NodeTable(plain_hasher, limit=limit), 0

    def resident(_: object) -> bool:
        nonlocal looked_at
        looked_at += 1
        return True

    for step in range(added):
        table.add(None, block((step,)), None, None)
        table.trim(resident)

    assert len(table) == added
    # Each walk, over all there is, comes after an eighth of the limit was added: added**2 / (2 * limit / 8).
    assert looked_at <= added**2 * 4 / limit + added


def test_a_node_table_shrinks_as_soon_as_it_can_again() -> None:
    table = NodeTable(plain_hasher, limit=80)
    for step in range(100):
        table.add(None, block((step,)), None, None)
        table.trim(lambda _: True)
    for step in range(100, 120):
        table.add(None, block((step,)), None, None)
        table.trim(lambda _: False)

    assert len(table) <= 80


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


class ResidencyMachine(RuleBasedStateMachine):
    """Any sequence of engine events, also senseless ones, against plain sets; the reader is a set too."""

    @initialize()
    def begin(self) -> None:
        self.residency = Residency(LAYOUT, NodeTable(plain_hasher, limit=20))
        self.model: dict[int, dict[tuple[int, ...], str]] = {0: {}, 1: {}}
        self.reader: dict[int, dict[int, str]] = {0: {}, 1: {}}

    def feed(self, event: EngineEvent) -> None:
        for change in self.residency.apply(event):
            self.read(change)

    def read(self, change: Event) -> None:
        held = self.reader[change.group_id]  # type: ignore[union-attr,index]
        match change:
            case Stored():
                for value in change.sequence_hashes:
                    assert value not in held, "stored twice on the wire"
                    held[value] = change.tier
            case Removed():
                for value in change.sequence_hashes:
                    del held[value]
            case Moved():
                for value in change.sequence_hashes:
                    assert held[value] != change.tier, "moved to where it is"
                    held[value] = change.tier

    @rule(group=st.integers(0, 1), path=PATHS, tier=st.sampled_from(["device", "host"]))
    def store(self, group: int, path: tuple[int, ...], tier: str) -> None:
        self.feed(stored(group, path, tier=tier))
        for depth in range(1, len(path) + 1):
            self.model[group][path[:depth]] = tier

    @rule(group=st.integers(0, 1), paths=st.lists(PATHS, max_size=3))
    def remove(self, group: int, paths: list[tuple[int, ...]]) -> None:
        self.feed(BlocksRemoved(group, tuple(block(path).hash for path in paths)))
        for path in paths:
            self.model[group].pop(path, None)

    @rule(group=st.integers(0, 1), path=PATHS, tier=st.sampled_from(["device", "host", "disk"]))
    def move(self, group: int, path: tuple[int, ...], tier: str) -> None:
        self.feed(BlocksMoved(group, (block(path).hash,), tier))
        if path in self.model[group]:
            self.model[group][path] = tier

    @rule()
    def overflow(self) -> None:
        with pytest.raises(Restart):
            self.residency.apply(EventsLost(0, 1))
        self.model = {0: {}, 1: {}}
        self.reader = {0: {}, 1: {}}

    @invariant()
    def reader_holds_what_the_engine_said(self) -> None:
        if hasattr(self, "reader"):
            said = {g: {named(path): tier for path, tier in held.items()} for g, held in self.model.items()}
            assert said == self.reader
            assert {g: set(held) for g, held in said.items()} == self.residency.resident()


TestResidency = ResidencyMachine.TestCase
