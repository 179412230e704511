"""Watching, the pure part: the state tells the differences, a watcher hands them on."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Run
from tests.registry_helpers import Reader, entry
from vswa_plugin.blocks import CacheGroup
from vswa_plugin.errors import ProtocolError
from vswa_plugin.registry import (
    MAX_ENTRY_BYTES,
    Change,
    Connected,
    Disconnected,
    Entry,
    decode_entry,
    encode_entry,
)
from vswa_plugin.registry.watching import RegistryState, Watcher
from vswa_plugin.registry.watching import readable as all_readable

KEYS = st.integers(0, 3).map(lambda number: entry(number).key)
PAYLOADS = st.one_of(
    st.builds(lambda number, epoch: encode_entry(entry(number, epoch)), st.integers(0, 3), st.integers(0, 2)),
    st.just(b"{"),
    st.builds(lambda epoch: encode_entry(entry(0, epoch)) + b" ", st.integers(0, 1)),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, PAYLOADS),
        st.tuples(st.just("remove"), KEYS, st.none()),
        st.tuples(st.just("replace"), st.dictionaries(KEYS, PAYLOADS), st.none()),
    ),
    max_size=12,
)


def readable(payloads: dict[str, bytes]) -> dict[str, Entry]:
    found = {}
    for key, payload in payloads.items():
        try:
            found[key] = decode_entry(key, payload)
        except ProtocolError:
            continue
    return found


@given(STEPS)
def test_whoever_applies_the_changes_of_a_view_holds_the_content_after_every_step(steps: list[Any]) -> None:
    reader = Reader(watcher=None)  # type: ignore[arg-type]  # changes come straight from the state
    state = RegistryState(reader.apply)
    content: dict[str, bytes] = {}
    for step, what, payload in steps:
        if step == "put":
            content[what] = payload
            state.put(what, payload)
        elif step == "remove":
            content.pop(what, None)
            state.remove(what)
        else:
            content = dict(what)
            changes = state.differs(what)
            told = len(reader.seen)
            state.replace(what)
            assert changes or told == len(reader.seen)

        assert readable(content) == reader.content == state.entries
        assert not state.differs(content)


def test_an_outage_and_its_end_are_told_once_each() -> None:
    told: list[Change] = []
    state = RegistryState(told.append)
    for step in ("no", "still no", "", "again", "more", ""):
        if step:
            state.disconnect(step)
        else:
            state.connect()
            state.connect()

    assert told == [Disconnected("no"), Connected(), Disconnected("again"), Connected()]


def test_a_watch_that_fails_by_a_bug_says_so_after_what_it_told(run: Run[Any]) -> None:
    async def follow(state: RegistryState) -> None:
        state.connect()
        raise AssertionError("planted")

    async def body() -> list[Change]:
        told = []
        watcher = Watcher(follow, "watch")
        with pytest.raises(AssertionError, match="planted"):
            while True:
                told.append(await anext(watcher))
        await watcher.close()
        return told

    assert run(body()) == [Connected()]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": dict.fromkeys(range(5000), 1)}, "epochs: expected at most 4096, got 5000"),
        ({"groups": (CacheGroup(0, None, 32),) * 2_000}, "groups: expected at most 1024"),
        ({"taints": ("a",) * 2_000}, "taints: expected at most 1024"),
        ({"model_path": "a" * 5_000}, "model_path: expected at most 4096 characters"),
        ({"total_kv_blocks": 1 << 64}, "tokens and blocks"),
        ({"context_length": -1}, "tokens and blocks"),
        ({"groups": (CacheGroup(0, 1 << 70, 32),)}, "tokens and blocks"),
        ({"groups": (CacheGroup(0, None, -1),)}, "tokens and blocks"),
        ({"block_size": 1 << 70}, "tokens and blocks"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_entry_of_which_a_part_is_larger_than_any_workers_is_refused_by_that_part(
    changes: dict[str, Any], named: str
) -> None:
    odd = msgspec.structs.replace(entry(0), **changes)

    with pytest.raises(ProtocolError, match=named):
        decode_entry(odd.key, encode_entry(odd))


@pytest.mark.parametrize(
    "payload",
    [
        b" " * MAX_ENTRY_BYTES + encode_entry(entry(0)),
        b'{"a":' * 50_000,
        b"[" * 200_000,
        b'{"worker_id": 1e999}',
        b"\xff",
        b"",
    ],
    ids=["large", "deep object", "deep array", "infinite", "no text", "nothing"],
)
def test_bytes_that_are_no_entry_are_refused_in_a_line(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="expected a worker entry") as refused:
        decode_entry(entry(0).key, payload)

    assert len(str(refused.value)) < 500


def test_entries_beyond_the_bound_are_left_out_and_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vswa_plugin.registry.watching.MAX_ENTRIES", 2)
    state, listing = RegistryState(lambda _: None), {}
    for number in range(4):
        listing[entry(number).key] = encode_entry(entry(number))
    state.replace(listing)
    state.replace(listing)

    assert {entry(0).key, entry(1).key} == state.entries.keys()
    assert 1 == len(caplog.records)
    assert not state.differs(listing), "or a watch that reads a listing again and again would never rest"
    assert [entry(0), entry(1)] == all_readable(listing)
    state.remove(entry(0).key)
    assert state.differs(listing)
    state.put(entry(3).key, listing[entry(3).key])
    assert {entry(1).key, entry(3).key} == state.entries.keys()
