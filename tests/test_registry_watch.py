"""Watching: the differences told by a view, and etcd's stream under every fault."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Run
from tests.registry_helpers import PATIENCE_S, EtcdBackend, Reader, content_of, entry, plant_entry
from vswa_plugin.errors import ProtocolError
from vswa_plugin.registry import (
    Change,
    Connected,
    Disconnected,
    Entry,
    Joined,
    Left,
    Updated,
    decode_entry,
    encode_entry,
)
from vswa_plugin.registry import _etcd3_client as client_module
from vswa_plugin.registry import etcd_watch as etcd_watch_module
from vswa_plugin.registry.etcd import EtcdRegistry
from vswa_plugin.registry.etcd_settings import EtcdSecurity
from vswa_plugin.registry.etcd_watch import _Stream
from vswa_plugin.registry.watching import View, Watcher

# ---- the view, pure -------------------------------------------------------------------------------

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
    reader = Reader(watcher=None)  # type: ignore[arg-type]  # changes come straight from the view
    view = View(reader.apply)
    content: dict[str, bytes] = {}
    for step, what, payload in steps:
        if step == "put":
            content[what] = payload
            view.put(what, payload)
        elif step == "remove":
            content.pop(what, None)
            view.remove(what)
        else:
            content = dict(what)
            changes = view.differs(what)
            told = len(reader.seen)
            view.replace(what)
            assert changes or told == len(reader.seen)

        assert readable(content) == reader.content == view.entries
        assert not view.differs(content)


def test_an_outage_and_its_end_are_told_once_each() -> None:
    told: list[Change] = []
    view = View(told.append)
    for step in ("no", "still no", "", "again", "more", ""):
        if step:
            view.disconnect(step)
        else:
            view.connect()
            view.connect()

    assert told == [Disconnected("no"), Connected(), Disconnected("again"), Connected()]


def test_a_watch_that_fails_by_a_bug_says_so_after_what_it_told(run: Run[Any]) -> None:
    async def follow(view: View) -> None:
        view.connect()
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


# ---- etcd under faults ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(run: Run[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdBackend]:
    made = EtcdBackend(tmp_path_factory.mktemp("etcd"))
    run(made.come_back())
    yield made
    run(made.stop())


@pytest.fixture
def etcd(place: EtcdBackend, run: Run[Any]) -> EtcdBackend:
    run(place.clear())
    return place


def names(reader: Reader) -> list[str]:
    return [type(change).__name__ for change in reader.seen]


def test_a_slow_reader_is_told_every_single_change_of_a_live_stream(run: Run[Any], etcd: EtcdBackend) -> None:
    async def body() -> list[Change]:
        router = etcd.registry()
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds()
            for epoch in range(1, 41):
                await plant_entry(etcd, entry(1, epoch))
            await etcd.remove(entry(1).key)
            await plant_entry(etcd, entry(1, 41))
            await reader.until_holds(entry(1, 41))
        await router.close()
        return reader.seen

    updates = [Updated(entry(1, epoch)) for epoch in range(2, 41)]
    assert run(body()) == [Connected(), Joined(entry(1)), *updates, Left(entry(1, 40)), Joined(entry(1, 41))]


def test_what_changed_in_one_transaction_is_told_entirely(run: Run[Any], etcd: EtcdBackend) -> None:
    async def body() -> None:
        router = etcd.registry()
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds()
            entries = [entry(number) for number in range(5)]

            def put_all(client: Any) -> None:
                puts = [client.transactions.put(each.key, encode_entry(each)) for each in entries]
                client.transaction(compare=[], success=puts, failure=[])

            await etcd.call(put_all)
            await reader.until_holds(*entries)
        await router.close()

    run(body())


def test_a_change_is_told_within_milliseconds(run: Run[Any], etcd: EtcdBackend) -> None:
    async def body() -> list[float]:
        router = etcd.registry()
        took = []
        async with router.watch() as watcher:
            await Reader(watcher).until_holds()
            for epoch in range(60):
                began = time.perf_counter()
                await plant_entry(etcd, entry(1, epoch))
                await anext(watcher)
                took.append(time.perf_counter() - began)
        await router.close()
        return took

    took = run(body())
    assert median(took) < 0.02  # a few ms; the machine may be busy


def test_a_restart_on_the_same_data_loses_nothing_that_happened_right_after_it(
    run: Run[Any], etcd: EtcdBackend
) -> None:
    async def body() -> list[str]:
        router = etcd.registry()
        await plant_entry(etcd, entry(1))
        await plant_entry(etcd, entry(2))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1), entry(2))
            for round_ in range(2):
                await etcd.go_away()
                await reader.until(lambda reader: not reader.connected)
                await etcd.come_back()
                await etcd.remove(entry(1 + round_).key)
                await plant_entry(etcd, entry(3 + round_, round_))
                await reader.until_holds(entry(2 + round_, 1 - round_), entry(3 + round_, round_))
        await router.close()
        return names(reader)

    assert run(body())[:4] == ["Joined", "Joined", "Connected", "Disconnected"]


def test_a_registry_that_came_back_empty_is_told_and_its_workers_join_again(
    run: Run[Any], etcd: EtcdBackend
) -> None:
    async def body() -> None:
        worker, router = etcd.registry(), etcd.registry()
        await worker.join(entry(1))
        for number in range(30):  # so that the empty one is at an earlier revision
            await plant_entry(etcd, entry(2, number))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1), entry(2, 29))
            await etcd.go_away()
            await etcd.come_back(empty=True)
            await reader.until(lambda reader: Left(entry(2, 29)) in reader.seen)
            await reader.until_holds(entry(1))
            await plant_entry(etcd, entry(3))  # and the stream follows the new revisions
            await reader.until_holds(entry(1), entry(3))
        await asyncio.gather(worker.close(), router.close())

    run(body())


def test_a_compaction_between_listing_and_watching_loses_nothing(
    run: Run[Any], etcd: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = _Stream._open

    def open_after_compaction(stream: _Stream, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        opened.append(1)
        if len(opened) == 1:
            client.delete(entry(1).key)
            client.put(entry(2).key, encode_entry(entry(2)))
            client.compact(client.put("elsewhere", b"").header.revision)
        original(stream, client, loop)

    monkeypatch.setattr(_Stream, "_open", open_after_compaction)

    async def body() -> list[Change]:
        router = etcd.registry()
        await plant_entry(etcd, entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(2))
            await plant_entry(etcd, entry(3))
            await reader.until_holds(entry(2), entry(3))
        await router.close()
        return reader.seen

    told = run(body())
    assert told == [Joined(entry(1)), Connected(), Left(entry(1)), Joined(entry(2)), Joined(entry(3))]
    assert len(opened) == 2


def test_what_happens_between_listing_and_watching_is_told(
    run: Run[Any], etcd: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = _Stream._open

    def open_late(stream: _Stream, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        client.put(entry(1).key, encode_entry(entry(1)))
        original(stream, client, loop)

    monkeypatch.setattr(_Stream, "_open", open_late)

    async def body() -> list[Change]:
        router = etcd.registry()
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
        await router.close()
        return reader.seen

    assert run(body()) == [Connected(), Joined(entry(1))]


def test_what_a_silent_stream_did_not_tell_is_told_by_the_next_listing(
    run: Run[Any], etcd: EtcdBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "vswa_plugin.registry")
    silent = True
    original = client_module.WatchStream._hop

    def hop(stream: Any, item: Any) -> None:
        if not silent:
            original(stream, item)

    monkeypatch.setattr(client_module.WatchStream, "_hop", hop)

    async def body() -> list[Change]:
        nonlocal silent
        router = EtcdRegistry(etcd.where, security=EtcdSecurity(), reconcile_s=0.1)
        await plant_entry(etcd, entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            await etcd.remove(entry(1).key)
            await plant_entry(etcd, entry(2))
            await reader.until_holds(entry(2))
            silent = False
            await plant_entry(etcd, entry(2, 2))
            await reader.until_holds(entry(2, 2))
        await router.close()
        return reader.seen

    told = run(body())
    assert told[:4] == [Joined(entry(1)), Connected(), Left(entry(1)), Joined(entry(2))]
    assert "etcd's watch was silent about changes: watching again" in caplog.text


def test_an_event_that_overtakes_a_listing_is_not_undone_by_it(
    run: Run[Any], etcd: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    overtaken, listed_again = asyncio.Event(), asyncio.Event()
    monkeypatch.setattr(etcd_watch_module, "GRACE_S", 0.01)
    original = _Stream._list

    async def list_slowly(stream: _Stream) -> Any:
        listing = await original(stream)
        if overtaken.is_set():
            listed_again.set()
        if entry(1).key in listing.content and not overtaken.is_set():
            await plant_entry(etcd, entry(1, 2))
            while stream._items.empty():
                await asyncio.sleep(0.001)
            overtaken.set()
        return listing

    async def body() -> list[Change]:
        router = EtcdRegistry(etcd.where, security=EtcdSecurity(), reconcile_s=0.05)
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds()
            monkeypatch.setattr(_Stream, "_list", list_slowly)
            await plant_entry(etcd, entry(1))
            await reader.until_holds(entry(1))
            await asyncio.wait_for(listed_again.wait(), PATIENCE_S)
            await plant_entry(etcd, entry(2))
            await reader.until_holds(entry(1, 2), entry(2))
        await router.close()
        return reader.seen

    assert run(body()) == [Connected(), Joined(entry(1)), Updated(entry(1, 2)), Joined(entry(2))]


def test_a_stream_that_is_later_than_a_listing_still_tells_every_change(
    run: Run[Any], etcd: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[Any, Any]] = []
    hop, verify_with = client_module.WatchStream._hop, _Stream._hear

    async def hear(stream: _Stream, listing: Any) -> bool:
        monkeypatch.setattr(client_module.WatchStream, "_hop", hop)
        for late, item in held:
            hop(late, item)
        return await verify_with(stream, listing)

    monkeypatch.setattr(client_module.WatchStream, "_hop", lambda *args: held.append(args))
    monkeypatch.setattr(_Stream, "_hear", hear)

    async def body() -> list[Change]:
        router = EtcdRegistry(etcd.where, security=EtcdSecurity(), reconcile_s=0.2)
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds()
            for epoch in range(1, 4):
                await plant_entry(etcd, entry(1, epoch))
            await reader.until_holds(entry(1, 3))
        await router.close()
        return reader.seen

    told = [Connected(), Joined(entry(1, 1)), Updated(entry(1, 2)), Updated(entry(1, 3))]
    assert run(body()) == told


def test_a_closed_watcher_leaves_nothing_though_its_registry_goes_on(
    run: Run[Any], etcd: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = _Stream._open
    opening, may_open = threading.Event(), threading.Event()

    def open_slowly(stream: _Stream, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        opening.set()
        may_open.wait(PATIENCE_S)
        original(stream, client, loop)

    async def body() -> None:
        worker = etcd.registry(ttl_s=30)
        await worker.join(entry(1))
        watcher = worker.watch()
        reader = Reader(watcher)
        await reader.until_holds(entry(1))
        await plant_entry(etcd, entry(2))
        await reader.until_holds(entry(1), entry(2))
        assert len(streams()) == 1
        await watcher.close()
        assert [] == streams()

        monkeypatch.setattr(_Stream, "_open", open_slowly)
        watcher = worker.watch()
        await asyncio.to_thread(opening.wait, PATIENCE_S)
        await watcher.close()  # while its stream is being opened
        may_open.set()
        assert await worker.entries() == [entry(1), entry(2)]
        assert [] == streams()
        await worker.close()

    def streams() -> list[threading.Thread]:
        return [each for each in threading.enumerate() if each.name == "vswa-etcd-watch"]

    run(body())


class Proxy:
    """A TCP proxy before etcd whose connections can be cut, or go dead without a word."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self._mute: set[asyncio.StreamWriter] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, back]
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if writer not in self._mute:
                    writer.write(data)
        finally:
            writer.close()

    def mute(self) -> None:
        """Nothing passes through the connections that there are; new ones work."""
        self._mute.update(self._writers)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        self.cut()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()


