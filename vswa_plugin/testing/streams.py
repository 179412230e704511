"""Real publishers and subscribers with faults put between them, in memory or over a real nats-server.

async with one_of_each(MemoryBroker(), "namespace") as (worker, reader):
    worker.fault = faults.lose(seed=1)
    worker.work(20)
    await worker.settled()
    worker.fault = faults.whole
    await reader.catches_up(worker)          # whatever was lost, the view ends exact
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksRemoved, BlocksStored, EngineBlock, EngineEvent
from vswa_plugin.following.reader import ReaderOptions
from vswa_plugin.following.subscriber import Subscriber, SubscriberOptions
from vswa_plugin.following.view import ViewOptions
from vswa_plugin.publishing.publisher import Publisher, PublisherOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.testing.faults import Fault, whole
from vswa_plugin.testing.memory import MemoryBroker
from vswa_plugin.wire.events import Cleared, Event, Layout, Moved, Rank, Removed, Source, Stored
from vswa_plugin.wire.subjects import subject
from vswa_plugin.wire.transport import Transport

__all__ = [
    "DirectAdapter",
    "Following",
    "NaiveIndex",
    "Publishing",
    "eventually",
    "nats_server",
    "one_of_each",
    "running",
]

LAYOUT = CacheLayout(
    (CacheGroup(0, 64, 32), CacheGroup(1, 64, 32), CacheGroup(2, None, 32)), "trtllm_v2", "m"
)
#: The URL of a nats-server, or a broker in memory.
Where = str | MemoryBroker
POLL_S = 0.005


def transport_to(where: Where, *, echo: bool = True) -> Transport:
    """A connection, not open yet."""
    return Transport(where, echo=echo) if isinstance(where, str) else where.transport(echo=echo)


@asynccontextmanager
async def nats_server() -> AsyncIterator[str]:
    """A real nats-server of the extra ``embedded`` on a free port of 127.0.0.1; its URL."""
    from vswa_plugin.launch.brokers import start_nats

    with tempfile.TemporaryDirectory() as folder:
        process, url = await start_nats(Path(folder))
        try:
            yield url
        finally:
            await process.stop()


class NaiveIndex:
    """Sets per rank and group; what a window index must at least agree with."""

    def __init__(self) -> None:
        self.held: dict[Rank, dict[int, set[int]]] = {}
        self.scored: dict[Rank, bool] = {}

    def join(self, rank: Rank, layout: CacheLayout) -> None:
        self.held[rank] = {group.group_id: set() for group in layout.groups}

    def apply(self, rank: Rank, event: Event) -> None:
        held = self.held[rank]
        match event:
            case Stored():
                held[event.group_id].update(event.sequence_hashes)
            case Removed():
                held[event.group_id].difference_update(event.sequence_hashes)
            case Cleared():
                for group_id in held if event.group_id is None else [event.group_id]:
                    held[group_id].clear()
            case Layout() | Moved():
                pass

    def clear(self, rank: Rank) -> None:
        for blocks in self.held.get(rank, {}).values():
            blocks.clear()

    def drop(self, rank: Rank) -> None:
        self.held.pop(rank, None)
        self.scored.pop(rank, None)

    def set_scored(self, rank: Rank, scored: bool) -> None:
        self.scored[rank] = scored


class DirectAdapter:
    """Raw events that hold an engine event each: ``{"event": BlocksStored(...)}``."""

    def feed(self, raw: Mapping[str, Any]) -> list[EngineEvent]:
        return [raw["event"]]


class Publishing:
    """One rank: a real publisher on a connection of its own.

    :ivar fault: what becomes of each message from now on.
    :param options: of ``PublisherOptions``; heartbeats come every 0.1 s unless it says otherwise.
    """

    def __init__(self, where: Where, source: Source, **options: Any) -> None:
        self.source = source
        self.fault: Fault = whole
        self.residency = Residency(LAYOUT)
        self.transport = transport_to(where, echo=False)
        merged = {"heartbeat_s": 0.1, **options}
        self.publisher = Publisher(
            source,
            DirectAdapter(),
            self.residency,
            self._send,
            lambda *_: None,
            PublisherOptions(**merged),
            ready=lambda: self.transport.ready,
        )
        self.task: asyncio.Task[None] | None = None
        self._random = random.Random(source.worker_id)
        self._next = 0

    async def start(self) -> None:
        """Connect, answer control requests, publish."""
        await self.transport.connect()
        await self.transport.serve(subject(self.source, "control"), self.publisher.answer)
        await self.transport.subscribe(subject(self.source, "events"), self._foreign)
        await self.transport.flush()
        self.task = asyncio.create_task(self.publisher.run())

    async def stop(self) -> None:
        """End as a worker does that drains."""
        self.publisher.close()
        if self.task is not None:
            await asyncio.gather(self.task, return_exceptions=True)
        await self.transport.close()

    async def crash(self) -> None:
        """As SIGKILL would: nothing more is said."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.transport.close()

    def offer(self, *events: EngineEvent) -> None:
        """What the engine announces, from any thread."""
        self.publisher.offer([{"event": event} for event in events])

    def work(self, steps: int = 1) -> None:
        """Engine steps: chains stored in all groups, some of them removed again."""
        for _ in range(steps):
            self._next += 1
            chain = [f"{self.source.worker_id}:{self._next}:{depth}" for depth in range(4)]
            blocks = tuple(EngineBlock(name, (self._next, depth)) for depth, name in enumerate(chain))
            events: list[EngineEvent] = [BlocksStored(group, None, blocks) for group in (0, 1, 2)]
            if self._next > 5:
                old = self._random.randrange(1, self._next)
                gone = tuple(f"{self.source.worker_id}:{old}:{depth}" for depth in (2, 3))
                events.append(BlocksRemoved(self._random.randrange(3), gone))
            self.offer(*events)

    async def settled(self) -> None:
        """Return once all that was offered has been sent, whatever became of it."""
        await eventually(lambda: not self.publisher._inbox and not self.publisher._queue, "all is sent")

    async def _send(self, payload: bytes) -> None:
        for each in self.fault(payload):
            await self.transport.publish(subject(self.source, "events"), each)

    async def _foreign(self, _: str, payload: bytes) -> None:
        self.publisher.on_foreign(payload)


