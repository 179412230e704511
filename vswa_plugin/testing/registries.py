"""The conformance suite of registries: what workers and routers rely on, as tests to inherit.

    class TestMyRegistry(RegistryConformance):
        @pytest.fixture
        def backend(self): return MyBackend()  # see RegistryBackend

``registry_outages`` has the suite for a place that can be out of reach for a while.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

import msgspec

from vswa_plugin.errors import InvariantError
from vswa_plugin.registry import Connected, Entry, Joined, Left, Updated, encode_entry
from vswa_plugin.testing.registry_backends import (
    ENTRY,
    Reader,
    RegistryBackend,
    content_of,
    entry,
    joined_and_watched,
    nothing_runs_after_close,
    plant_entry,
    remote,
)

try:
    import pytest
except ImportError as error:
    raise ImportError(
        "vswa_plugin.testing.registries needs pytest: pip install 'vswa-plugin[test]'; most other "
        "modules of vswa_plugin.testing work without it"
    ) from error

__all__ = [
    "RegistryConformance",
]


class RegistryConformance:
    """What every registry promises: joining, leaving, watching, entries that cannot be used, and the end.

    An author subclasses it with a fixture ``backend``: a
    :class:`~vswa_plugin.testing.registry_backends.RegistryBackend` that is empty.
    """

    def test_an_entry_is_there_from_join_to_leave(self, backend: RegistryBackend) -> None:
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
        assert backend.run(body()) == [[], [ENTRY], [replaced], [updated], []]

    def test_a_watch_tells_what_is_there_then_what_happens_in_order(self, backend: RegistryBackend) -> None:
        async def body() -> list[object]:
            worker, other, router = backend.registry(), backend.registry(), backend.registry()
            await worker.join(entry(1))
            async with router.watch() as watcher:
                reader = Reader(watcher, backend.patience_s)
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

        assert backend.run(body()) == [
            Joined(entry(1)),
            Connected(),
            Joined(entry(2)),
            Updated(entry(1, 2)),
            Left(entry(1, 2)),
            Joined(entry(1, 3)),
        ]

    def test_joining_again_with_the_same_entry_is_no_change(self, backend: RegistryBackend) -> None:
        async def body() -> list[object]:
            worker, router = backend.registry(), backend.registry()
            async with joined_and_watched(worker, router, backend.patience_s) as reader:
                await worker.join(entry(1))
                await plant_entry(backend, remote(2))
                await reader.until_holds(entry(1), remote(2))
            return list(reader.seen)

        assert backend.run(body()) == [Joined(entry(1)), Connected(), Joined(remote(2))]

    def test_an_entry_can_only_be_updated_while_joined_and_keeps_its_key(
        self, backend: RegistryBackend
    ) -> None:
        async def body() -> list[str]:
            worker = backend.registry()
            refusals = []
            for attempt in ({"epochs": {0: 1}}, None, {"worker_id": 7}, {"epoch": 1}):
                if attempt is None:
                    await worker.join(ENTRY)
                    continue
                with pytest.raises(InvariantError) as refused:
                    await worker.update(**attempt)
                refusals.append(str(refused.value))
            assert await worker.entries() == [ENTRY]
            await worker.close()
            return refusals

        not_joined, other_key, unknown = backend.run(body())
        assert "between join() and leave()" in not_joined
        assert f"expected the key {ENTRY.key} until leave(), got" in other_key
        assert "expected fields of Entry in update(), got ['epoch']" in unknown

    def test_a_worker_that_is_killed_leaves(self, backend: RegistryBackend) -> None:
        async def body() -> list[object]:
            router, live = backend.registry(), backend.registry()
            await live.join(entry(1))
            async with router.watch() as watcher:
                reader = Reader(watcher, backend.patience_s)
                worker = await backend.start_worker(entry(2))
                await reader.until_holds(entry(1), entry(2))
                worker.kill()
                await worker.wait()
                await reader.until_holds(entry(1))
            assert await router.entries() == [entry(1)]
            await asyncio.gather(live.close(), router.close())
            return list(reader.seen)

        assert backend.run(body())[-1] == Left(entry(2))

    def test_a_live_worker_stays_for_longer_than_its_ttl(self, backend: RegistryBackend) -> None:
        async def body() -> list[object]:
            worker, router = backend.registry(ttl_s=1), backend.registry(ttl_s=1)
            patience_s = backend.patience_s + backend.outlives_s  # so that it is not what ends the wait below
            async with joined_and_watched(worker, router, patience_s) as reader:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(backend.outlives_s):
                        await reader.until(lambda reader: len(reader.seen) > 2)
            return list(reader.seen)

        assert backend.run(body()) == [Joined(entry(1)), Connected()]

    def test_an_entry_that_somebody_deleted_is_put_again(self, backend: RegistryBackend) -> None:
        async def body() -> None:
            worker, router = backend.registry(ttl_s=1), backend.registry(ttl_s=1)
            async with joined_and_watched(worker, router, backend.patience_s) as reader:
                await backend.remove(entry(1).key)
                await reader.until(lambda reader: Left(entry(1)) in reader.seen)
                await reader.until_holds(entry(1))

        backend.run(body())

    def test_the_leaving_of_one_writer_leaves_the_entry_that_another_put_in_its_place(
        self, backend: RegistryBackend
    ) -> None:
        async def body() -> list[Entry]:
            first, second = backend.registry(), backend.registry()
            await first.join(entry(1, 1))
            await second.join(entry(1, 2))
            await first.leave()
            left = await second.entries()
            await second.close()
            return left

        assert backend.run(body()) == [entry(1, 2)]

    @pytest.mark.parametrize("seed", [1, 2])
    def test_a_reader_of_all_changes_holds_the_content_after_any_mix_of_writers(
        self, backend: RegistryBackend, seed: int
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
                        reader = Reader(watcher, backend.patience_s)
                        await reader.until(
                            lambda reader: remote(1000).key in reader.content and reader.connected
                        )
                        await reader.until(lambda reader: reader.content == expected)
            await asyncio.gather(router.close(), *(worker.close() for worker in workers))

        workers: list[Any] = []
        backend.run(body())

    def test_many_entries_are_all_reported(self, backend: RegistryBackend) -> None:
        entries = [remote(number) for number in range(400)]

        async def body() -> None:
            router = backend.registry()
            async with router.watch() as early:
                await asyncio.gather(*(plant_entry(backend, each) for each in entries))
                async with router.watch() as late:
                    for watcher in (early, late):
                        await Reader(watcher, backend.patience_s).until_holds(*entries)
            assert await content_of(router) == {each.key: each for each in entries}
            await router.close()

        backend.run(body())

    def test_a_namespace_is_watched_alone(self, backend: RegistryBackend) -> None:
        mine, longer, other = remote(1), remote(1, namespace="ns2"), remote(2, namespace="other")

        async def body() -> list[object]:
            router = backend.registry()
            await plant_entry(backend, longer)
            async with router.watch("ns") as watcher:
                reader = Reader(watcher, backend.patience_s)
                await reader.until_holds()
                await plant_entry(backend, other)
                await plant_entry(backend, mine)
                await reader.until_holds(mine)
            assert await router.entries("ns") == [mine]
            assert await content_of(router) == {each.key: each for each in (mine, longer, other)}
            await router.close()
            return list(reader.seen)

        assert backend.run(body()) == [Connected(), Joined(mine)]

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
            encode_entry(msgspec.structs.replace(remote(1), block_size=0)),
            encode_entry(msgspec.structs.replace(remote(1), epochs={})),
            encode_entry(msgspec.structs.replace(remote(1), epochs={-1: 1})),
            encode_entry(remote(1)).replace(b'"epochs":{"0":1}', b'"epochs":{"0":18446744073709551616}'),
        ],
        ids=[
            *("empty", "cut", "fields missing", "no text", "nested", "of another key", "large", "wrong type"),
            *("block size 0", "no ranks", "negative rank", "epoch of 65 bits"),
        ],
    )
    def test_a_malformed_entry_is_left_out_and_logged_once(
        self, backend: RegistryBackend, payload: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)

        async def body() -> list[object]:
            router = backend.registry()
            async with router.watch() as watcher:
                reader = Reader(watcher, backend.patience_s)
                await reader.until_holds()
                await plant_entry(backend, remote(1))
                await reader.until_holds(remote(1))
                await backend.plant(remote(1).key, payload)
                await reader.until_holds()
                await plant_entry(backend, remote(3))  # what comes after it is reported as ever
                await reader.until_holds(remote(3))
                logged = [record for record in caplog.records if remote(1).key in record.getMessage()]
                assert len(logged) == 1
                assert await router.entries() == [remote(3)]
                await plant_entry(backend, remote(1, 2))
                await reader.until_holds(remote(1, 2), remote(3))
            await router.close()
            return list(reader.seen)

        assert backend.run(body()) == [
            Connected(),
            Joined(remote(1)),
            Left(remote(1)),
            Joined(remote(3)),
            Joined(remote(1, 2)),
        ]

    @pytest.mark.parametrize(
        "odd",
        [remote(1, namespace="n.s"), msgspec.structs.replace(remote(1), component="back end"), remote(2**64)],
        ids=["namespace", "component", "worker id"],
    )
    def test_an_entry_that_no_worker_can_have_written_is_left_out(
        self, backend: RegistryBackend, odd: Entry, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its key fits it, and no request could be sent there; see ``oddity`` of the registry."""
        caplog.set_level(logging.WARNING)

        async def body() -> list[object]:
            router = backend.registry()
            await plant_entry(backend, odd)
            async with router.watch() as watcher:
                reader = Reader(watcher, backend.patience_s)
                await reader.until_holds()
                await plant_entry(backend, remote(3))
                await reader.until_holds(remote(3))
            assert await router.entries() == [remote(3)]
            await router.close()
            return list(reader.seen)

        assert backend.run(body()) == [Connected(), Joined(remote(3))]
        assert odd.key in caplog.text

    def test_nothing_runs_any_more_after_close(self, backend: RegistryBackend) -> None:
        nothing_runs_after_close(backend)

    def test_closing_a_watcher_ends_the_iteration_of_whoever_waits(self, backend: RegistryBackend) -> None:
        async def body() -> list[object]:
            router = backend.registry()
            watcher = router.watch()
            connected = asyncio.Event()

            async def read() -> list[object]:
                changes: list[object] = []
                async for change in watcher:
                    changes.append(change)
                    connected.set()
                return changes

            reading = [asyncio.create_task(read())]
            await connected.wait()
            reading.append(asyncio.create_task(read()))
            await asyncio.sleep(0)
            await watcher.close()
            async with asyncio.timeout(backend.patience_s):
                read_by_each = await asyncio.gather(*reading)
            assert await read() == []
            await router.close()
            return list(read_by_each)

        assert backend.run(body()) == [[Connected()], []]

    def test_a_registry_may_be_used_again_after_close(self, backend: RegistryBackend) -> None:
        async def body() -> list[Entry]:
            registry = backend.registry()
            await registry.join(ENTRY)
            await registry.close()
            await registry.join(ENTRY)
            entries = await registry.entries()
            await registry.close()
            return list(entries)

        assert backend.run(body()) == [ENTRY]
