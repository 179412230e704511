"""The numbered guarantees of docs/protocol.md, each with its fault injected, over a real nats-server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually
from vswa_plugin.engine.contract import EventsLost
from vswa_plugin.launch.brokers import start_nats
from vswa_plugin.publishing.publisher import Superseded
from vswa_plugin.testing.faults import FAULTS, whole
from vswa_plugin.testing.streams import Following, Publishing, one_of_each, running
from vswa_plugin.wire.events import Source, decode

Names = Iterator[str]


@pytest.fixture(scope="module")
def names() -> Names:
    return (f"faults{number}" for number in itertools.count())


@pytest.mark.parametrize("fault", FAULTS)
def test_1_and_6_whatever_the_network_does_to_batches_the_view_ends_exact(
    run: Run[Any], brokers: Brokers, names: Names, fault: str
) -> None:
    async def body() -> None:
        namespace = next(names)
        first, second = (Publishing(brokers.nats_server, Source(namespace, "b", n)) for n in (1, 2))
        reader = Following(brokers.nats_server, namespace)
        async with running(reader, first, second):
            first.fault, second.fault = FAULTS[fault](1), FAULTS[fault](2)
            for _ in range(30):
                first.work(2)
                second.work(1)
                await asyncio.sleep(0.005)
            await first.settled()
            first.fault = second.fault = whole
            await reader.catches_up(first, second)
            assert len(reader.index.held[first.source.rank][2]) > 100

    run(body())


def test_1_a_gap_makes_the_view_stale_at_once(run: Run[Any], brokers: Brokers, names: Names) -> None:
    async def body() -> None:
        async with one_of_each(brokers.nats_server, next(names)) as (worker, reader):
            await reader.catches_up(worker)
            stale: list[str] = []
            carry_out = reader.subscriber._became_stale
            reader.subscriber._became_stale = lambda view, reason: (  # type: ignore[method-assign]
                stale.append(reason),
                carry_out(view, reason),
            )[1]
            expected = worker.publisher.ledger.next_event_id
            worker.fault = lambda payload: []
            worker.work()
            await worker.settled()
            worker.fault = whole
            worker.work()
            await reader.catches_up(worker)
            assert stale == [f"expected event {expected}, got {expected + 3}"]

    run(body())


def test_2_a_replay_that_is_too_old_becomes_a_snapshot(run: Run[Any], brokers: Brokers, names: Names) -> None:
    async def body() -> None:
        async with one_of_each(brokers.nats_server, next(names)) as (worker, reader):
            worker.publisher.ledger.history.ring._max_batches = 3
            await reader.catches_up(worker)
            worker.fault = lambda payload: []
            for _ in range(10):
                worker.work()
                await worker.settled()
                await asyncio.sleep(0)
            await eventually(
                lambda: worker.publisher.ledger.stats.batches >= 8, "more batches than the ring holds"
            )
            worker.fault = whole
            await reader.catches_up(worker)
            view = reader.subscriber.view(worker.source.rank)
            assert view is not None
            assert view.reader.stats.snapshots == 1

    run(body())


def test_2_a_publisher_that_does_not_answer_is_asked_again_with_pauses_and_no_storm(
    run: Run[Any], brokers: Brokers, names: Names
) -> None:
    async def body() -> None:
        asked = []

        def deaf(payload: bytes) -> bytes:
            asked.append(payload)
            return b"\xc1"  # no MessagePack at all

        async with one_of_each(brokers.nats_server, next(names)) as (worker, reader):
            await reader.catches_up(worker)
            answer = worker.publisher.ledger.history.answer
            worker.publisher.ledger.history.answer = deaf  # type: ignore[method-assign]
            worker.fault = lambda payload: []
            worker.work()
            await worker.settled()
            worker.fault = whole
            worker.work(50)
            await eventually(lambda: len(asked) >= 3, "asked again")
            worker.publisher.ledger.history.answer = answer  # type: ignore[method-assign]
            await reader.catches_up(worker)
            assert len(asked) < 20, "one request at a time, pauses that double"

    run(body())


def test_3_loss_at_the_tail_shows_within_two_heartbeats(
    run: Run[Any], brokers: Brokers, names: Names
) -> None:
    async def body() -> None:
        async with one_of_each(brokers.nats_server, next(names), heartbeat_s=0.3) as (worker, reader):
            await reader.catches_up(worker)
            worker.fault = lambda payload: [payload] if not decode(payload).events else []
            worker.work()
            await worker.settled()
            before = worker.publisher.stats.heartbeats
            await reader.catches_up(worker)
            assert worker.publisher.stats.heartbeats - before <= 2

    run(body())


def test_4_a_dead_worker_scores_0_within_three_heartbeats_and_leaves_with_its_registration(
    run: Run[Any], brokers: Brokers, names: Names
) -> None:
    async def body() -> None:
        namespace = next(names)
        worker = Publishing(brokers.nats_server, Source(namespace, "b", 1), heartbeat_s=0.1)
        reader = Following(brokers.nats_server, namespace)
        rank = worker.source.rank
        async with running(reader):
            await worker.start()
            worker.work(3)
            await reader.catches_up(worker)
            reader.subscriber.announce(worker.source, worker.publisher.ledger.epoch)
            await worker.crash()
            began = asyncio.get_running_loop().time()
            await eventually(lambda: not reader.index.scored[rank], "scored 0")
            assert asyncio.get_running_loop().time() - began < 1.0
            assert reader.index.held[rank][2], "it stays routable, and its blocks are remembered"
            reader.subscriber.withdraw(rank)
            assert rank not in reader.index.held

    run(body())


def test_4_a_broker_that_restarts_costs_nobody_anything_for_good(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> None:
        nats, url = await start_nats(tmp_path)
        async with one_of_each(url, "ns") as (worker, reader):
            worker.work(5)
            await reader.catches_up(worker)
            nats.kill()
            await nats.wait()
            worker.work(20)
            await eventually(lambda: not reader.transport.connected, "the reader noticed")
            held = dict(reader.index.scored)
            again, _ = await start_nats(tmp_path, port=int(url.rsplit(":", 1)[1]))
            worker.work(5)
            await reader.catches_up(worker, timeout_s=25)
            assert held == {worker.source.rank: True}, "our own broker was away: nobody is silent"
        await again.stop()

    run(body())


def test_5_a_reader_that_is_slow_slows_no_publisher(run: Run[Any], brokers: Brokers, names: Names) -> None:
    async def body() -> None:
        async with one_of_each(brokers.nats_server, next(names), heartbeat_s=0.05) as (worker, reader):
            await reader.catches_up(worker)
            gate = asyncio.Event()

            async def held_up(event_subject: str, payload: bytes) -> None:
                await gate.wait()
                await on_message(event_subject, payload)

            slow = Following(brokers.nats_server, worker.source.namespace)
            on_message = slow.subscriber._on_message
            slow.subscriber._on_message = held_up  # type: ignore[method-assign]
            async with running(slow):
                for _ in range(200):
                    worker.work()
                    await asyncio.sleep(0)
                await reader.catches_up(worker)
                assert worker.publisher.stats.dropped_batches == 0
                gate.set()
                await slow.catches_up(worker)

    run(body())


def test_6_a_late_joiner_takes_a_snapshot_while_events_go_on(
    run: Run[Any], brokers: Brokers, names: Names
) -> None:
    async def body() -> None:
        namespace = next(names)
        # Answers of 1 KiB: the snapshot comes in many parts, between which events arrive.
        worker = Publishing(brokers.nats_server, Source(namespace, "b", 1), batch_bytes=1024)
        readers = [Following(brokers.nats_server, namespace) for _ in range(4)]
        async with running(worker):
            worker.work(200)
            await worker.settled()
            stop = asyncio.Event()

            async def go_on() -> None:
                while not stop.is_set():
                    worker.work()
                    await asyncio.sleep(0.001)

            busy = asyncio.create_task(go_on())
            async with running(*readers):
                await asyncio.sleep(0.5)
                stop.set()
                await busy
                for reader in readers:
                    await reader.catches_up(worker)
            snapshots = worker.publisher.ledger.history.snapshots_made
            assert 1 <= snapshots <= 4
            assert all(each.subscriber.stats.requests > 10 for each in readers)

    run(body())


def test_6_a_publisher_that_restarts_begins_from_empty(run: Run[Any], brokers: Brokers, names: Names) -> None:
    async def body() -> None:
        namespace = next(names)
        source = Source(namespace, "b", 1)
        first, second = (Publishing(brokers.nats_server, source) for _ in range(2))
        reader = Following(brokers.nats_server, namespace)
        async with running(reader):
            await first.start()
            first.work(10)
            await reader.catches_up(first)
            await first.crash()
            async with running(second):
                second.work(2)
                await reader.catches_up(second)
                assert len(reader.index.held[source.rank][2]) == 8

    run(body())


def test_two_live_publishers_of_one_rank_the_higher_epoch_wins_and_the_loser_says_so(
    run: Run[Any], brokers: Brokers, names: Names
) -> None:
    async def body() -> None:
        async with one_of_each(brokers.nats_server, next(names)) as (loser, reader):
            loser.work(3)
            await reader.catches_up(loser)
            winner = Publishing(brokers.nats_server, loser.source)
            async with running(winner):
                winner.work(1)
                assert loser.task is not None
                with pytest.raises(Superseded, match="is a worker running twice with the same id"):
                    await asyncio.wait_for(asyncio.shield(loser.task), 5)
                await reader.catches_up(winner)
                assert winner.task is not None
                assert not winner.task.done()

    run(body())


def test_7_an_engine_that_lost_events_costs_its_residency_and_nothing_else(
    run: Run[Any], brokers: Brokers, names: Names
) -> None:
    async def body() -> None:
        async with one_of_each(brokers.nats_server, next(names)) as (worker, reader):
            worker.work(5)
            await reader.catches_up(worker)
            epoch = worker.publisher.ledger.epoch
            worker.offer(EventsLost(7, 12))
            worker.work(1)
            await reader.catches_up(worker)
            assert worker.publisher.ledger.epoch > epoch
            assert worker.publisher.ledger.stats.restarts == 1
            assert len(reader.index.held[worker.source.rank][2]) == 4

    run(body())
