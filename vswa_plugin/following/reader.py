"""Reads one rank's event stream: which events to apply, when something is missing, how to repair it.

Sans-I/O. The caller feeds batches, answers and the time, and carries out the effects that come back, in
order. Applying them to an empty set gives the publisher's own view, exactly, whenever the reader is live.

    empty ──event 0──► live ──gap──► stale ──replay──► live
      └──anything else──► stale ──snapshot──► live        (replay too old, or failed twice: snapshot)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from vswa_plugin.errors import ProtocolError
from vswa_plugin.wire.control import (
    PartRequest,
    Refused,
    Replay,
    ReplayRequest,
    Reply,
    Request,
    SnapshotHead,
    SnapshotPart,
    SnapshotRequest,
    TooOld,
)
from vswa_plugin.wire.events import Batch, Event, Layout, Unknown, decode


class ReaderOptions(msgspec.Struct, frozen=True):
    """Limits of one reader.

    :param buffer_events: events that may wait while a repair is under way; above it the repair starts over.
    :param replay_attempts: failed replays after which a snapshot is taken.
    :param first_backoff_s: pause after the first failure; doubles with each further one.
    :param max_backoff_s: longest pause.
    """

    buffer_events: int = 200_000
    replay_attempts: int = 2
    first_backoff_s: float = 0.25
    max_backoff_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Reset:
    """Nothing is known to be resident any more."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply these events, in order."""

    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Send ``request`` to the publisher; give back its answer or its failure."""

    request: Request


@dataclass(frozen=True, slots=True)
class BecameStale:
    """What is known is no longer what the publisher holds."""

    reason: str


@dataclass(frozen=True, slots=True)
class BecameLive:
    """What is known is what the publisher holds."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An event of a later version arrived: do not score this rank in this epoch. Given once an epoch."""

    tag: str


Effect: TypeAlias = Reset | Apply | Ask | BecameStale | BecameLive | Unreadable


class ReaderStats(msgspec.Struct):
    """Counters since start."""

    batches: int = 0
    events: int = 0
    heartbeats: int = 0
    duplicates: int = 0
    foreign_epochs: int = 0
    malformed: int = 0
    epochs: int = 0
    gaps: int = 0
    replays: int = 0
    snapshots: int = 0
    failures: int = 0


@dataclass(slots=True)
class _Repair:
    """A repair under way: at most one request is out at a time."""

    pending: Request | None = None
    retry_at: float | None = None
    failures: int = 0
    by_snapshot: bool = False
    head: SnapshotHead | None = None
    parts: list[SnapshotPart] = field(default_factory=list)


