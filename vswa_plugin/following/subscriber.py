"""The router's side of the event streams: all ranks' events from NATS into one window index.

Thin: reader.py decides what to apply and what to request, view.py what may be scored, due.py which views to
look at.
Everything runs on one event loop; requests to publishers are tasks, a few at a time, so that many gaps at
once do not flood the broker. What goes wrong with one rank costs that rank alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Coroutine, Iterator
from typing import Protocol

import msgspec

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.errors import ConfigError, ConnectError, ProtocolError, VswaError
from vswa_plugin.following.due import Due
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
from vswa_plugin.following.view import Attention, View, ViewOptions
from vswa_plugin.tasks import Tasks
from vswa_plugin.wire import control
from vswa_plugin.wire.control import Request
from vswa_plugin.wire.events import Event, Layout, Rank, Source, decode
from vswa_plugin.wire.subjects import events_of, source_of, subject
from vswa_plugin.wire.transport import Transport

__all__ = [
    "Subscriber",
    "SubscriberOptions",
    "SubscriberStats",
]

logger = logging.getLogger(__name__)

#: However short the heartbeats of a publisher are, the clock is looked at no more often.
LEAST_TICK_S = 0.02


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
    """Counters since start, over all ranks.

    :param foreign_subjects: messages on subjects that are not those of a rank that we follow.
    :param errors: times that a rank was given up until its next epoch because something unforeseen happened.
    """

    messages: int = 0
    malformed: int = 0
    foreign_subjects: int = 0
    requests: int = 0
    errors: int = 0


class Subscriber:
    """Keeps ``index`` equal to what the publishers of a namespace hold.

    :param namespace: Dynamo namespace, or None for all.
    :param component: Dynamo component, or None for all.
    :param tasks: where its long-lived task is watched.
    """

    def __init__(
        self,
        transport: Transport,
        index: Index,
        *,
        namespace: str | None = None,
        component: str | None = None,
        options: SubscriberOptions | None = None,
        tasks: Tasks | None = None,
    ) -> None:
        self.options = options or SubscriberOptions()
        self.stats = SubscriberStats()
        #: Set when a rank became live, was given up or left, for tasks that wait for that.
        self.changed = asyncio.Event()
        self._transport = transport
        self._index = index
        self._namespace = namespace
        self._component = component
        self._views: dict[Rank, View] = {}
        #: Views of ranks that have left the registry and still send: workers that drain.
        self._departed: dict[Rank, View] = {}
        self._by_subject: dict[str, View] = {}
        self._repairing: dict[Rank, View] = {}
        self._attention = Attention(4 * self.options.view.tick_s)
        self._due = Due()
        self._tick_s = self.options.view.tick_s
        self._requests = asyncio.Semaphore(self.options.requests)
        self._tasks = tasks if tasks is not None else Tasks()
        self._asking: set[asyncio.Task[None]] = set()
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribe; the transport must be connected. Raises ConnectError."""
        await self._transport.subscribe(events_of(self._namespace, self._component), self._on_message)
        await self._transport.flush()
        self._ticking = self._tasks.start(self._tick_forever(), "watch the heartbeats")

    async def stop(self) -> None:
        """End all tasks; the transport stays open and goes on delivering until it is closed."""
        await self._tasks.stop([*self._asking, *([self._ticking] if self._ticking else [])])

    def views(self) -> Iterator[View]:
        """All ranks that are followed, in no order."""
        return iter(self._views.values())

    def view(self, rank: Rank) -> View | None:
        return self._views.get(rank)

    def live(self, rank: Rank) -> bool:
        """Whether what is known of the rank is what it holds."""
        view = self._views.get(rank)
        return view is not None and view.state == "live"

    def silent(self, rank: Rank) -> bool:
        """Whether the heartbeats of a rank are missing, be it registered or one that has left and drains."""
        view = self._views.get(rank) or self._departed.get(rank)
        return view is None or view.silent

    def announce(self, source: Source, epoch: int) -> None:
        """The registry says that this rank lives, in that epoch: fetch what it holds if we have not."""
        former = self._departed.get(source.rank) or self._views.get(source.rank)
        # One that has left begins anew; one of another source spoke under this number first.
        if former is not None and (former.departed or former.source != source):
            self._forget(former)
        view = self._follow(source)
        view.registered = True
        self._take(view, view.reader.on_announced(epoch))

    def withdraw(self, rank: Rank) -> None:
        """The registry says that this rank has gone. It may drain: its events change nothing."""
        view = self._views.pop(rank, None)
        if view is None:
            return
        self._repairing.pop(rank, None)
        self._index.drop(rank)
        view.layout, view.departed, view.registered = None, True, False
        self._departed[rank] = view
        self._due.add(view)
        self.changed.set()

    # -- incoming ----------------------------------------------------------------------------------

    async def _on_message(self, event_subject: str, payload: bytes) -> None:
        self.stats.messages += 1
        view = self._by_subject.get(event_subject) or self._first_from(event_subject)
        if view is None:
            return
        if view.departed:  # it drains: only the sign of life counts
            with contextlib.suppress(ProtocolError):
                self._heard(view, decode(payload).epoch)
            return
        now = self._now()
        try:
            batch = decode(payload)
        except ProtocolError as error:
            self.stats.malformed += 1
            if view.reader.stats.malformed == 0:
                logger.warning("%s: %s (further ones are only counted)", view.source, error)
            effects = view.reader.on_malformed(now)
        else:
            was_silent = self._heard(view, batch.epoch)
            effects = view.reader.on_batch(batch, now)
            if not effects and not was_silent:
                return
        self._take(view, effects)

    def _heard(self, view: View, epoch: int) -> bool:
        """Note a message, no sign of life where its epoch is over; returns whether it ends a silence."""
        if epoch < view.reader.epoch:
            return False
        silent = view.silent
        view.heard()
        if silent:
            self._due.add(view)
        return silent

    def _first_from(self, event_subject: str) -> View | None:
        """The view for a subject that is new here; None where the subject is not that of a rank of ours."""
        try:
            source = source_of(event_subject)
        except ConfigError as error:
            self._foreign(str(error))
            return None
        view = self._views.get(source.rank) or self._departed.get(source.rank)
        if view is not None and view.source != source:
            self._foreign(f"{event_subject} names a rank that publishes as {view.source}")
            return None
        return self._follow(source)

    def _foreign(self, reason: str) -> None:
        self.stats.foreign_subjects += 1
        if self.stats.foreign_subjects == 1:
            logger.warning("a message on a foreign subject is ignored, as all further ones: %s", reason)

    def _follow(self, source: Source) -> View:
        view = self._views.get(source.rank)
        if view is None:
            options = self.options
            view = View(source, options.view, options.reader, random.random, self._attention)
            self._views[source.rank] = view
            self._by_subject[subject(source, "events")] = view
            self._due.add(view)
        return view

    def _forget(self, view: View) -> None:
        """Drop the view and all that is known of its rank."""
        rank = view.source.rank
        self._due.discard(view)
        self._by_subject.pop(subject(view.source, "events"), None)
        if view.departed:
            del self._departed[rank]
            return
        del self._views[rank]
        self._repairing.pop(rank, None)
        self._index.drop(rank)
        self.changed.set()

    # -- effects -----------------------------------------------------------------------------------

    def _take(self, view: View, effects: list[Effect]) -> None:
        """Carry effects out and settle whether the rank is scored. Whatever fails costs this rank alone."""
        try:
            if effects:
                self._carry_out(view, effects)
            if view.reader.stale:
                self._repairing[view.source.rank] = view
            self._settle_scored(view)
        except Exception as error:
            self.stats.errors += 1
            if view.broken is None:
                logger.exception("%s: not scored until its next epoch", view.source)
            self._give_up(view, f"{type(error).__name__}: {error}")

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
        for event in events:
            if view.broken is not None:
                return
            try:
                if isinstance(event, Layout):
                    self._join(view, event)
                else:
                    self._index.apply(view.source.rank, event)
            except VswaError as error:
                logger.error("%s: not scored until its next epoch: %s", view.source, error)
                self._give_up(view, str(error))

    def _join(self, view: View, event: Layout) -> None:
        if (heartbeat_s := event.heartbeat) is not None and heartbeat_s != view.heartbeat_s:
            view.heartbeat_s = heartbeat_s
            self._due.add(view)
            self._tick_s = max(LEAST_TICK_S, min(self._tick_s, heartbeat_s / 4))
        layout = event.cache_layout.check()
        self._index.join(view.source.rank, layout)
        view.layout = layout
        if view.remark:
            logger.warning("%s: %s", view.source, view.remark)

    def _give_up(self, view: View, reason: str) -> None:
        """Drop the rank's blocks and do not score it until its next epoch."""
        view.broken = reason
        view.layout = None
        self._index.drop(view.source.rank)
        self.changed.set()

    def _reset(self, view: View) -> None:
        view.broken = None
        if view.layout is not None:
            self._index.clear(view.source.rank)

    def _became_stale(self, view: View, reason: str) -> None:
        if view.stale_since is None:
            view.stale_since = self._now()
            logger.info("%s: view is stale: %s", view.source, reason)
        view.stale_reason = reason

    def _became_live(self, view: View) -> None:
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
                self._heard(view, reply.epoch)
                effects = view.reader.on_reply(request, reply, self._now())
        if self._views.get(view.source.rank) is view:
            self._take(view, effects)

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            self.tick(self._now())

    def tick(self, now: float) -> None:
        """Time has passed: look at the ranks that are silent by now, and at those under repair.

        :param now: seconds of the event loop's clock.
        """
        self._attention.tick(now, self._transport.connected)
        for view in self._due.take(self._attention.now):
            if view.forgotten:
                if not view.departed:
                    logger.info("%s: silent for long and in no registry: forgotten", view.source)
                self._forget(view)
                continue
            self._due.add(view)
            if not view.departed:
                self._take(view, [])
        for rank, view in list(self._repairing.items()):
            if not view.reader.stale:
                del self._repairing[rank]
            self._take(view, view.reader.on_tick(now))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
