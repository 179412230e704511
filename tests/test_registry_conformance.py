"""What every registry backend promises, run on each of them."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.conftest import Run
from tests.registry_helpers import (
    ENTRY,
    PATIENCE_S,
    Backend,
    EtcdBackend,
    FileBackend,
    Reader,
    content_of,
    entry,
    plant_entry,
    start_worker,
)
from vswa_plugin.errors import InvariantError
from vswa_plugin.registry import Connected, Disconnected, Entry, Joined, Left, Updated, encode_entry


@pytest.fixture(scope="module", params=["etcd", "file"])
def place(
    request: pytest.FixtureRequest, run: Run[Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Backend]:
    folder = tmp_path_factory.mktemp("registry")
    made: Backend = EtcdBackend(folder) if request.param == "etcd" else FileBackend(folder)
    if isinstance(made, EtcdBackend):
        run(made.come_back())
    yield made
    run(made.stop())


@pytest.fixture
def backend(place: Backend, run: Run[Any]) -> Backend:
    """The place, empty. Workers that entries name as on this host are taken for dead in files."""
    run(place.clear())
    return place


def remote(worker_id: int, epoch: int = 1, namespace: str = "ns") -> Entry:
    """An entry of another machine: planted, it lives for a TTL."""
    return msgspec.structs.replace(entry(worker_id, epoch, namespace), host="elsewhere")


def started_since(before: set[threading.Thread]) -> list[str]:
    """Names of the threads that run now and did not before; asyncio waits for a child in one of its own."""
    now = set(threading.enumerate()) - before
    return [each.name for each in now if not each.name.startswith("asyncio-waitpid")]


def test_an_entry_is_there_from_join_to_leave(run: Run[Any], backend: Backend) -> None:
    async def body() -> list[list[Entry]]:
        worker, router = backend.registry(), backend.registry()
        seen = [await router.entries()]
        await worker.join(ENTRY)
        seen.append(await router.entries())
        await worker.join(msgspec.structs.replace(ENTRY, context_length=1))
        seen.append(await router.entries())
        assert await worker.update(epochs={0: 9}) == (await router.entries())[0]
        seen.append(await router.entries())
        await worker.leave()
        seen.append(await router.entries())
        await router.leave()
        return seen

    replaced = msgspec.structs.replace(ENTRY, context_length=1)
    updated = msgspec.structs.replace(replaced, epochs={0: 9})
    assert run(body()) == [[], [ENTRY], [replaced], [updated], []]


def test_a_watch_tells_what_is_there_then_what_happens_in_order(run: Run[Any], backend: Backend) -> None:
    async def body() -> list[object]:
        worker, other, router = backend.registry(), backend.registry(), backend.registry()
        await worker.join(entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            await other.join(entry(2))
            await reader.until_holds(entry(1), entry(2))
            await worker.update(epochs={0: 2})
            await reader.until_holds(entry(1, 2), entry(2))
            await worker.leave()
            await reader.until_holds(entry(2))
            await worker.join(entry(1, 3))
            await reader.until_holds(entry(1, 3), entry(2))
        await asyncio.gather(worker.close(), other.close(), router.close())
        return list(reader.seen)

    assert run(body()) == [
        Joined(entry(1)),
        Connected(),
        Joined(entry(2)),
        Updated(entry(1, 2)),
        Left(entry(1, 2)),
        Joined(entry(1, 3)),
    ]


def test_joining_again_with_the_same_entry_is_no_change(run: Run[Any], backend: Backend) -> None:
    async def body() -> list[object]:
        worker, router = backend.registry(), backend.registry()
        await worker.join(entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            await worker.join(entry(1))
            await plant_entry(backend, remote(2))
            await reader.until_holds(entry(1), remote(2))
        await asyncio.gather(worker.close(), router.close())
        return list(reader.seen)

    assert run(body()) == [Joined(entry(1)), Connected(), Joined(remote(2))]


def test_an_entry_can_only_be_updated_while_joined_and_keeps_its_key(run: Run[Any], backend: Backend) -> None:
    async def body() -> list[str]:
        worker = backend.registry()
        said = []
        for attempt in ({"epochs": {0: 1}}, None, {"worker_id": 7}, {"epoch": 1}):
            if attempt is None:
                await worker.join(ENTRY)
                continue
            with pytest.raises(InvariantError) as refused:
                await worker.update(**attempt)
            said.append(str(refused.value))
        assert await worker.entries() == [ENTRY]
        await worker.close()
        return said

    not_joined, other_key, unknown = run(body())
    assert "between join() and leave()" in not_joined
    assert f"expected the key {ENTRY.key} until leave(), got" in other_key
    assert "expected fields of Entry in update(), got ['epoch']" in unknown


def test_a_worker_that_is_killed_leaves(run: Run[Any], backend: Backend, tmp_path: Path) -> None:
    async def body() -> list[object]:
        router, live = backend.registry(), backend.registry()
        await live.join(entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            child = await start_worker(backend.where, entry(2), tmp_path)
            await reader.until_holds(entry(1), entry(2))
            child.kill()
            await child.wait()
            await reader.until_holds(entry(1))
        assert await router.entries() == [entry(1)]
        await asyncio.gather(live.close(), router.close())
        return list(reader.seen)

    assert run(body())[-1] == Left(entry(2))


def test_a_live_worker_stays_for_longer_than_its_ttl(run: Run[Any], backend: Backend) -> None:
    async def body() -> list[object]:
        worker, router = backend.registry(ttl_s=1), backend.registry(ttl_s=1)
        await worker.join(entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.2 if backend.name == "etcd" else 1.4):
                    await anext(watcher)
        await asyncio.gather(worker.close(), router.close())
        return list(reader.seen)

    assert run(body()) == [Joined(entry(1)), Connected()]


def test_an_entry_that_somebody_deleted_is_put_again(run: Run[Any], backend: Backend) -> None:
    async def body() -> None:
        worker, router = backend.registry(ttl_s=1), backend.registry(ttl_s=1)
        await worker.join(entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            await backend.remove(entry(1).key)
            await reader.until(lambda reader: Left(entry(1)) in reader.seen)
            await reader.until_holds(entry(1))
        await asyncio.gather(worker.close(), router.close())

    run(body())


def test_the_leaving_of_one_writer_leaves_the_entry_that_another_put_in_its_place(
    run: Run[Any], backend: Backend
) -> None:
    async def body() -> list[Entry]:
        first, second = backend.registry(), backend.registry()
        await first.join(entry(1, 1))
        await second.join(entry(1, 2))
        await first.leave()
        left = await second.entries()
        await second.close()
        return left

    assert run(body()) == [entry(1, 2)]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_reader_of_all_changes_holds_the_content_after_any_mix_of_writers(
    run: Run[Any], backend: Backend, seed: int
) -> None:
    rng = random.Random(seed)

    async def write(number: int) -> None:
        worker = backend.registry()
        joined = False
        for epoch in range(12):
            match rng.choice(["join", "update", "leave", "plant", "remove"]):
                case "join":
                    await worker.join(entry(number, epoch))
                    joined = True
                case "update" if joined:
                    await worker.update(epochs={0: epoch})
                case "leave":
                    await worker.leave()
                    joined = False
                case "plant":
                    await plant_entry(backend, remote(number + 10, epoch))
                case "remove":
                    await plant_entry(backend, remote(number + 20, epoch))
                    await backend.remove(remote(number + 20).key)
            await asyncio.sleep(0)
        if joined:
            await worker.update(epochs={0: 99})
        workers.append(worker)

    async def body() -> None:
        router = backend.registry()
        async with router.watch() as early:
            await asyncio.gather(*(write(number) for number in range(4)))
            await plant_entry(backend, remote(1000))
            expected = await content_of(router)
            async with router.watch() as late:
                for watcher in (early, late):
                    reader = Reader(watcher)
                    await reader.until(lambda reader: remote(1000).key in reader.content and reader.connected)
                    await reader.until(lambda reader: reader.content == expected)
        await asyncio.gather(router.close(), *(worker.close() for worker in workers))

    workers: list[Any] = []
    run(body())


def test_many_entries_are_all_told(run: Run[Any], backend: Backend) -> None:
    entries = [remote(number) for number in range(400)]

    async def body() -> None:
        router = backend.registry()
        async with router.watch() as early:
            await asyncio.gather(*(plant_entry(backend, each) for each in entries))
            async with router.watch() as late:
                for watcher in (early, late):
                    await Reader(watcher).until_holds(*entries)
        assert await content_of(router) == {each.key: each for each in entries}
        await router.close()

    run(body())


def test_a_namespace_is_told_alone(run: Run[Any], backend: Backend) -> None:
    mine, longer, other = remote(1), remote(1, namespace="ns2"), remote(2, namespace="other")

    async def body() -> list[object]:
        router = backend.registry()
        await plant_entry(backend, longer)
        async with router.watch("ns") as watcher:
            reader = Reader(watcher)
            await reader.until_holds()
            await plant_entry(backend, other)
            await plant_entry(backend, mine)
            await reader.until_holds(mine)
        assert await router.entries("ns") == [mine]
        assert await content_of(router) == {each.key: each for each in (mine, longer, other)}
        await router.close()
        return list(reader.seen)

    assert run(body()) == [Connected(), Joined(mine)]


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