class Following:
    """A real subscriber on a connection of its own, with a naive index."""

    def __init__(self, where: Where, namespace: str, **reader_options: Any) -> None:
        self.index = NaiveIndex()
        self.transport = transport_to(where)
        options = SubscriberOptions(
            view=ViewOptions(heartbeat_s=0.1),
            reader=ReaderOptions(**{"first_backoff_s": 0.05, **reader_options}),
            request_timeout_s=0.5,
        )
        self.subscriber = Subscriber(self.transport, self.index, namespace=namespace, options=options)

    async def start(self) -> None:
        """Connect and follow."""
        await self.transport.connect()
        await self.subscriber.start()

    async def stop(self) -> None:
        """Follow no more."""
        await self.subscriber.stop()
        await self.transport.close()

    def equals(self, *publishing: Publishing) -> bool:
        """Live, scored, and exactly what the publishers hold."""
        for each in publishing:
            view = self.subscriber.view(each.source.rank)
            if view is None or view.reader.stale or view.reader.epoch != each.publisher.ledger.epoch:
                return False
            if view.reader.next_event_id != each.publisher.ledger.next_event_id:
                return False
            if self.index.held.get(each.source.rank) != each.residency.resident():
                return False
            if not self.index.scored.get(each.source.rank):
                return False
        return True

    async def catches_up(self, *publishing: Publishing, timeout_s: float = 15.0) -> None:
        """Return once it equals what the publishers hold; AssertionError after ``timeout_s``."""
        for each in publishing:
            await each.settled()
        await eventually(lambda: self.equals(*publishing), "the view equals the publisher's", timeout_s)


@asynccontextmanager
async def running(*parts: Publishing | Following) -> AsyncIterator[None]:
    """All parts, started in this order and stopped in the other."""
    started = []
    try:
        for part in parts:
            await part.start()
            started.append(part)
        yield
    finally:
        for part in reversed(started):
            await part.stop()


@asynccontextmanager
async def one_of_each(
    where: Where, namespace: str, **options: Any
) -> AsyncIterator[tuple[Publishing, Following]]:
    """A running worker, made with ``options``, and a running reader of ``namespace``."""
    worker = Publishing(where, Source(namespace, "b", 1), **options)
    reader = Following(where, namespace)
    async with running(reader, worker):
        yield worker, reader


async def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
    """Return once ``condition`` holds, which nothing signals; after that time an AssertionError."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None
