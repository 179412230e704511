"""What a nats-server with accounts keeps workers and routers from saying, and what it cannot."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

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

VICTIM, OTHER = Source("n", "c", 1), Source("n", "c", 2)
#: Far above any wall clock in nanoseconds.
FORGED_EPOCH = 2**63
FORGED = encode(Batch(1, FORGED_EPOCH, 0, 1))
#: All workers share one account, which may publish on every worker's subjects.
SHARED = "vswa.v1.*.*.*.*.events"
#: An account that may publish as worker 2 only.
OWN = "vswa.v1.n.c.2.*.events"


def config(port: int, worker_publishes: str) -> str:
    """Accounts ``first`` (worker 1), ``second`` (worker 2) and ``router``; nobody else comes in."""

    def worker(name: str, publishes: str) -> str:
        hears = '["vswa.v1.*.*.*.*.control", "vswa.v1.*.*.*.*.events"]'
        may = f'publish: ["{publishes}"], subscribe: {hears}, allow_responses: true'
        return f"{{user: {name}, password: secret, permissions: {{{may}}}}}"

    may = 'publish: ["vswa.v1.*.*.*.*.control"], subscribe: ["vswa.v1.*.*.*.*.events", "_INBOX.>"]'
    router = f"{{user: router, password: secret, permissions: {{{may}}}}}"
    users = ", ".join([worker("first", SHARED), worker("second", worker_publishes), router])
    return f"listen: 127.0.0.1:{port}\nauthorization {{ users: [{users}] }}\n"


@asynccontextmanager
async def broker(folder: Path, worker_publishes: str = SHARED) -> AsyncIterator[Callable[[str], str]]:
    """A nats-server; its address for whoever logs in with a name."""
    port = free_port()
    file = folder / "nats.conf"
    file.write_text(config(port, worker_publishes))
    command = [nats_server_binary(), "-c", str(file)]
    server = await Child.start("nats-server", command, folder)
    try:
        await server.until(lambda: _listens(port), "listening", 10)
        yield lambda name: f"nats://{name}:secret@127.0.0.1:{port}"
    finally:
        await server.stop()


async def forge(address: str) -> None:
    """Publish a batch of a higher epoch as the victim, then one as worker 2, which comes after it."""
    transport = Transport(address)
    await transport.connect(3)
    await transport.publish(subject(VICTIM, "events"), FORGED)
    await transport.publish(subject(OTHER, "events"), encode(Batch(1, 1, 0, 1)))
    await transport.flush()
    await transport.close()


async def heard_after_forging(folder: Path, forger: str, worker_publishes: str) -> set[str]:
    """Subjects on which a router hears something, when ``forger`` has spoken as the victim."""
    heard: set[str] = set()

    async def take(event_subject: str, _: bytes) -> None:
        heard.add(event_subject)

    async with broker(folder, worker_publishes) as address:
        router, after = Transport(address("router")), Transport(address("first"))
        for each in (router, after):
            await each.connect(3)
        await router.subscribe(events_of("n"), take)
        await router.flush()
        await forge(address(forger))
        await after.publish(subject(Source("n", "c", 3), "events"), encode(Batch(1, 1, 0, 1)))
        await eventually(lambda: subject(Source("n", "c", 3), "events") in heard, "the last one is heard")
        for each in (router, after):
            await each.close()
    return heard - {subject(Source("n", "c", 3), "events")}


def test_a_routers_account_publishes_no_events(run: Run[Any], tmp_path: Path) -> None:
    assert set() == run(heard_after_forging(tmp_path, "router", SHARED))


def test_a_worker_with_an_account_of_its_own_publishes_its_own_events_only(
    run: Run[Any], tmp_path: Path
) -> None:
    assert {subject(OTHER, "events")} == run(heard_after_forging(tmp_path, "second", OWN))


def test_who_has_no_account_does_not_come_in(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> None:
        async with broker(tmp_path) as address:
            anonymous = address("nobody").replace("nobody:secret@", "")
            await Transport(anonymous).connect(1)

    with pytest.raises(ConnectError, match=r"(?i)authorization"):
        run(body())


async def goes_on_after_forging(folder: Path, which: str) -> bool:
    """Whether the victim publishes on (``worker``), or its view is live and exact (``view``)."""
    async with broker(folder) as address:
        worker = Publishing(address("first"), VICTIM)
        reader = Following(address("router"), "n")
        async with running(reader, worker):
            reader.subscriber.announce(VICTIM, worker.publisher.ledger.epoch)
            reader.subscriber.announce(OTHER, 1)
            worker.work(3)
            await reader.catches_up(worker)
            beats = worker.publisher.stats.heartbeats
            await forge(address("second"))
            other = reader.subscriber.view(OTHER.rank)
            assert other is not None
            await eventually(lambda: other.reader.stats.heartbeats > 0, "the forgery is heard")
            assert worker.task is not None
            if which == "worker":
                task = worker.task
                await eventually(
                    lambda: task.done() or worker.publisher.stats.heartbeats > beats + 3, "it has heard too"
                )
                return not task.done()
            try:
                await eventually(lambda: reader.equals(worker), "the view is the worker's", 1.5)
            except AssertionError:
                return False
            return True


@pytest.mark.parametrize("which", ["worker", "view"])
def test_a_forged_epoch_on_another_workers_subject_ends_neither_that_worker_nor_its_view(
    run: Run[Any], tmp_path: Path, which: str
) -> None:
    """All workers share one account here, so that the broker lets it pass."""
    assert run(goes_on_after_forging(tmp_path, which)), which
