"""Names of blocks that are several hash units long, or whose names cover the tokens after them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.accuracy_helpers import DATA, adapter_for
from tests.properties import examples
from vswa_plugin.accuracy.pipeline import EventPipeline
from vswa_plugin.accuracy.trace import TraceEvent, open_trace
from vswa_plugin.blocks.hashing import block_hash, chain, prefix_names
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.engine.contract import BlocksRemoved, BlocksStored, EngineBlock, GroupCreated, Node
from vswa_plugin.publishing.healing import Claim, Healing
from vswa_plugin.publishing.history import runs
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.residency import Residency, Restart
from vswa_plugin.wire.events import Event, Layout, Stored

UNIT = 4
TOKENS = list(range(100, 164))
#: Sliding blocks of 8 tokens, full ones of 16, both named in units of 4.
MIXED = CacheLayout(
    (CacheGroup(0, 20, 8), CacheGroup(1, None, 16)), "vllm_hybrid", "m", resumption=Resumption(16, UNIT)
).check()


def block(start: int, end: int, lookahead: int = 0, name: str | None = None) -> EngineBlock:
    """The tokens from ``start`` to ``end``, called by its end."""
    return EngineBlock(name or str(end), tuple(TOKENS[start:end]), tuple(TOKENS[end : end + lookahead]))


@examples(300)
@given(
    st.lists(st.integers(0, 1 << 31), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(0, 7),
    st.data(),
)
def test_a_block_has_the_name_at_its_end_whatever_it_hangs_on(
    tokens: list[int], unit: int, lookahead: int, data: st.DataObject
) -> None:
    names = prefix_names(tokens, unit, lookahead)
    table = NodeTable()
    known = [0]
    for _ in range(data.draw(st.integers(0, 8)) if names else 0):
        start = data.draw(st.sampled_from(known))
        end = data.draw(st.integers(start, len(names)))
        piece = tokens[start * unit : end * unit]
        made = EngineBlock(end, tuple(piece), tuple(tokens[end * unit :][:lookahead]))
        node = table.add(start or None, made, None, None, unit, lookahead)
        if end in known or end == start:
            continue
        known.append(end)
        parent = names[end - 2] if end > 1 else None
        assert Node(names[end - 1], end - 1, parent) == node


def test_what_hangs_on_a_block_is_chained_to_its_prefix_without_the_tokens_after_it() -> None:
    names, table = prefix_names(TOKENS, UNIT, 2), NodeTable()
    table.add(None, block(0, 8, 2), None, None, UNIT, 2)

    assert Node(names[3], 3, names[2]) == table.add("8", block(8, 16, 2), None, None, UNIT, 2)


def test_salts_and_loras_are_hashed_unit_by_unit() -> None:
    seen: list[tuple[int, str | None, str | None]] = []

    def hasher(tokens: Any, salt: str | None, lora: str | None) -> int:
        seen.append((len(tokens), salt, lora))
        return block_hash(tokens)

    NodeTable(hasher).add(None, block(0, 12, 1), "s", "l", UNIT, 1)

    assert [(UNIT, "s", "l")] * 3 == seen


@pytest.mark.parametrize(
    ("made", "lookahead"),
    [
        (block(0, 10), 0),
        (EngineBlock("e", ()), 0),
        (block(0, 8), 1),
        (block(0, 8, 2), 1),
        (block(0, 8, 1), 0),
    ],
    ids=["no whole units", "no tokens", "too few after it", "too many", "none is stated"],
)
def test_what_cannot_be_named_at_units_is_not(made: EngineBlock, lookahead: int) -> None:
    table = NodeTable()

    assert table.add(None, made, None, None, UNIT, lookahead) is None
    assert 0 == len(table)


def test_what_is_forgotten_is_forgotten_whole() -> None:
    table = NodeTable(limit=8)
    for n in range(100):
        table.add(None, EngineBlock(n, (n,) * UNIT, (1,)), None, None, UNIT, 1)
        table.trim(lambda _: False)

    assert len(table._chained) == len(table) <= 8


# -- on the wire -----------------------------------------------------------------------------------


def test_a_run_has_the_index_of_its_first_block_in_its_group() -> None:
    names, residency = prefix_names(TOKENS, UNIT), Residency(MIXED)
    full = residency.apply(BlocksStored(1, None, (block(0, 16), block(16, 32))))
    sliding = residency.apply(BlocksStored(0, "16", (block(16, 24), block(24, 32), block(32, 40))))

    assert [Stored(1, 0, names[2], (names[3], names[7]))] == full
    assert [Stored(0, 2, names[4], (names[5], names[7], names[9]))] == sliding


def test_blocks_that_do_not_follow_one_another_are_no_run() -> None:
    """As where an adapter hands over only those that the group holds."""
    names, residency = prefix_names(TOKENS, UNIT), Residency(MIXED)
    events = residency.apply(BlocksStored(0, None, (block(0, 8), block(8, 16), block(16, 40), block(40, 48))))

    assert [(0, (names[1], names[3])), (4, (names[9], names[11]))] == [
        (event.position, event.sequence_hashes) for event in events if isinstance(event, Stored)
    ]


def test_an_entry_inside_a_block_has_the_index_of_that_block() -> None:
    names, residency = prefix_names(TOKENS, UNIT), Residency(MIXED)
    residency.apply(BlocksStored(1, None, (block(0, 16),)))

    assert [Stored(1, 1, names[4], (names[5],))] == residency.apply(BlocksStored(1, "16", (block(16, 24),)))


def test_a_snapshot_says_what_the_events_said() -> None:
    residency = Residency(MIXED)
    said: dict[int, set[tuple[int, int]]] = {0: set(), 1: set()}
    for event in (
        BlocksStored(1, None, (block(0, 16), block(16, 32), block(32, 48))),
        BlocksStored(0, "16", (block(16, 24), block(24, 32))),
        BlocksStored(0, "48", (block(48, 64),)),
        BlocksStored(1, "48", (block(48, 56),)),
    ):
        for stored in residency.apply(event):
            assert isinstance(stored, Stored)
            said[stored.group_id] |= set(enumerate(stored.sequence_hashes, stored.position))
    for group_id, frozen in residency.frozen().items():
        found = {
            place
            for stored in runs(group_id, frozen, residency)
            for place in enumerate(stored.sequence_hashes, stored.position)
        }
        assert said[group_id] == found


# -- layouts ---------------------------------------------------------------------------------------


def test_the_engine_may_state_another_kind_of_a_group() -> None:
    plain = CacheLayout((CacheGroup(0, 20, 8), CacheGroup(1, None, 8)), "vllm", "m")
    residency = Residency(plain)
    with pytest.raises(
        Restart, match=r"cache group 0: expected window 20, the engine created it .* recurrent"
    ):
        residency.apply(GroupCreated(0, None, kind="recurrent"))

    assert (CacheGroup(0, None, 8, "recurrent"), "vllm_hybrid") == (
        residency.layout.groups[0],
        residency.layout.rule,
    )
    assert [] == residency.apply(GroupCreated(0, None, kind="recurrent"))
    with pytest.raises(Restart, match="expected window recurrent, the engine created it with window global"):
        residency.apply(GroupCreated(0, None, kind="full"))


def test_a_correction_of_a_window_leaves_the_groups_other_facts_as_they_are() -> None:
    group = CacheGroup(0, 20, 8, drops_last=True)
    residency = Residency(msgspec.structs.replace(MIXED, groups=(group, MIXED.groups[1])))
    with pytest.raises(Restart):
        residency.apply(GroupCreated(0, 24))

    assert msgspec.structs.replace(group, window_size=24) == residency.layout.groups[0]
    assert MIXED.resumption == residency.layout.resumption


def test_a_finished_request_proves_nothing_in_a_layout_that_is_not_plain() -> None:
    residency = Residency(MIXED)
    residency.apply(BlocksStored(1, None, (block(0, 16),)))
    residency.clear()
    healing = Healing(residency)
    healing.restarted()

    assert not healing.active
    assert [] == healing.changes(Claim(tuple(TOKENS), 32, healing.events))
    assert healing.prepare()


# -- plain layouts are as they were ------------------------------------------------------------------


@examples(300)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 5)), max_size=40))
def test_in_plain_layouts_a_node_is_what_it_was_before_there_were_units(
    steps: list[tuple[int, int, int]],
) -> None:
    """Against the table as it was: a block is one unit, and its parent is the one above."""
    table, former = NodeTable(), dict[int, Node]()
    for name, parent, length in steps:
        tokens = tuple(range(name, name + length))
        above = former.get(parent)
        if name not in former and (above is not None or parent == 0):
            prefix = None if above is None else above.sequence_hash
            position = 0 if above is None else above.position + 1
            former[name] = Node(chain(prefix, block_hash(tokens)), position, prefix)
        node = table.add(parent or None, EngineBlock(name, tokens), None, None)

        assert former.get(name) == node


#: Trace of tests/data -> sha256, its beginning, of the wire events before there were units; without layouts.
WIRE = {
    "trtllm-v1-two-new-sync-c1.jsonl.xz": "6b186640827ad633",
    "trtllm-v2-host-tier.jsonl.gz": "752e40b96d335cab",
    "vllm-0.33-gptoss.jsonl.gz": "564bc200862173c0",
}


@pytest.mark.parametrize("name", WIRE)
def test_the_wire_of_plain_traces_is_byte_for_byte_as_it_was(name: str) -> None:
    digest = hashlib.sha256()
    for event in wire_events(DATA / name):
        digest.update(b"" if isinstance(event, Layout) else msgspec.msgpack.encode(event))

    assert WIRE[name] == digest.hexdigest()[:16]


def wire_events(path: Path) -> list[Event]:
    trace = open_trace(path)
    layout = trace.layout()
    pipeline = EventPipeline(layout, lambda: adapter_for(trace.header.format, layout), [])
    events: list[Event] = []
    for _, record in trace.records():
        events += pipeline.feed(record.event) if isinstance(record, TraceEvent) else pipeline.settle()
    return events


def test_what_is_removed_is_named_as_it_was_stored() -> None:
    names, residency = prefix_names(TOKENS, UNIT), Residency(MIXED)
    residency.apply(BlocksStored(1, None, (block(0, 16),)))
    (removed,) = residency.apply(BlocksRemoved(1, ("16", "32")))

    assert (names[3],) == getattr(removed, "sequence_hashes", None)
