"""Several routers on a real nats-server: one load, one view; and one that is started anew under load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.subscriber import SubscriberOptions
from vswa_plugin.following.view import ViewOptions
from vswa_plugin.registry import Entry
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.router.replicas.exchange import Replicas
from vswa_plugin.router.replicas.load import SharedBook
from vswa_plugin.router.replicas.messages import LOAD_VERSION
from vswa_plugin.selection import Load
from vswa_plugin.testing.streams import LAYOUT, Publishing, running
from vswa_plugin.wire import control
from vswa_plugin.wire.events import MAX_MESSAGE_BYTES, Rank, Source
from vswa_plugin.wire.subjects import subject
from vswa_plugin.wire.transport import Transport

INTERVAL_S = 0.2
A, B = Rank(1), Rank(2)


class Replica:
    """What a router keeps: the fleet's view and the shared load."""

    def __init__(self, brokers: Brokers, namespace: str, folder: Path) -> None:
        self.transport = Transport(brokers.nats_server)
        options = SubscriberOptions(view=ViewOptions(heartbeat_s=0.1))
        registry = FileRegistry(folder)
        self.fleet = Fleet(self.transport, registry, namespace=namespace, options=options)
        self.replicas = Replicas(self.transport, namespace, interval_s=INTERVAL_S)
        self.book: SharedBook = self.replicas.load.book("m", 32)

    async def start(self) -> None:
        await self.fleet.start()
        await self.replicas.start()

    async def stop(self) -> None:
        await self.replicas.stop()
        await self.fleet.stop()

    async def crash(self) -> None:
        """As SIGKILL would: nothing more is said."""
        for task in self.replicas._tasks:
            task.cancel()
        self.replicas._tasks.clear()
        await self.fleet.stop()

    def knows(self, publishing: Publishing) -> bool:
        """At the same event as the publisher, and holding exactly what it holds."""
        rank = publishing.source.rank
        view = self.fleet.subscriber.view(rank)
        if view is None or view.layout is None or view.reader.stale or not view.scored(now()):
            return False
        if view.reader.next_event_id != publishing.publisher.ledger.next_event_id:
            return False
        held = {group: set(tiers) for group, tiers in self.fleet.index.contents(rank).items()}
        assert held == publishing.residency.resident(), "at the same event, yet not the same"
        return True


def now() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def replicas(
    brokers: Brokers, namespace: str, folder: Path, count: int
) -> AsyncIterator[list[Replica]]:
    made = [Replica(brokers, namespace, folder) for _ in range(count)]
    try:
        for each in made:
            await each.start()
        await eventually(
            lambda: all(len(each.replicas.load.others) == count - 1 for each in made), "all have met"
        )
        yield made
    finally:
        for each in made:
            await each.stop()


def test_routers_share_each_step_of_a_request(run: Run[Any], brokers: Brokers, tmp_path: Path) -> None:
    async def body() -> None:
        async with replicas(brokers, "shared", tmp_path, 3) as (first, *others):

            async def all_have(expected: Load) -> None:
                await eventually(
                    lambda: all(each.book.load(A) == expected for each in (first, *others)), f"{expected}"
                )

            first.book.add(1, A, (11, 12, 13), 100, 68, cached_blocks=1)
            await all_have(Load(3, 68, 1))
            first.book.first_token(1)
            await all_have(Load(3, 0, 1))
            first.book.output(1, 33)
            await all_have(Load(4, 0, 1))
            others[0].book.add(1, A, (11, 12, 99), 100, 100)
            await all_have(Load(5, 100, 2))
            first.book.free(1)
            others[0].book.free(1)
            await all_have(Load())

    run(body())


def test_a_router_that_crashes_ages_out_and_one_that_stops_is_gone_at_once(
    run: Run[Any], brokers: Brokers, tmp_path: Path
) -> None:
    async def body() -> tuple[float, float]:
        async with replicas(brokers, "ages", tmp_path, 3) as (stays, crashes, stops):
            crashes.book.add(1, A, (1, 2), 64, 64)
            stops.book.add(1, B, (1, 2), 64, 64)
            both = Load(2, 64, 1)
            await eventually(lambda: stays.book.load(A) == both == stays.book.load(B), "it knows both")
            began = now()
            await stops.stop()
            await eventually(lambda: stays.book.load(B) == Load(), "goodbye")
            stopped = now() - began
            began = now()
            await crashes.crash()
            await eventually(lambda: stays.book.load(A) == Load(), "it has aged out")
            return stopped, now() - began

    stopped, crashed = run(body())

    assert stopped < 2 * INTERVAL_S
    assert 2 * INTERVAL_S < crashed < 8 * INTERVAL_S


