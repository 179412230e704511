"""Old readers read new streams, and new readers old ones: fields are only appended, with defaults."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import wire_1_0 as old
from vswa_plugin import registry
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.memory import EVICTION_ORDERS, Memory, Pool
from vswa_plugin.wire import control, events

U64 = st.integers(0, 2**64 - 1)
HASHES = st.lists(U64, min_size=1, max_size=4).map(tuple)
GROUP_IDS = st.integers(0, 3)
TIERS = st.sampled_from(events.TIERS)
GROUPS = st.lists(
    st.builds(
        CacheGroup,
        GROUP_IDS,
        st.none() | st.integers(32, 4096),
        st.integers(1, 128),
        st.none() | st.sampled_from(["full", "recurrent", "a later one"]),
        st.none() | st.integers(1, 512),
        st.booleans(),
    ),
    min_size=1,
    max_size=3,
).map(tuple)
MEMORIES = st.builds(
    Memory,
    st.lists(
        st.builds(
            Pool, st.lists(GROUP_IDS, max_size=3).map(tuple), *[st.none() | st.integers(0, 1 << 40)] * 2
        ),
        max_size=3,
    ).map(tuple),
    st.none() | st.sampled_from([*EVICTION_ORDERS, "a later one"]),
    *[st.none() | st.integers(1, 1 << 20)] * 2,
)
EVENTS = st.one_of(
    st.builds(
        events.Layout,
        GROUPS,
        st.text(),
        st.text(),
        st.text(),
        st.none() | st.floats(0.1, 60),
        st.none() | st.builds(Resumption, *[st.integers(1, 512)] * 2, st.booleans(), st.integers(0, 3)),
        st.none() | MEMORIES,
    ),
    st.builds(events.Stored, GROUP_IDS, U64, st.none() | U64, HASHES, TIERS),
    st.builds(events.Removed, GROUP_IDS, HASHES),
    st.builds(events.Moved, GROUP_IDS, HASHES, TIERS),
    st.builds(events.Cleared, st.none() | GROUP_IDS),
)
REPORTS = st.lists(
    st.builds(events.ReuseReport, st.text(max_size=40), U64, U64, st.none() | st.floats(0, 100)), max_size=3
).map(tuple)
BATCHES = st.builds(
    events.Batch, st.just(events.VERSION), U64, U64, U64, st.lists(EVENTS, max_size=4).map(tuple), REPORTS
)
ENTRY = registry.Entry(
    namespace="n",
    component="c",
    worker_id=7,
    mode="agg",
    engine="e",
    served_model_name="m",
    model_path="/m",
    context_length=8192,
    block_size=32,
    rule="trtllm_v2",
    hash_scheme="h",
    groups=(CacheGroup(0, 512, 32), CacheGroup(1, None, 32)),
    epochs={0: 2**63},
    total_kv_blocks=100,
    resumption=Resumption(32, 16, lookahead=1),
)


def known_to(reader: type[msgspec.Struct], struct: msgspec.Struct) -> Any:
    """What of ``struct`` an old reader knows, as built-in types: fields appended since are cut off."""

    def cut(old_type: Any, value: Any) -> Any:
        if isinstance(value, msgspec.Struct):
            known = _TWINS.get(type(value).__name__, old_type)
            return {name: cut(None, getattr(value, name)) for name in known.__struct_fields__}
        if isinstance(value, tuple):
            return [cut(None, each) for each in value]
        return value

    return cut(reader, struct)


_TWINS = {name: value for name, value in vars(old).items() if isinstance(value, type)}


def plain(struct: msgspec.Struct) -> Any:
    return known_to(type(struct), struct)


@given(BATCHES)
def test_an_old_reader_reads_a_new_stream(batch: events.Batch) -> None:
    read = msgspec.msgpack.decode(events.encode(batch), type=old.Batch)

    assert known_to(old.Batch, batch) == plain(read)
    assert [type(event).__name__ for event in batch.events] == [type(each).__name__ for each in read.events]


@given(BATCHES)
def test_a_new_reader_reads_an_old_stream(batch: events.Batch) -> None:
    before = msgspec.msgpack.decode(events.encode(batch), type=old.Batch)
    read = events.decode(msgspec.msgpack.encode(before))

    assert plain(before) == known_to(old.Batch, read)
    assert not any(isinstance(event, events.Unknown) for event in read.events)


@given(st.lists(EVENTS, max_size=4).map(tuple))
def test_an_old_reader_reads_a_new_snapshot(held: tuple[events.Event, ...]) -> None:
    part = control.SnapshotPart(5, 1, 0, held)
    read = msgspec.msgpack.decode(control.encode(part), type=old.SnapshotPart)

    assert known_to(old.SnapshotPart, part) == plain(read)


def test_no_event_has_got_a_new_tag() -> None:
    def tags(union: Any) -> set[Any]:
        return {kind.__struct_config__.tag for kind in union.__args__}

    written = old.Batch.__annotations__["events"]
    assert "Layout | Stored | Removed | Moved | Cleared" in written
    assert {"layout", "stored", "removed", "moved", "cleared"} == tags(events.Event)


@pytest.mark.parametrize(
    ("new", "before"),
    [
        (getattr(module, name), twin)
        for name, twin in _TWINS.items()
        for module in (events, control, registry)
        if issubclass(twin, msgspec.Struct) and hasattr(module, name)
    ],
    ids=lambda kind: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}",
)
def test_fields_are_appended_with_defaults(new: type[msgspec.Struct], before: type[msgspec.Struct]) -> None:
    count = len(before.__struct_fields__)
    added = new.__struct_fields__[count:]

    assert before.__struct_fields__ == new.__struct_fields__[:count]
    assert len(added) <= len(new.__struct_defaults__), "each of them has a default"


def test_an_old_router_reads_the_entry_of_a_new_worker() -> None:
    read = msgspec.json.decode(registry.encode_entry(ENTRY), type=old.Entry)

    assert known_to(old.Entry, ENTRY) == plain(read)


def test_a_new_router_reads_the_entry_of_an_old_worker() -> None:
    before = msgspec.json.decode(registry.encode_entry(ENTRY), type=old.Entry)

    expected = msgspec.structs.replace(ENTRY, resumption=None)
    assert expected == registry.decode_entry(ENTRY.key, msgspec.json.encode(before))


def test_what_is_appended_later_is_ignored_today() -> None:
    """As if a later version had appended a field to each struct: at the end of an array, or in an object."""
    layout = events.layout_event(CacheLayout(ENTRY.groups, "trtllm_v2", "m"), 1.0)
    batch = events.Batch(events.VERSION, 5, 0, 1, (layout, events.Stored(0, 0, None, (1,))))
    array = msgspec.msgpack.decode(events.encode(batch))
    array[4] = [[*event, "of a later version"] for event in array[4]]
    array[4][0][1] = [[*group, {"kind": "sliding"}] for group in array[4][0][1]]
    later = msgspec.msgpack.encode([*array, [["a report", 1, 2]]])
    entry = msgspec.json.decode(registry.encode_entry(ENTRY)) | {"of_a_later_version": 1}

    assert batch == events.decode(later)
    assert ENTRY == registry.decode_entry(ENTRY.key, msgspec.json.encode(entry))
