"""What etcd's watch tells, in whatever order listings and events arrive."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from statistics import median
from typing import Any

import pytest

from tests.conftest import Run
from tests.registry_fixtures import etcd as etcd
from tests.registry_fixtures import etcd_place as etcd_place
from tests.registry_helpers import PATIENCE_S, EtcdBackend, Reader, entry, plant_entry
from vswa_plugin.registry import Change, Connected, Joined, Left, Updated, encode_entry
from vswa_plugin.registry import _etcd3_client as client_module
from vswa_plugin.registry import etcd_watch as etcd_watch_module
from vswa_plugin.registry.etcd import EtcdRegistry
from vswa_plugin.registry.etcd_settings import EtcdSecurity
from vswa_plugin.registry.etcd_watch import _Stream


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
