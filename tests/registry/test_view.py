"""Watching, the pure part: the state tells the differences, a watcher hands them on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Run
from tests.registry_helpers import Reader, entry
from vswa_plugin.errors import ProtocolError
from vswa_plugin.registry import Change, Connected, Disconnected, Entry, decode_entry, encode_entry
from vswa_plugin.registry.watching import RegistryState, Watcher

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
