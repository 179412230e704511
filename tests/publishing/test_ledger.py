"""The ledger: what it publishes adds up to what the engine holds, whatever comes in between."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import (
    BlocksMoved,
    BlocksRemoved,
    BlocksStored,
    EngineBlock,
    EngineEvent,
    EventsLost,
    GroupCreated,
    Node,
)
from vswa_plugin.errors import ConfigError
from vswa_plugin.publishing.healing import Claim
from vswa_plugin.publishing.ledger import Ledger, LedgerOptions
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire.events import Event, Layout, Removed, Stored, decode

LAYOUT = CacheLayout((CacheGroup(0, 4, 2), CacheGroup(1, None, 2)), "trtllm_v2", "m")
BLOCK = EngineBlock("a", (1, 2))


def ledger(**options: object) -> Ledger:
    ticks = count(1)
    return Ledger(
        "rank",
        Residency(LAYOUT),
        LedgerOptions(**options),  # type: ignore[arg-type]
        clock_ns=lambda: next(ticks),
        clock=lambda: 0.0,
    )


def begun(**options: object) -> Ledger:
    made = ledger(**options)
    made.begin()
    made.flush()
    return made


def events_of(made: Ledger) -> list[Event]:
    return [event for batch, _ in made.flush() for event in batch.events]  # type: ignore[misc]


def test_event_0_is_the_layout_with_the_heartbeat() -> None:
    made = ledger(heartbeat_s=0.5)
    made.begin()
    ((batch, payload),) = made.flush()

    assert 0 == batch.first_event_id
    assert [Layout(LAYOUT.groups, "trtllm_v2", LAYOUT.hash_scheme, "m", 0.5)] == list(batch.events)
    assert batch == decode(payload)


def test_what_comes_before_the_first_epoch_is_in_its_layout_and_behind_it() -> None:
    made = ledger()
    made.add(GroupCreated(0, 6))
    made.add(BlocksStored(0, None, (BLOCK,)))
    assert [] == made.flush(), "nothing is published before the epoch has begun"
    made.begin()
    layout, stored = events_of(made)

    assert isinstance(layout, Layout)
    assert [6, None] == [group.window_size for group in layout.groups]
    assert isinstance(stored, Stored)
    assert 0 == made.stats.restarts


def test_without_a_change_nothing_is_published() -> None:
    made = begun()
    made.add(BlocksRemoved(0, ("never announced",)))

    assert [] == made.flush()
    assert 1 == made.next_event_id


def test_an_event_of_an_unknown_group_is_refused_and_changes_nothing() -> None:
    made = begun()
    with pytest.raises(ConfigError, match="unknown cache group 9"):
        made.add(BlocksStored(9, None, (BLOCK,)))

    assert [] == made.flush()


def test_what_was_gathered_before_a_loss_is_void() -> None:
    made = begun()
    before = made.epoch
    made.add(BlocksStored(0, None, (BLOCK,)))
    made.lose("the test says so")
    made.add(BlocksStored(1, None, (BLOCK,)))
    layout, stored = events_of(made)

    assert made.epoch > before
    assert isinstance(layout, Layout)
    assert isinstance(stored, Stored)
    assert 1 == stored.group_id
    assert {0: set(), 1: {stored.sequence_hashes[0]}} == made.residency.resident()


def test_losses_that_come_together_begin_one_epoch() -> None:
    made = begun()
    for _ in range(5):
        made.lose("again")
    epoch = made.epoch
    made.flush()

    assert (1, epoch) == (made.stats.restarts, made.epoch)


def test_observers_see_the_names_of_blocks_before_their_batch() -> None:
    seen: list[tuple[int, tuple[Node, ...]]] = []
    ticks = count(1)
    made = Ledger(
        "rank",
        Residency(LAYOUT),
        LedgerOptions(),
        clock_ns=lambda: next(ticks),
        clock=lambda: 0.0,
        observe_stored=lambda stored, nodes: seen.append((stored.group_id, tuple(nodes))),
    )
    made.begin()
    made.add(BlocksStored(1, None, (BLOCK, EngineBlock("b", (3, 4)))))
    made.add(BlocksStored(1, "nobody", (EngineBlock("c", (5, 6)),)))

    assert [(1, [0, 1]), (1, [])] == [(group, [node.position for node in nodes]) for group, nodes in seen]


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)
GROUPS = st.integers(0, 1)


def named(path: tuple[int, ...]) -> str:
    return "/".join(map(str, path))


def stored(group: int, path: tuple[int, ...]) -> EngineEvent:
    blocks = tuple(EngineBlock(named(path[: n + 1]), (path[n], 7)) for n in range(len(path)))
    return BlocksStored(group, None, blocks)


STEPS = st.one_of(
    st.builds(stored, GROUPS, PATHS),
    st.builds(lambda group, path: BlocksRemoved(group, (named(path),)), GROUPS, PATHS),
    st.builds(
        lambda group, path, tier: BlocksMoved(group, (named(path),), tier),
        GROUPS,
        PATHS,
        st.sampled_from(["device", "host"]),
    ),
    st.just(EventsLost(3, 9)),
    st.sampled_from(["flush", "lose", "claim"]),
)


@given(st.lists(STEPS, max_size=30), st.sampled_from([150, 1 << 18]))
def test_what_is_published_adds_up_to_what_the_engine_is_known_to_hold(
    steps: list[EngineEvent | str], batch_bytes: int
) -> None:
    made = ledger(batch_bytes=batch_bytes)
    made.begin()
    payloads: list[bytes] = []
    for step in steps:
        match step:
            case "flush":
                payloads += [payload for _, payload in made.flush()]
            case "lose":
                made.lose("the test says so")
            case "claim":
                made.healing.prepare()
                made.prove(Claim((1, 7, 1, 7, 5), 4, made.healing.events))
            case str():
                raise AssertionError(step)
            case _:
                made.add(step)
    payloads += [payload for _, payload in made.flush()]

    held: dict[int, Counter[int]] = {}
    epoch, next_event_id = 0, 0
    for batch in map(decode, payloads):
        assert batch.epoch >= epoch
        if batch.epoch > epoch:
            epoch, next_event_id = batch.epoch, 0
        assert next_event_id == batch.first_event_id, "ids are without a hole"
        next_event_id = batch.next_event_id
        for event in batch.events:
            match event:
                case Layout():
                    held = {group.group_id: Counter() for group in event.groups}
                case Stored():
                    held[event.group_id].update(event.sequence_hashes)
                case Removed():
                    held[event.group_id].subtract(event.sequence_hashes)
    assert all(copies in (0, 1) for blocks in held.values() for copies in blocks.values()), "sets"
    assert made.residency.resident() == {
        group: {name for name, copies in blocks.items() if copies} for group, blocks in held.items()
    }


NODES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=40)


@given(NODES, NODES, st.integers(1, 7))
def test_the_table_turned_round_in_parts_is_the_table_turned_round(
    before: list[tuple[int, int]], after: list[tuple[int, int]], at_once: int
) -> None:
    """Also while blocks come and go, and though two names of the engine mean one block."""
    table = NodeTable(limit=4)

    def add(name: int, token: int) -> None:
        table.add(None, EngineBlock(name, (token,)), None, None)
        table.trim(lambda engine_hash: False)

    for block in before:
        add(*block)
    table.begin_reverse()
    for block in after:
        table.go_on_reverse(at_once)
        add(*block)
    while not table.go_on_reverse(at_once):
        pass

    nodes = table._nodes
    for name, node in nodes.items():
        found = table.engine_hash_of(node.sequence_hash)
        assert found is None or nodes[found].sequence_hash == node.sequence_hash
        latest = [each for each, other in nodes.items() if other.sequence_hash == node.sequence_hash][-1]
        if name == latest:
            assert found == latest
    table.drop_reverse()
    assert all(table.engine_hash_of(node.sequence_hash) is None for node in nodes.values())