def test_a_router_started_anew_under_load_becomes_right(
    run: Run[Any], brokers: Brokers, tmp_path: Path
) -> None:
    namespace = "anew"
    workers = [Publishing(brokers.nats_server, Source(namespace, "b", number)) for number in (1, 2)]

    async def keep_working() -> None:
        while True:
            for each in workers:
                each.work(20)
            await asyncio.sleep(0.01)

    async def body() -> tuple[Load, int]:
        registries = [FileRegistry(tmp_path) for _ in workers]
        async with running(*workers):
            for registry, each in zip(registries, workers, strict=True):
                await registry.join(entry_of(each))
                each.work(300)
            working = asyncio.create_task(keep_working())
            try:
                async with replicas(brokers, namespace, tmp_path, 1) as (stays,):
                    for key in range(200):
                        stays.book.add(key, A, tuple(range(key, key + 50)), 1_600, 1_600)
                    anew = Replica(brokers, namespace, tmp_path)
                    await anew.start()
                    readers = anew.fleet.subscriber.views
                    right: set[int] = set()

                    def all_right() -> bool:
                        right.update(each.source.worker_id for each in workers if anew.knows(each))
                        return len(right) == 2 and anew.book.load(A) == stays.book.load(A)

                    await eventually(all_right, "it is right")
                    load = anew.book.load(A)
                    snapshots = sum(v.reader.stats.snapshots for v in readers())
                    await anew.stop()
                    return load, snapshots
            finally:
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
                for registry in registries:
                    await registry.close()

    load, snapshots = run(body())

    assert load == Load(249, 320_000, 200)
    assert snapshots >= 2


def entry_of(publishing: Publishing) -> Entry:
    return Entry(
        namespace=publishing.source.namespace,
        component=publishing.source.component,
        worker_id=publishing.source.worker_id,
        mode="agg",
        engine="none",
        served_model_name="m",
        model_path="/models/m",
        context_length=1_024,
        block_size=32,
        rule=LAYOUT.rule,
        hash_scheme=LAYOUT.hash_scheme,
        groups=LAYOUT.groups,
        epochs={0: publishing.publisher.ledger.epoch},
        total_kv_blocks=100,
    )


MALFORMED = {
    "empty": b"",
    "no request": msgspec.msgpack.encode(["snapshots", 1]),
    "negative": msgspec.msgpack.encode(["replay", 1, -1]),
    "later version": msgspec.msgpack.encode(["snapshot", 1, 2]),
    "deep": b"\x91" * 1_000,
    "oversized": msgspec.msgpack.encode(["snapshot", 1, 1, "x" * 2_000]),
    "far oversized": msgspec.msgpack.encode(["snapshot", 1, 1, "x" * 900_000]),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_control_subject_refuses_what_it_cannot_read_and_goes_on(
    run: Run[Any], brokers: Brokers, kind: str
) -> None:
    async def body() -> tuple[object, object]:
        worker = Publishing(brokers.nats_server, Source("control", "b", 1))
        asking = Transport(brokers.nats_server)
        async with running(worker):
            await asking.connect()
            to_subject = subject(worker.source, "control")
            refused = await asking.request(to_subject, MALFORMED[kind], 5)
            request = control.SnapshotRequest(worker.publisher.ledger.epoch)
            fine = await asking.request(to_subject, control.encode(request), 5)
            await asking.close()
        return control.decode_reply(refused), control.decode_reply(fine)

    refused, fine = run(body())

    assert isinstance(refused, control.Refused)
    expected = "a request of wire version 1" if kind == "later version" else "a control message"
    assert f"expected {expected}, got" in refused.reason
    assert isinstance(fine, control.SnapshotHead)


def test_the_load_subject_takes_no_harm_from_what_it_cannot_read(
    run: Run[Any], brokers: Brokers, tmp_path: Path
) -> None:
    garbage = [*MALFORMED.values(), msgspec.msgpack.encode([LOAD_VERSION + 1, 1, []])]

    async def body() -> Any:
        async with replicas(brokers, "garbage", tmp_path, 2) as (first, second):
            for payload in garbage:
                await first.transport.publish("vswa.v1.garbage.routers.77.load", payload)
            first.book.add(1, A, (1, 2), 64, 64)
            await eventually(lambda: second.book.load(A) == Load(2, 64, 1), "it goes on")
            return second.replicas.load.stats

    stats = run(body())

    assert (stats.malformed, stats.foreign_version) == (len(MALFORMED), 1)
    assert max(map(len, garbage)) < MAX_MESSAGE_BYTES
