"""The router's side of the event streams: all ranks' events from NATS into one window index.

Thin: reader.py decides what to apply and what to request, view.py what may be scored, due.py which views to
look at.
Everything runs on one event loop; requests to publishers are tasks, a few at a time, so that many gaps at
once do not flood the broker. What goes wrong with one rank costs that rank alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Protocol

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.errors import ConfigError, ConnectError, ProtocolError, VswaError
from vswa_plugin.following.due import Due
from vswa_plugin.following.options import SubscriberOptions, SubscriberStats
from vswa_plugin.following.reader import Apply, Ask, BecameLive, BecameStale, Effect, Reset, Unreadable
from vswa_plugin.following.slots import Slots
from vswa_plugin.following.view import Attention, View
from vswa_plugin.forecast import Forecasts
from vswa_plugin.tasks import Tasks
from vswa_plugin.wire import control
from vswa_plugin.wire.control import Request
from vswa_plugin.wire.events import Batch, Cleared, Event, Layout, Rank, ReuseReport, Source, decode
from vswa_plugin.wire.numbering import is_plausible
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
FAR_AHEAD = "too far ahead of this clock and of the registry, and ignored"


class Index(Protocol):
    """What a subscriber needs of a window index."""

    def join(self, rank: Rank, layout: CacheLayout) -> None: ...
    def apply(self, rank: Rank, event: Event) -> None: ...
    def clear(self, rank: Rank) -> None: ...
    def drop(self, rank: Rank) -> None: ...
    def set_scored(self, rank: Rank, scored: bool) -> None: ...


#: Called with the rank and a report of one of its requests.
OnReport = Callable[[Rank, ReuseReport], None]


class Subscriber:
    """Keeps ``index`` equal to what the publishers of a namespace hold.

    :param namespace: Dynamo namespace, and ``component``, or None for all.
    :param tasks: where its long-lived task is watched.
    :param clock_ns: wall clock, by which epochs are judged.
    :param forecasts: gets the same events as the index; None: nothing is forecast.
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
        clock_ns: Callable[[], int] = time.time_ns,
        forecasts: Forecasts | None = None,
    ) -> None:
        self.options = options or SubscriberOptions()
        self.stats = SubscriberStats()
        self.announced_only = False  # set where a registry lists the ranks
        #: Set when a rank became live, was given up or left, for tasks that wait for that.
        self.changed = asyncio.Event()
        #: Is given the reports of ended requests, also of workers that drain; must not raise.
        self.on_report: OnReport | None = None
        self._transport = transport
        self._index = index
        self._forecasts = forecasts
        self._namespace = namespace
        self._component = component
        self._clock_ns = clock_ns
        self._bounds_lag = self.options.view.max_lag_s < math.inf
        self._views: dict[Rank, View] = {}
        #: Views of ranks that have left the registry and still send: workers that drain.
        self._departed: dict[Rank, View] = {}
        self._by_subject: dict[str, View] = {}
        self._repairing: dict[Rank, View] = {}
        self._attention = Attention(4 * self.options.view.tick_s)
        self._due = Due()
        self._tick_s = self.options.view.tick_s
        self._slots = Slots(self.options.requests, self.options.request_patience_s)
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
        if former is not None and former.is_over(source, epoch):
            self._forget(former)
        view = self._follow(source)
        view.registered, view.announced_epoch = True, epoch
        self._take(view, view.reader.on_announced(epoch))

    def withdraw(self, rank: Rank) -> None:
        """The registry says that this rank has gone. It may drain: its events change nothing."""
        view = self._views.pop(rank, None)
        if view is None:
            return
        self._repairing.pop(rank, None)
        self._drop(rank)
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
        now = self._now()
        try:
            batch = decode(payload)
        except ProtocolError as error:
            if not view.departed:
                self._malformed(view, error, now)
            return
        if not self._is_plausible(view, batch.epoch):
            return
        changed = self._heard(view, batch, now)
        self._reported(view, batch)
        if view.departed:  # it drains: only the sign of life counts
            return
        effects = view.reader.on_batch(batch, now)
        if effects or changed:
            self._take(view, effects)

    def _malformed(self, view: View, error: ProtocolError, now: float) -> None:
        self.stats.malformed += 1
        if view.reader.stats.malformed == 0:
            logger.warning("%s: %s (further ones are only counted)", view.source, error)
        self._take(view, view.reader.on_malformed(now))

    def _reported(self, view: View, batch: Batch) -> None:
        if self.on_report is not None:
            for report in batch.reports:
                self.on_report(view.source.rank, report)

    def _is_plausible(self, view: View, epoch: int) -> bool:
        """Whether a publisher of this rank can have begun that epoch."""
        if epoch <= view.reader.epoch:
            return True
        if is_plausible(epoch, view.announced_epoch, self._clock_ns(), self.options.max_epoch_ahead_s):
            return True
        self.stats.implausible_epochs += 1
        if self.stats.implausible_epochs == 1:
            logger.warning("%s: epoch %d is %s: check clocks and permissions", view.source, epoch, FAR_AHEAD)
        return False

    def _heard(self, view: View, batch: Batch | None, now: float) -> bool:
        """Note a message of the current epoch or a later one, or an answer; others are no sign of life.

        Returns whether that changes whether the rank is scored.
        """
        if batch is not None and batch.epoch < view.reader.epoch:
            return False
        was_silent = view.silent
        if not self._bounds_lag and not was_silent and view.current:  # as it is with almost all messages
            view.heard()
            return False
        before = view.scored(now)
        if batch is not None:
            view.note_lag(batch.epoch, batch.published_at_ns, now)
        view.heard()
        if was_silent:
            self._due.add(view)
        return view.scored(now) != before

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
        if self.announced_only:
            self.stats.unregistered += 1  # not worth a log line: each worker publishes before it registers
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
        self._drop(rank)
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
                if self._forecasts is not None:
                    self._forecasts.apply(view.source.rank, event)
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
        self._drop(view.source.rank)
        self.changed.set()

    def _drop(self, rank: Rank) -> None:
        self._index.drop(rank)
        if self._forecasts is not None:
            self._forecasts.drop(rank)

    def _reset(self, view: View) -> None:
        view.broken = None
        if view.layout is not None:
            self._index.clear(view.source.rank)
            if self._forecasts is not None:
                self._forecasts.apply(view.source.rank, Cleared())

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
            scored = view.scored(self._now())
            self._index.set_scored(view.source.rank, scored)
            if self._forecasts is not None:
                self._forecasts.set_scored(view.source.rank, scored)

    # -- outgoing and time -------------------------------------------------------------------------

    async def _ask(self, view: View, request: Request) -> None:
        to_subject, timeout = subject(view.source, "control"), self.options.request_timeout_s
        reply, reason = None, FAR_AHEAD
        try:
            async with self._slots.one(first=view.answers):
                self.stats.requests += 1
                payload = await self._transport.request(to_subject, control.encode(request), timeout)
            reply = control.decode_reply(payload)
        except (ConnectError, ProtocolError) as error:
            reason = str(error)
            logger.info("%s: repair is tried again: %s", view.source, error)
        if self._views.get(view.source.rank) is not view:
            return  # it was forgotten meanwhile, and another may have its place
        view.answers, now = reply is not None, self._now()
        if reply is None or not self._is_plausible(view, reply.epoch):
            self._take(view, view.reader.on_failure(request, reason, now))
            return
        if reply.epoch >= view.reader.epoch:
            self._heard(view, None, now)
        self._take(view, view.reader.on_reply(request, reply, now))

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
            if view.registered and view.silent and view.announced_epoch < view.reader.epoch:
                self.announce(view.source, view.announced_epoch)
        for rank, view in list(self._repairing.items()):
            if not view.reader.stale:
                del self._repairing[rank]
            self._take(view, view.reader.on_tick(now))
        if self._attention.is_grace_over(now, self.options.view.stale_grace_s):
            for view in list(self._views.values()):
                self._take(view, [])

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
