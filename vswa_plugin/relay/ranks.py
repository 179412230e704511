"""The publishers of one worker's ranks, for as long as one connection to it lasts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping, Sequence

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.dynamo.runtime import namespaced_block_hash
from vswa_plugin.engine import EventSource, RawEvent
from vswa_plugin.host.host import PluginHost
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.publisher import PASS_EVENTS, Publisher, PublisherOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.tasks import Tasks
from vswa_plugin.wire.events import Source
from vswa_plugin.wire.subjects import subject
from vswa_plugin.wire.transport import Transport, Unsubscribe

#: Engine events that may wait for the event loop before the thread that reads them waits too: a worker that
#: is asked for all that it keeps sends faster than it is taken in.
BACKLOG = 20_000
_PAUSE_S = 0.01


class Ranks:
    """Publishes the ranks of one worker; one epoch each begins with it.

    :param place: namespace, component and id of the worker.
    :param last_epochs: epochs of its ranks that are known from before.
    """

    def __init__(
        self,
        place: tuple[str, str, int],
        dp_ranks: Iterable[int],
        source: EventSource,
        host: PluginHost,
        transport: Transport,
        options: PublisherOptions,
        last_epochs: Mapping[int, int],
    ) -> None:
        self._transport = transport
        self._closing = threading.Event()
        self._unsubscribe: list[Unsubscribe] = []
        self._tasks = Tasks()
        self._running: list[asyncio.Task[None]] = []
        self.publishers: dict[int, Publisher] = {}
        for rank in dp_ranks:
            self.publishers[rank] = self._publisher(
                Source(*place, rank), source, host, options, last_epochs.get(rank, 0)
            )

    def _publisher(
        self, stream: Source, source: EventSource, host: PluginHost, options: PublisherOptions, last: int
    ) -> Publisher:
        to_subject = subject(stream, "events")

        async def send(payload: bytes) -> None:
            await self._transport.publish(to_subject, payload)

        layout = source.info.layout
        return Publisher(
            stream,
            host.event_adapter(source.event_format, layout),
            Residency(layout, NodeTable(namespaced_block_hash)),
            send,
            host.kv_batch,
            options,
            last_epoch=last,
            ready=lambda: self._transport.ready,
            observe_stored=host.kv_stored if host.implements("vswa_kv_stored") else None,
            memory=source.info.memory,
        )

    def take(self, dp_rank: int, events: Sequence[RawEvent]) -> None:
        """The sink of the worker's events; called from the thread that reads them, which may wait here."""
        publisher = self.publishers[dp_rank]
        publisher.offer(events)
        while publisher.waiting > BACKLOG and not self._closing.wait(_PAUSE_S):
            pass

    async def begin(self) -> None:
        """Answer readers, and publish."""
        for publisher in self.publishers.values():
            await self._serve_readers(publisher)
            self._running.append(self._tasks.start(publisher.run(), f"publish {publisher.source}"))

    async def _serve_readers(self, publisher: Publisher) -> None:
        async def foreign(_: str, payload: bytes) -> None:
            publisher.on_foreign(payload)

        serve, subscribe = self._transport.serve, self._transport.subscribe
        self._unsubscribe.append(await serve(subject(publisher.source, "control"), publisher.answer))
        self._unsubscribe.append(await subscribe(subject(publisher.source, "events"), foreign))

    @property
    def settled(self) -> bool:
        """Whether what came so far has been taken in, but for what one pass takes."""
        return all(each.waiting < PASS_EVENTS for each in self.publishers.values())

    @property
    def failure(self) -> str | None:
        """Why a rank is not published any more, though nobody stopped it."""
        return None if self._tasks.ended is None else str(self._tasks.ended)

    @property
    def epochs(self) -> dict[int, int]:
        return {rank: each.ledger.epoch for rank, each in self.publishers.items()}

    @property
    def layout(self) -> CacheLayout:
        """As the first rank's events have corrected it."""
        return next(iter(self.publishers.values())).ledger.layout

    def hold(self) -> None:
        """The thread that reads the events does not wait any more: it is about to be stopped."""
        self._closing.set()

    async def close(self) -> None:
        """Publish what was taken in, and end."""
        self.hold()
        for publisher in self.publishers.values():
            publisher.close()
        for task in self._running:
            await asyncio.wait({task}, timeout=5)
        await self._tasks.stop()
        for unsubscribe in self._unsubscribe:
            await unsubscribe()
