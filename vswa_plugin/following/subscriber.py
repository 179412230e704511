"""The router's side of the event streams: all ranks' events from NATS into one window index.

Thin: stream.py decides what to apply and what to ask, view.py what may be scored. Everything runs on one
event loop; requests to publishers are tasks, a few at a time, so that many gaps at once are no storm.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine, Iterator
from typing import Protocol

import msgspec

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.errors import ConfigError, ConnectError, ProtocolError, VswaError
from vswa_plugin.following.reader import (
    Apply,
    Ask,
    BecameLive,
    BecameStale,
    Effect,
    ReaderOptions,
    Reset,
    Unreadable,
)
from vswa_plugin.following.view import View, ViewOptions
from vswa_plugin.wire import control
from vswa_plugin.wire.control import Request
from vswa_plugin.wire.events import Event, Layout, Rank, Source, decode
from vswa_plugin.wire.transport import Transport, events_of, source_of, subject

logger = logging.getLogger(__name__)


class Index(Protocol):
    """What a subscriber needs of a window index."""

    def join(self, rank: Rank, layout: CacheLayout) -> None: ...
    def apply(self, rank: Rank, event: Event) -> None: ...
    def clear(self, rank: Rank) -> None: ...
    def drop(self, rank: Rank) -> None: ...
    def set_scored(self, rank: Rank, scored: bool) -> None: ...


class SubscriberOptions(msgspec.Struct, frozen=True):
    """Limits of a subscriber.

    :param request_timeout_s: how long an answer to a replay or snapshot request may take.
    :param requests: how many such requests may be out at a time.
    """

    view: ViewOptions = ViewOptions()
    reader: ReaderOptions = ReaderOptions()
    request_timeout_s: float = 2.0
    requests: int = 16


class SubscriberStats(msgspec.Struct):
    """Counters since start, over all ranks."""

    messages: int = 0
    malformed: int = 0
    foreign_subjects: int = 0
    requests: int = 0
    became_stale: int = 0
    became_live: int = 0


class Subscriber:
    """Keeps ``index`` equal to what the publishers of a namespace hold.

    :param namespace: Dynamo namespace, or None for all.
    :param component: Dynamo component, or None for all.
    """

    def __init__(
        self,
        transport: Transport,
        index: Index,
        *,
        namespace: str | None = None,
        component: str | None = None,
        options: SubscriberOptions | None = None,
    ) -> None:
        self.options = options or SubscriberOptions()
        self.stats = SubscriberStats()
        #: Set when a rank became live or left; for whoever waits for that.
        self.changed = asyncio.Event()
        self._transport = transport
        self._index = index
        self._namespace = namespace
        self._component = component
        self._views: dict[Rank, View] = {}
        self._by_subject: dict[str, View] = {}
        self._requests = asyncio.Semaphore(self.options.requests)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribe; the transport must be connected. Raises ConnectError."""
        await self._transport.subscribe(events_of(self._namespace, self._component), self._on_message)
        await self._transport.flush()
        self._ticking = asyncio.create_task(self._tick_forever(), name="subscriber ticks")

    async def stop(self) -> None:
        """End all tasks; the transport stays open and goes on delivering until it is closed."""
        tasks = [*self._tasks, *([self._ticking] if self._ticking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def views(self) -> Iterator[View]:
        """All ranks that are known, in no order."""
        return iter(self._views.values())

    def view(self, rank: Rank) -> View | None:
        return self._views.get(rank)

    def announce(self, source: Source, epoch: int) -> None:
        """The registry says that this rank lives, in that epoch: fetch what it holds if we have not."""
        view = self._view(source)
        view.registered = True
        self._carry_out(view, view.reader.on_announced(epoch))
        self._settle_scored(view)

    def withdraw(self, rank: Rank) -> None:
        """The registry says that this rank has gone."""
        view = self._views.pop(rank, None)
        if view is not None:
            self._by_subject.pop(subject(view.source, "events"), None)
            self._index.drop(rank)
            self.changed.set()

    # -- incoming ----------------------------------------------------------------------------------

    async def _on_message(self, event_subject: str, payload: bytes) -> None:
        self.stats.messages += 1
        view = self._by_subject.get(event_subject) or self._first_from(event_subject)
        if view is None:
            return
        view.heard()
        now = self._now()
        try:
            effects = view.reader.on_batch(decode(payload), now)
        except ProtocolError as error:
            self.stats.malformed += 1
            if view.reader.stats.malformed == 0:
                logger.warning("%s: %s (further ones are only counted)", view.source, error)
            effects = view.reader.on_malformed(now)
        self._carry_out(view, effects)
        self._settle_scored(view)

    def _first_from(self, event_subject: str) -> View | None:
        """The view of a subject that was not met before; None where it is not one of ours."""
        try:
            view = self._view(source_of(event_subject))
        except ConfigError as error:
            self.stats.foreign_subjects += 1
            if self.stats.foreign_subjects == 1:
                logger.warning("a message on a foreign subject is ignored, as all further ones: %s", error)
            return None
        self._by_subject[event_subject] = view
        return view

    def _view(self, source: Source) -> View:
        view = self._views.get(source.rank)
        if view is None:
            view = View(source, self.options.view, self.options.reader, random.random)
            self._views[source.rank] = view
        return view

    # -- effects -----------------------------------------------------------------------------------

    def _carry_out(self, view: View, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Apply():
                    self._apply(view, effect.events)
                case Reset():
                    self._reset(view)
                case Ask():
                    self._spawn(self._ask(view, effect.request))
                case BecameStale():
                    self._became_stale(view, effect.reason)
                case BecameLive():
                    self._became_live(view)
                case Unreadable():
                    logger.warning(
                        "%s: event %r of a later version: this rank is not scored; update this router",
                        view.source,
                        effect.tag,
                    )

    def _apply(self, view: View, events: tuple[Event, ...]) -> None:
        rank = view.source.rank
        for event in events:
            try:
                if isinstance(event, Layout):
                    view.layout = CacheLayout(
                        event.groups, event.rule, event.model, event.hash_scheme
                    ).check()
                    self._index.join(rank, view.layout)
                else:
                    self._index.apply(rank, event)
            except VswaError as error:
                if view.broken is None:
                    logger.error("%s: not scored until its next epoch: %s", view.source, error)
                view.broken = str(error)

    def _reset(self, view: View) -> None:
        view.broken = None
        if view.layout is not None:
            self._index.clear(view.source.rank)

    def _became_stale(self, view: View, reason: str) -> None:
        if view.stale_since is None:
            self.stats.became_stale += 1
            view.stale_since = self._now()
            logger.info("%s: view is stale: %s", view.source, reason)
        view.stale_reason = reason

    def _became_live(self, view: View) -> None:
        self.stats.became_live += 1
        self.changed.set()
        if view.stale_since is not None:
            took_ms = (self._now() - view.stale_since) * 1000
            logger.info("%s: view is live again after %.0f ms", view.source, took_ms)
        view.stale_since = None

    def _settle_scored(self, view: View) -> None:
        if view.layout is not None:
            self._index.set_scored(view.source.rank, view.scored(self._now()))

    # -- outgoing and time -------------------------------------------------------------------------

    async def _ask(self, view: View, request: Request) -> None:
        async with self._requests:
            self.stats.requests += 1
            to_subject = subject(view.source, "control")
            timeout = self.options.request_timeout_s
            try:
                payload = await self._transport.request(to_subject, control.encode(request), timeout)
                reply = control.decode_reply(payload)
            except (ConnectError, ProtocolError) as error:
                effects = view.reader.on_failure(request, str(error), self._now())
                logger.info("%s: repair is tried again: %s", view.source, error)
            else:
                view.heard()
                effects = view.reader.on_reply(request, reply, self._now())
        if self._views.get(view.source.rank) is view:
            self._carry_out(view, effects)
            self._settle_scored(view)

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(self.options.view.tick_s)
            now = self._now()
            for view in list(self._views.values()):
                view.tick(now, self._transport.connected)
                if view.forgotten:
                    logger.info("%s: silent for long and in no registry: forgotten", view.source)
                    self.withdraw(view.source.rank)
                    continue
                self._carry_out(view, view.reader.on_tick(now))
                self._settle_scored(view)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
