"""What every registry backend promises, run on each of them: joining, leaving, watching."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.conftest import Run
from tests.registry_fixtures import backend as backend
from tests.registry_fixtures import place as place
from tests.registry_helpers import (
    ENTRY,
    Backend,
    Reader,
    content_of,
    entry,
    joined_and_watched,
    plant_entry,
    remote,
    start_worker,
)
from vswa_plugin.errors import InvariantError
from vswa_plugin.registry import Connected, Entry, Joined, Left, Updated


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
        async with joined_and_watched(worker, router) as reader:
            await worker.join(entry(1))
            await plant_entry(backend, remote(2))
            await reader.until_holds(entry(1), remote(2))
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
        async with joined_and_watched(worker, router) as reader:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.2 if backend.name == "etcd" else 1.4):
                    await reader.until(lambda reader: len(reader.seen) > 2)
        return list(reader.seen)

    assert run(body()) == [Joined(entry(1)), Connected()]


def test_an_entry_that_somebody_deleted_is_put_again(run: Run[Any], backend: Backend) -> None:
    async def body() -> None:
        worker, router = backend.registry(ttl_s=1), backend.registry(ttl_s=1)
        async with joined_and_watched(worker, router) as reader:
            await backend.remove(entry(1).key)
            await reader.until(lambda reader: Left(entry(1)) in reader.seen)
            await reader.until_holds(entry(1))

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
