"""Streams in memory: the broker refuses and orders as a real one does, faults are seeded, views end exact."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Coroutine
from typing import Any

import pytest

from vswa_plugin.errors import ConnectError, ProtocolError
from vswa_plugin.testing import faults
from vswa_plugin.testing.faults import FAULTS
from vswa_plugin.testing.memory import MemoryBroker, MemoryTransport
from vswa_plugin.testing.streams import Following, Publishing, eventually, nats_server, one_of_each, running
from vswa_plugin.wire.events import Source, decode
from vswa_plugin.wire.transport import Transport

MESSAGES = [bytes([0x90, n]) * 8 for n in range(200)]


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


async def opened(broker: MemoryBroker, **options: Any) -> MemoryTransport:
    transport = broker.transport(**options)
    await transport.connect()
    return transport


def through(fault: faults.Fault) -> list[bytes]:
    return [arrived for payload in MESSAGES for arrived in fault(payload)]


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
def test_a_seed_says_what_a_fault_strikes(name: str) -> None:
    once, again, other = (through(FAULTS[name](seed)) for seed in (1, 1, 2))

    assert once == again
    assert once != other
    assert once != MESSAGES


def test_lost_messages_never_arrive_and_the_others_do_in_order() -> None:
    arrived = through(faults.lose(1))

    assert [each for each in MESSAGES if each in arrived] == arrived
    assert 100 < len(arrived) < 180


def test_repeated_messages_arrive_twice_in_a_row() -> None:
    arrived = through(faults.repeat(1))

    assert [each for each, _ in itertools.groupby(arrived)] == MESSAGES
    assert {1, 2} == {arrived.count(each) for each in MESSAGES}


@pytest.mark.parametrize(("fault", "by"), [(faults.reorder(1), 1), (faults.late(1, by=5), 5)])
def test_late_messages_arrive_after_those_that_follow_them(fault: faults.Fault, by: int) -> None:
    arrived = through(fault)
    places = [arrived.index(each) - place for place, each in enumerate(MESSAGES) if each in arrived]

    assert len(MESSAGES) - by <= len(arrived) == len(set(arrived))
    assert by >= max(places) >= 1


def test_cut_messages_are_beginnings() -> None:
    for whole, arrived in zip(MESSAGES, through(faults.cut(1)), strict=True):
        assert whole.startswith(arrived)


def test_corrupted_messages_are_no_messages() -> None:
    arrived = through(faults.corrupt(1))
    corrupted = [each for each, whole in zip(arrived, MESSAGES, strict=True) if each != whole]

    assert list(map(len, MESSAGES)) == list(map(len, arrived))
    for each in corrupted:
        with pytest.raises(ProtocolError):
            decode(each)


# -- the broker ------------------------------------------------------------------------------------


def test_a_connection_in_memory_has_all_that_one_to_nats_has() -> None:
    methods = {name for name in vars(Transport) if not name.startswith("_")}

    assert methods == {name for name in vars(MemoryTransport) if not name.startswith("_")}


def test_messages_reach_the_matching_subscriptions_before_publish_returns() -> None:
    async def body() -> None:
        broker, seen = MemoryBroker(), []
        sender, receiver = await opened(broker, echo=False), await opened(broker)

        async def take(subject: str, payload: bytes) -> None:
            seen.append((subject, payload))

        for transport in (sender, receiver):
            await transport.subscribe("a.*.c", take)
        for subject in ("a.b.c", "a.b", "a.b.c.d", "x.b.c"):
            await sender.publish(subject, b"1")
        assert [("a.b.c", b"1")] == seen
        await receiver.close()
        await sender.publish("a.b.c", b"2")
        assert 1 == len(seen)

    run(body())


def test_a_handler_gets_one_message_at_a_time_in_order() -> None:
    async def body() -> None:
        broker, seen = MemoryBroker(), []
        transport = await opened(broker)

        async def take(subject: str, payload: bytes) -> None:
            seen.append(b"begin " + payload)
            if payload == b"1":
                await transport.publish("a", b"2")
                await asyncio.sleep(0)
            seen.append(b"end " + payload)

        await transport.subscribe("a", take)
        await asyncio.gather(transport.publish("a", b"1"), transport.publish("a", b"3"))
        assert [b"begin 1", b"end 1", b"begin 2", b"end 2", b"begin 3", b"end 3"] == seen

    run(body())


def test_a_handler_that_fails_costs_neither_the_sender_nor_later_messages(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def body() -> None:
        transport, seen = await opened(MemoryBroker()), []

        async def fail(subject: str, payload: bytes) -> None:
            seen.append(payload)
            raise RuntimeError("broken")

        await transport.subscribe("a", fail)
        for payload in (b"1", b"2"):
            await transport.publish("a", payload)
        assert [b"1", b"2"] == seen

    run(body())

    assert {"a handler of a failed"} == {
        each.getMessage() for each in caplog.records if each.levelno == logging.ERROR
    }


def test_requests_are_answered_by_whoever_serves_the_subject() -> None:
    async def body() -> None:
        broker = MemoryBroker(max_payload=8)
        client, server = await opened(broker), await opened(broker)
        await server.serve("a", lambda payload: payload * 2)
        assert b"xyxy" == await client.request("a", b"xy", 1.0)
        with pytest.raises(ConnectError, match="it has 10 bytes"):
            await client.request("a", b"x" * 5, 1.0)
        await server.close()
        with pytest.raises(ConnectError, match="nobody serves it"):
            await client.request("a", b"xy", 1.0)

    run(body())


def test_what_a_real_broker_refuses_is_refused() -> None:
    async def body() -> None:
        broker = MemoryBroker(max_payload=8)
        transport = broker.transport()
        with pytest.raises(ConnectError, match="not open"):
            await transport.publish("a", b"1")
        await transport.connect()
        with pytest.raises(ConnectError, match="at most 8 bytes in a message, got 9"):
            await transport.publish("a", b"123456789")
        broker.running = False
        assert not transport.connected
        for refused in (transport.publish("a", b"1"), transport.flush(), broker.transport().connect()):
            with pytest.raises(ConnectError):
                await refused

    run(body())


# -- publisher and follower ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAULTS)
def test_whatever_becomes_of_messages_the_view_ends_exact(name: str, seed: int) -> None:
    async def body() -> None:
        broker = MemoryBroker()
        workers = [Publishing(broker, Source("n", "b", number)) for number in (1, 2)]
        reader = Following(broker, "n")
        async with running(reader, *workers):
            for worker in workers:
                worker.fault = FAULTS[name](seed)
                for _ in range(10):
                    worker.work(2)
                    await worker.settled()
                worker.fault = faults.whole
            await reader.catches_up(*workers)
            assert 40 < len(reader.index.held[workers[0].source.rank][2])

    run(body())


def test_a_view_is_not_equal_while_it_is_not_scored_or_messages_are_lost() -> None:
    async def body() -> None:
        async with one_of_each(MemoryBroker(), "n", heartbeat_s=60.0) as (worker, reader):
            await reader.catches_up(worker)
            reader.index.set_scored(worker.source.rank, False)
            assert not reader.equals(worker)
            reader.index.set_scored(worker.source.rank, True)
            worker.fault = lambda payload: []
            worker.work()
            await worker.settled()
            assert not reader.equals(worker)

    run(body())


def test_a_broker_that_is_away_for_a_while_is_caught_up_with() -> None:
    async def body() -> None:
        broker = MemoryBroker()
        async with one_of_each(broker, "n") as (worker, reader):
            await reader.catches_up(worker)
            broker.running = False
            worker.work(5)
            await eventually(lambda: bool(worker.publisher._queue), "batches wait for the broker")
            assert not reader.equals(worker)
            broker.running = True
            await reader.catches_up(worker)

    run(body())


def test_the_same_goes_over_a_real_server() -> None:
    async def body() -> None:
        async with nats_server() as url, one_of_each(url, "n") as (worker, reader):
            worker.fault = faults.lose(1)
            worker.work(20)
            await worker.settled()
            worker.fault = faults.whole
            await reader.catches_up(worker)

    run(body())


def test_what_does_not_come_true_is_named() -> None:
    with pytest.raises(AssertionError, match="not within 0 s: pigs fly"):
        run(eventually(lambda: False, "pigs fly", 0))