@pytest.mark.parametrize("fault", [Proxy.cut, Proxy.mute], ids=["cut", "dead without a word"])
def test_a_broken_connection_loses_nothing(
    run: Run[Any], etcd: EtcdBackend, fault: Callable[[Proxy], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "CALL_TIMEOUT_S", 0.3)

    async def body() -> list[str]:
        proxy = Proxy(etcd.port)
        router = EtcdRegistry(await proxy.start(), security=EtcdSecurity(), reconcile_s=0.2)
        await plant_entry(etcd, entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            fault(proxy)
            await plant_entry(etcd, entry(2))
            await etcd.remove(entry(1).key)
            await reader.until_holds(entry(2))
            await plant_entry(etcd, entry(2, 2))
            await reader.until_holds(entry(2, 2))
        await router.close()
        await proxy.stop()
        return names(reader)

    assert run(body())[0] == "Joined"


def test_the_watch_goes_on_at_the_next_endpoint(run: Run[Any], etcd: EtcdBackend) -> None:
    """Two proxies before one etcd stand for two members of a cluster."""

    async def body() -> list[Change]:
        first, second = Proxy(etcd.port), Proxy(etcd.port)
        urls = [await first.start(), await second.start()]
        router = EtcdRegistry(",".join(urls), security=EtcdSecurity(), reconcile_s=60)
        await plant_entry(etcd, entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            await first.stop()
            await plant_entry(etcd, entry(2))
            await reader.until_holds(entry(1), entry(2))
        await router.close()
        await second.stop()
        return reader.seen

    assert run(body()) == [Joined(entry(1)), Connected(), Joined(entry(2))]


def test_an_etcd_that_is_away_is_asked_with_a_growing_pause(
    run: Run[Any], etcd: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[float] = []
    original = client_module.Connection.call

    async def call(connection: Any, use: Any) -> Any:
        attempts.append(time.monotonic())
        return await original(connection, use)

    async def body() -> None:
        router = etcd.registry()
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds()
            await etcd.go_away()
            await reader.until(lambda reader: not reader.connected)
            monkeypatch.setattr(client_module.Connection, "call", call)
            async with asyncio.timeout(PATIENCE_S):
                while len(attempts) < 4:
                    await asyncio.sleep(0.02)
            monkeypatch.undo()
            await etcd.come_back()
            await reader.until_holds()
        assert await content_of(router) == {}
        await router.close()

    run(body())
    pauses = [later - sooner for sooner, later in pairwise(attempts)]
    assert pauses == sorted(pauses)
    assert pauses[0] >= 0.05


def test_a_worker_whose_update_found_etcd_away_puts_it_when_it_is_back(
    run: Run[Any], etcd: EtcdBackend
) -> None:
    async def body() -> None:
        worker, router = etcd.registry(), etcd.registry()
        await worker.join(entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            await etcd.go_away()
            with pytest.raises(ConnectionError, match="ETCD_ENDPOINTS"):
                await worker.update(epochs={0: 5})
            await etcd.come_back()
            await reader.until_holds(entry(1, 5))
        await asyncio.gather(worker.close(), router.close())

    run(body())