class Reader:
    """The stream of one rank.

    :param jitter: a number in [0, 1) that spreads the retries of many readers.
    """

    def __init__(
        self, options: ReaderOptions | None = None, jitter: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.options = options or ReaderOptions()
        self.stats = ReaderStats()
        self.epoch = 0
        self.next_event_id = 0
        #: Published at, by the publisher's clock: for the lag figure only.
        self.last_published_at_ns = 0
        self.unreadable = False
        self._jitter = jitter
        self._repair: _Repair | None = None
        self._waiting: list[Batch] = []
        self._waiting_events = 0
        #: Ids below this one exist: a heartbeat, a waiting batch or an answer said so.
        self._promised_id = 0
        #: The same, of what was said since the first request was sent that may still be answered.
        self._promised_since = 0
        self._unanswered = False

    @property
    def stale(self) -> bool:
        """Something is missing, or nothing was seen yet."""
        return self._repair is not None or self.epoch == 0

    def on_batch(self, batch: Batch, now: float) -> list[Effect]:
        """A batch arrived, in whatever order."""
        if (
            not batch.events and batch.first_event_id == self.next_event_id and batch.epoch == self.epoch
        ):  # a heartbeat that confirms what is known: almost all messages of an idle fleet
            self.stats.heartbeats += 1
            self.last_published_at_ns = max(self.last_published_at_ns, batch.published_at_ns)
            return []
        self.stats.batches += bool(batch.events)
        self.stats.heartbeats += not batch.events
        if batch.epoch < self.epoch:
            self.stats.foreign_epochs += 1
            return []
        effects: list[Effect] = []
        if batch.epoch > self.epoch:
            effects += self._begin_epoch(batch.epoch)
        self._promise(batch.next_event_id)
        self.last_published_at_ns = max(self.last_published_at_ns, batch.published_at_ns)
        if self.next_event_id == 0 and batch.first_event_id > 0 and self._repair is None:
            effects += self._start_repair("joined after the first event", by_snapshot=True)
        if self._repair is not None:
            return effects + self._wait(batch)
        if batch.first_event_id > self.next_event_id:
            self.stats.gaps += 1
            reason = f"expected event {self.next_event_id}, got {batch.first_event_id}"
            return effects + self._start_repair(reason) + self._wait(batch)
        return effects + self._take(batch)

    def on_announced(self, epoch: int) -> list[Effect]:
        """The registry says that this epoch is under way: take a snapshot if we have nothing of it."""
        if epoch <= self.epoch:
            return []
        return self._begin_epoch(epoch) + self._start_repair("nothing seen of this epoch", by_snapshot=True)

    def on_malformed(self, now: float) -> list[Effect]:
        """A message came that cannot be read: it may have been the next batch."""
        self.stats.malformed += 1
        if self.epoch == 0 or self._repair is not None:
            return []
        return self._start_repair("a message could not be read")

    def on_reply(self, request: Request, reply: Reply, now: float) -> list[Effect]:
        """The answer to an :class:`Ask`. One that is not awaited any more is ignored."""
        if self._repair is None or self._repair.pending != request:
            return []
        self._repair.pending, self._unanswered = None, False
        if reply.epoch > self.epoch:
            effects = self._begin_epoch(reply.epoch)
            return effects + self._start_repair("the publisher has begun a new epoch", by_snapshot=True)
        match reply:
            case Replay():
                self._end_is(reply.end_event_id)
                return self._on_replay(reply, now)
            case SnapshotHead():
                self._end_is(reply.end_event_id)
                return self._on_head(reply)
            case SnapshotPart():
                return self._on_part(reply, now)
            case TooOld():
                return self._ask_snapshot()
            case Refused():
                return self.on_failure(request, reply.reason, now, awaited=False)

    def on_failure(self, request: Request, reason: str, now: float, *, awaited: bool = True) -> list[Effect]:
        """No answer came, or a refusal: try again after a pause, by snapshot after some failures."""
        repair = self._repair
        if repair is None or (awaited and repair.pending != request):
            return []
        self.stats.failures += 1
        repair.pending = None
        repair.failures += 1
        if repair.by_snapshot or repair.failures >= self.options.replay_attempts:
            repair.by_snapshot, repair.head, repair.parts = True, None, []
        pause = min(self.options.max_backoff_s, self.options.first_backoff_s * 2.0 ** (repair.failures - 1))
        repair.retry_at = now + pause * (0.5 + 0.5 * self._jitter())
        return []

    def on_tick(self, now: float) -> list[Effect]:
        """Time has passed: retries that are due."""
        repair = self._repair
        if repair is None or repair.pending is not None or repair.retry_at is None or now < repair.retry_at:
            return []
        repair.retry_at = None
        return self._ask_snapshot() if repair.by_snapshot else self._ask_replay()

    # -- applying ----------------------------------------------------------------------------------

    def _begin_epoch(self, epoch: int) -> list[Effect]:
        self.stats.epochs += 1
        self.epoch, self.next_event_id, self._promised_id, self._promised_since = epoch, 0, 0, 0
        self._repair, self._unanswered, self.unreadable = None, False, False
        self._forget_waiting()
        return [Reset()]

    def _take(self, batch: Batch) -> list[Effect]:
        """Apply the new events of ``batch``, which begins at or before the next id."""
        fresh = batch.events[self.next_event_id - batch.first_event_id :]
        if not fresh:
            self.stats.duplicates += bool(batch.events)
            return []
        first = self.next_event_id == 0
        self.next_event_id = batch.next_event_id
        self.stats.events += len(fresh)
        return self._applied(fresh) + ([BecameLive()] if first and self._repair is None else [])

    def _applied(self, events: Iterable[Event | Unknown]) -> list[Effect]:
        effects: list[Effect] = []
        applicable: list[Event] = []
        for event in events:
            if not isinstance(event, Unknown):
                applicable.append(event)
            elif not self.unreadable:
                self.unreadable = True
                effects.append(Unreadable(event.tag))
        return [Apply(tuple(applicable)), *effects] if applicable else effects

    # -- repairing ---------------------------------------------------------------------------------

    def _promise(self, end_event_id: int) -> None:
        """A batch says that the publisher has assigned all ids below this one."""
        self._promised_id = max(self._promised_id, end_event_id)
        self._promised_since = max(self._promised_since, end_event_id)

    def _end_is(self, end_event_id: int | None) -> None:
        """The publisher itself gives the next id that it will assign; an older one does not.

        Batches that came before the request and state a higher one were not the publisher's.
        """
        if end_event_id is None:
            return
        self._promised_id = max(end_event_id, self._promised_since)
        self._waiting = [each for each in self._waiting if each.next_event_id <= self._promised_id]
        self._waiting_events = sum(len(each.events) for each in self._waiting)

    def _start_repair(self, reason: str, *, by_snapshot: bool = False) -> list[Effect]:
        self._repair = _Repair(by_snapshot=by_snapshot)
        return [BecameStale(reason), *(self._ask_snapshot() if by_snapshot else self._ask_replay())]

    def _ask_replay(self) -> list[Effect]:
        return self._ask(ReplayRequest(self.epoch, self.next_event_id))

    def _ask_snapshot(self) -> list[Effect]:
        assert self._repair is not None
        self._repair.by_snapshot, self._repair.head, self._repair.parts = True, None, []
        return self._ask(SnapshotRequest(self.epoch))

    def _ask(self, request: Request) -> list[Effect]:
        assert self._repair is not None
        self._repair.pending = request
        if not self._unanswered:
            self._promised_since, self._unanswered = 0, True
        return [Ask(request)]

    def _wait(self, batch: Batch) -> list[Effect]:
        """Keep a batch until the repair is done."""
        if not batch.events:
            return []
        self._waiting.append(batch)
        self._waiting_events += len(batch.events)
        if self._waiting_events <= self.options.buffer_events:
            return []
        # What is dropped here is in the publisher's ring or in a later snapshot.
        self._forget_waiting()
        return []

    def _forget_waiting(self) -> None:
        self._waiting.clear()
        self._waiting_events = 0

    def _on_replay(self, reply: Replay, now: float) -> list[Effect]:
        self.stats.replays += 1
        before = self.next_event_id
        effects: list[Effect] = []
        try:
            batches = [decode(payload) for payload in reply.payloads]
        except ProtocolError as error:
            return self.on_failure(ReplayRequest(self.epoch, before), str(error), now, awaited=False)
        for batch in batches:
            if batch.epoch == self.epoch and batch.first_event_id <= self.next_event_id:
                effects += self._take(batch)
        effects += self._take_waiting()
        if self._whole():
            return effects + self._finish()
        if self.next_event_id > before:  # the answer was cut to fit into a message
            return effects + self._ask_replay()
        failed = self.on_failure(ReplayRequest(self.epoch, before), "nothing new", now, awaited=False)
        return effects + failed

    def _on_head(self, head: SnapshotHead) -> list[Effect]:
        assert self._repair is not None
        self._repair.head, self._repair.parts = head, []
        return self._ask(PartRequest(self.epoch, head.snapshot_id, 0))

    def _on_part(self, part: SnapshotPart, now: float) -> list[Effect]:
        repair = self._repair
        assert repair is not None
        if (
            repair.head is None
            or part.snapshot_id != repair.head.snapshot_id
            or part.part != len(repair.parts)
        ):
            request = SnapshotRequest(self.epoch)
            return self.on_failure(request, "another part came than was asked for", now, awaited=False)
        repair.parts.append(part)
        if len(repair.parts) < repair.head.parts:
            return self._ask(PartRequest(self.epoch, part.snapshot_id, len(repair.parts)))
        events = tuple(event for each in repair.parts for event in each.events)
        if not events or not isinstance(events[0], Layout):
            request = SnapshotRequest(self.epoch)
            return self.on_failure(request, "a snapshot without a layout", now, awaited=False)
        self.stats.snapshots += 1
        self.next_event_id = repair.head.next_event_id
        effects: list[Effect] = [Reset(), Apply(events), *self._take_waiting()]
        if self._whole():
            return effects + self._finish()
        # Frozen before what is missing was published: the ring has the rest.
        repair.by_snapshot, repair.head, repair.parts = False, None, []
        return effects + self._ask_replay()

    def _take_waiting(self) -> list[Effect]:
        """Apply the waiting batches that follow on; the others go on waiting."""
        effects: list[Effect] = []
        waiting = sorted(self._waiting, key=lambda batch: batch.first_event_id)
        self._forget_waiting()
        for batch in waiting:
            if batch.first_event_id <= self.next_event_id:
                effects += self._take(batch)
            else:
                self._wait(batch)
        return effects

    def _whole(self) -> bool:
        return not self._waiting and self.next_event_id >= self._promised_id

    def _finish(self) -> list[Effect]:
        self._repair = None
        return [BecameLive()]
