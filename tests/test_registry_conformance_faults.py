"""What every registry backend promises, run on each of them: faults and the end."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from tests.conftest import Run
from tests.registry_fixtures import backend as backend
from tests.registry_fixtures import place as place
from tests.registry_helpers import (
    ENTRY,
    PATIENCE_S,
    Backend,
    Reader,
    entry,
    plant_entry,
    remote,
)
from vswa_plugin.registry import Connected, Disconnected, Entry, Joined, Left, encode_entry


def started_since(before: set[threading.Thread]) -> list[str]:
    """Names of the threads that run now and did not before; asyncio waits for a child in one of its own."""
    now = set(threading.enumerate()) - before
    return [each.name for each in now if not each.name.startswith("asyncio-waitpid")]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        encode_entry(remote(2)),
        b'"' + b"x" * 500_000 + b'"',
        encode_entry(remote(1)).replace(b'"block_size":32', b'"block_size":"32"'),
    ],
    ids=["empty", "cut", "fields missing", "no text", "nested", "of another key", "large", "wrong type"],
)
def test_a_malformed_entry_is_left_out_and_logged_once(
    run: Run[Any], backend: Backend, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "vswa_plugin.registry")

    async def body() -> list[object]:
        router = backend.registry()
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds()
            await plant_entry(backend, remote(1))
            await reader.until_holds(remote(1))
            await backend.plant(remote(1).key, payload)
            await reader.until_holds()
            await plant_entry(backend, remote(3))  # what comes after it is told as ever
            await reader.until_holds(remote(3))
            told = [record for record in caplog.records if remote(1).key in record.getMessage()]
            assert len(told) == 1
            assert await router.entries() == [remote(3)]
            await plant_entry(backend, remote(1, 2))
            await reader.until_holds(remote(1, 2), remote(3))
        await router.close()
        return list(reader.seen)

    assert run(body()) == [
        Connected(),
        Joined(remote(1)),
        Left(remote(1)),
        Joined(remote(3)),
        Joined(remote(1, 2)),
    ]


def test_while_the_registry_is_away_the_last_known_state_stands(run: Run[Any], backend: Backend) -> None:
    async def body() -> list[object]:
        router = backend.registry()
        await plant_entry(backend, remote(1))
        await plant_entry(backend, remote(2))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(remote(1), remote(2))
            await backend.go_away()
            await reader.until(lambda reader: not reader.connected)
            assert not watcher.connected
            assert len(reader.content) == 2
            await backend.come_back()
            await backend.remove(remote(1).key)
            await plant_entry(backend, remote(2, 7))
            await reader.until_holds(remote(2, 7))
            assert watcher.connected
        await router.close()
        return [type(change).__name__ for change in reader.seen]

    told = run(body())
    assert told[:4] == ["Joined", "Joined", "Connected", "Disconnected"]
    assert sorted(told[4:]) == ["Connected", "Left", "Updated"]


def test_a_watch_may_begin_while_the_registry_is_away(run: Run[Any], backend: Backend) -> None:
    async def body() -> list[str]:
        router = backend.registry()
        await router.entries()
        await plant_entry(backend, remote(1))
        await backend.go_away()
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until(lambda reader: bool(reader.seen))
            await backend.come_back()
            await reader.until_holds(remote(1))
        await router.close()
        return [type(change).__name__ for change in reader.seen]

    assert run(body()) == ["Disconnected", "Joined", "Connected"]


@pytest.mark.parametrize("away", [False, True], ids=["there", "away"])
def test_nothing_runs_any_more_after_close(run: Run[Any], backend: Backend, away: bool) -> None:
    async def body() -> None:
        before, tasks = set(threading.enumerate()), asyncio.all_tasks()
        worker, router = backend.registry(), backend.registry()
        await worker.join(entry(1))
        watchers = [router.watch(), router.watch("ns"), worker.watch()]
        for watcher in watchers:
            await Reader(watcher).until_holds(entry(1))
        opening = router.watch()  # closed while it connects
        if away:
            await backend.go_away()
        await asyncio.gather(worker.close(), router.close())
        if away:
            await backend.come_back()
        assert opening.closed
        assert asyncio.all_tasks() == tasks
        assert [] == [name for name in started_since(before) if name.startswith("vswa")]
        async with asyncio.timeout(PATIENCE_S):
            while started_since(before):  # gRPC's own threads end by themselves once their channel is closed
                await asyncio.sleep(0.01)

    run(body())


def test_closing_a_watcher_ends_the_iteration_of_whoever_waits(run: Run[Any], backend: Backend) -> None:
    async def body() -> list[object]:
        router = backend.registry()
        watcher = router.watch()
        connected = asyncio.Event()

        async def read() -> list[object]:
            told: list[object] = []
            async for change in watcher:
                told.append(change)
                connected.set()
            return told

        reading = [asyncio.create_task(read())]
        await connected.wait()
        reading.append(asyncio.create_task(read()))
        await asyncio.sleep(0)
        await watcher.close()
        told = await asyncio.wait_for(asyncio.gather(*reading), PATIENCE_S)
        assert await read() == []
        await router.close()
        return list(told)

    assert run(body()) == [[Connected()], []]


def test_a_registry_may_be_used_again_after_close(run: Run[Any], backend: Backend) -> None:
    async def body() -> list[Entry]:
        registry = backend.registry()
        await registry.join(ENTRY)
        await registry.close()
        await registry.join(ENTRY)
        found = await registry.entries()
        await registry.close()
        return list(found)

    assert run(body()) == [ENTRY]


def test_disconnected_says_where_and_which_setting(run: Run[Any], backend: Backend) -> None:
    async def body() -> str:
        router = backend.registry()
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds()
            await backend.go_away()
            await reader.until(lambda reader: not reader.connected)
            await backend.come_back()
        await router.close()
        (reason,) = [change.reason for change in reader.seen if isinstance(change, Disconnected)]
        return reason

    reason = run(body())
    assert "ETCD_ENDPOINTS" in reason or "VSWA_REGISTRY" in reason
