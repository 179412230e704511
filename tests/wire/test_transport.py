"""Subjects, and a real nats-server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.launch.brokers import start_nats
from vswa_plugin.launch.processes import free_port
from vswa_plugin.wire.events import Source
from vswa_plugin.wire.subjects import check_name, events_of, source_of, subject
from vswa_plugin.wire.transport import Transport

SOURCE = Source("prod-1", "backend", 0x1D36A2091E114D49, 3)


def test_a_subject_says_who_publishes_and_leads_back_to_it() -> None:
    text = subject(SOURCE, "events")

    assert text == "vswa.v1.prod-1.backend.1d36a2091e114d49.3.events"
    assert source_of(text) == SOURCE


def test_wildcards_cover_all_or_one_namespace() -> None:
    assert events_of() == "vswa.v1.*.*.*.*.events"
    assert events_of("prod", "backend") == "vswa.v1.prod.backend.*.*.events"


@pytest.mark.parametrize("name", ["", "a.b", "a*", ">", "a b", "a/b", "ä"])
def test_a_name_that_would_change_a_subjects_meaning_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="namespace: expected letters, digits"):
        check_name("namespace", name)
    if name:
        with pytest.raises(ConfigError):
            events_of(name)


def test_a_foreign_subject_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a subject vswa\.v1\."):
        source_of("other.subject")


def test_messages_arrive_in_the_order_of_publishing(run: Run[Any], brokers: Brokers) -> None:
    async def body() -> list[bytes]:
        got: list[bytes] = []
        full = asyncio.Event()

        async def handler(_: str, payload: bytes) -> None:
            got.append(payload)
            if len(got) == 500:
                full.set()

        listener, talker = Transport(brokers.nats_server), Transport(brokers.nats_server)
        await listener.connect()
        await talker.connect()
        await listener.subscribe("vswa.v1.order.*.*.*.events", handler)
        await listener.flush()
        for number in range(500):
            await talker.publish("vswa.v1.order.b.1.0.events", str(number).encode())
        await asyncio.wait_for(full.wait(), 10)
        assert talker.max_payload >= 1 << 16
        await talker.close()
        await listener.close()
        return got

    assert run(body()) == [str(number).encode() for number in range(500)]


@pytest.mark.parametrize("closed", [False, True])
def test_a_subscription_and_an_answer_end_when_they_are_to(
    run: Run[Any], brokers: Brokers, closed: bool
) -> None:
    async def body() -> None:
        sender, receiver = Transport(brokers.nats_server), Transport(brokers.nats_server)
        await sender.connect()
        await receiver.connect()
        received: list[bytes] = []

        async def take(_: str, payload: bytes) -> None:
            received.append(payload)

        ending = [
            await receiver.subscribe("vswa.ends", take),
            await receiver.serve("vswa.ends.served", lambda payload: payload),
        ]
        await receiver.flush()
        assert b"?" == await sender.request("vswa.ends.served", b"?", 5)
        if closed:
            await receiver.close()
        for end in ending:
            await end()
        if not closed:
            await receiver.flush()
        await sender.publish("vswa.ends", b"late")
        with pytest.raises(ConnectError, match="no process serves this subject"):
            await sender.request("vswa.ends.served", b"?", 5)
        await receiver.close()
        await sender.close()
        assert [] == received

    run(body())


def test_a_server_that_is_not_there_is_named_with_the_setting(run: Run[Any]) -> None:
    port = free_port()
    began = time.monotonic()

    with pytest.raises(
        ConnectError, match=rf"expected a NATS server at nats://127.0.0.1:{port} .NATS_SERVER."
    ):
        run(Transport(f"nats://127.0.0.1:{port}").connect(timeout=0.5))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("servers", ["", " ", ","])
def test_no_server_at_all_is_refused(servers: str) -> None:
    with pytest.raises(ConfigError, match=rf"NATS_SERVER: expected .* got '{servers}'"):
        Transport(servers)


def test_a_connection_outlives_a_restart_of_the_server(run: Run[Any], tmp_path: Any) -> None:
    async def body() -> bytes:
        first, url = await start_nats(tmp_path)
        transport = Transport(url)
        await transport.connect()
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(_: str, payload: bytes) -> None:
            if not got.done():
                got.set_result(payload)

        await transport.subscribe("vswa.v1.back.b.1.0.events", handler)
        first.kill()
        await first.wait()
        second, _ = await start_nats(tmp_path, port=int(url.rsplit(":", 1)[1]))
        async with asyncio.timeout(20):
            while not got.done():
                if transport.connected:
                    await transport.publish("vswa.v1.back.b.1.0.events", b"again")
                await asyncio.sleep(0.05)
        await transport.close()
        await second.stop()
        return got.result()

    assert run(body()) == b"again"
