"""The logins of docs/nats-accounts.conf at a real nats-server: each program may say only what is its own."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nkeys
import pytest

from tests.conftest import Run
from tests.e2e_helpers import eventually
from vswa_plugin.errors import ConnectError
from vswa_plugin.launch.brokers import _listens, nats_server_binary
from vswa_plugin.launch.processes import Child, free_port
from vswa_plugin.testing.streams import Following, Publishing, running
from vswa_plugin.wire.events import Batch, Source, encode
from vswa_plugin.wire.subjects import events_of, subject
from vswa_plugin.wire.transport import Transport

EXAMPLE = Path(__file__).parents[2] / "docs/nats-accounts.conf"
ROLES = ("WORKER_1", "WORKER_2", "RELAY", "ROUTER", "OBSERVER")
WORKERS = {1: "WORKER_1", 2: "WORKER_2", 0xA: "RELAY", 0xB: "RELAY"}
SEEDS = {role: bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)).decode() for role in ROLES}
LOAD = "vswa.v1.prod.routers.{}.load"


def source(worker_id: int) -> Source:
    return Source("prod", "backend", worker_id)


def login(role: str) -> dict[str, str]:
    return {"NATS_AUTH_NKEY": SEEDS[role]}


def example() -> str:
    """The file of the documentation, with keys of which we have the private halves."""
    text = EXAMPLE.read_text()
    for role in ROLES:
        public = bytes(nkeys.from_seed(SEEDS[role].encode()).public_key).decode()
        assert 1 == text.count(f"PUBLIC_KEY_OF_{role},")
        text = text.replace(f"PUBLIC_KEY_OF_{role},", f"{public},")
    return text


@asynccontextmanager
async def server(folder: Path) -> AsyncIterator[str]:
    """The URL of a nats-server with the example."""
    port = free_port()
    file = folder / "nats.conf"
    file.write_text(f"listen: 127.0.0.1:{port}\n{example()}")
    command = [nats_server_binary(), "-c", str(file)]
    process = await Child.start("nats-permissions", command, folder)
    try:
        await process.until(lambda: _listens(port), "listening", 10)
        yield f"nats://127.0.0.1:{port}"
    finally:
        await process.stop()


@asynccontextmanager
async def connected(url: str, role: str) -> AsyncIterator[Transport]:
    transport = Transport(url, environ=login(role))
    await transport.connect(5)
    try:
        yield transport
    finally:
        await transport.close()


def test_workers_and_a_relay_are_followed_and_repaired_with_these_logins(
    run: Run[Any], tmp_path: Path
) -> None:
    async def body() -> None:
        async with server(tmp_path) as url:
            workers = [Publishing(url, source(worker_id)) for worker_id in (1, 0xA, 0xB)]
            for each, role in zip(workers, ("WORKER_1", "RELAY", "RELAY"), strict=True):
                each.transport = Transport(url, echo=False, environ=login(role))
            readers = [Following(url, "prod") for _ in range(2)]
            for reader, role in zip(readers, ("ROUTER", "OBSERVER"), strict=True):
                reader.transport = Transport(url, environ=login(role))
                reader.subscriber._transport = reader.transport
            async with running(readers[0], *workers):
                for worker in workers:
                    worker.work(30)
                await readers[0].catches_up(*workers)
                async with running(readers[1]):  # which comes late, and needs a snapshot of each
                    await readers[1].catches_up(*workers)

    run(body())


@pytest.mark.parametrize("role", ROLES)
def test_each_login_publishes_the_events_of_its_own_workers_and_the_load_of_routers_only(
    run: Run[Any], tmp_path: Path, role: str
) -> None:
    async def body() -> set[str]:
        heard: set[str] = set()

        async def take(on_subject: str, _: bytes) -> None:
            heard.add(on_subject)

        async with server(tmp_path) as url, connected(url, "ROUTER") as router, connected(url, role) as login:
            await router.subscribe(events_of("prod"), take)
            await router.subscribe(LOAD.format("*"), take)
            await router.flush()
            for worker_id in WORKERS:
                await login.publish(subject(source(worker_id), "events"), encode(Batch(1, 1, 0, 1)))
            await login.publish(LOAD.format("7"), b"")
            await login.flush()
            async with connected(url, "ROUTER") as last:  # what it says comes after all of that
                await last.publish(LOAD.format("ff"), b"")
                await eventually(lambda: LOAD.format("ff") in heard, "the last one is heard")
        return heard - {LOAD.format("ff")}

    own = {subject(source(worker_id), "events") for worker_id, whose in WORKERS.items() if whose == role}
    assert own | ({LOAD.format("7")} if role == "ROUTER" else set()) == run(body())


@pytest.mark.parametrize("role", [role for role in ROLES if role != "WORKER_1"])
def test_no_other_login_answers_for_a_worker(run: Run[Any], tmp_path: Path, role: str) -> None:
    async def body() -> str:
        def answer(_: bytes) -> bytes:
            return b"forged"

        async with server(tmp_path) as url, connected(url, "ROUTER") as router, connected(url, role) as login:
            await login.serve(subject(source(1), "control"), answer)
            await login.flush()
            try:
                return (await router.request(subject(source(1), "control"), b"", 1.0)).decode()
            except ConnectError as error:
                return str(error)

    assert "no process serves this subject" in run(body())


def test_a_worker_hears_neither_the_events_of_another_nor_the_answers_to_a_router(
    run: Run[Any], tmp_path: Path
) -> None:
    async def body() -> list[str]:
        heard: list[str] = []

        async def take(on_subject: str, _: bytes) -> None:
            heard.append(on_subject)

        async with (
            server(tmp_path) as url,
            connected(url, "WORKER_1") as one,
            connected(url, "WORKER_2") as two,
        ):
            for what in (events_of("prod"), subject(source(2), "events"), "_INBOX.>", "vswa.>"):
                await one.subscribe(what, take)
            await one.subscribe(subject(source(1), "events"), take)
            await one.flush()
            await two.publish(subject(source(2), "events"), b"")
            await two.flush()
            async with connected(url, "WORKER_1") as last:
                await last.publish(subject(source(1), "events"), b"")
                await eventually(lambda: bool(heard), "its own subject is heard")
        return heard

    assert [subject(source(1), "events")] == run(body())


def test_the_example_is_about_subjects_that_there_are() -> None:
    """A subject that was renamed here would deny everything, or allow it."""
    allowed = set(re.findall(r'"([^"]+)"', EXAMPLE.read_text())) - {"_INBOX.>"}
    events = {subject(source(worker_id), "events").replace(".0.events", ".*.events") for worker_id in WORKERS}
    control = {each.replace(".events", ".control") for each in events}
    of_all = {events_of("prod"), events_of("prod").replace(".events", ".control"), LOAD.format("*")}

    assert events | control | of_all | {"prod", "backend"} == allowed
