"""The worker's side of the event stream: engine events in, numbered batches out, heartbeats between.

The engine hands over its events from its own thread and never waits: :meth:`Publisher.offer` only appends
to a bounded inbox. Everything else happens on the worker's event loop: the adapter, the ledger (ledger.py),
and a bounded queue of encoded batches towards the broker. Wire ids are given before that queue, so whatever
is dropped there shows to readers as a gap; an inbox that overflows is treated as an engine whose own buffer
overflowed: nothing is resident, and a new epoch begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import msgspec

from vswa_plugin.blocks.memory import Memory
from vswa_plugin.engine.contract import (
    BlocksStored,
    EngineEvent,
    EventAdapter,
    Node,
    RawEvent,
    with_prompts,
)
from vswa_plugin.errors import ConnectError, InvariantError, ProtocolError, StreamError, VswaError
from vswa_plugin.publishing.healing import Claim
from vswa_plugin.publishing.ledger import Ledger, LedgerOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire.events import Batch, ReuseReport, Source, decode
from vswa_plugin.wire.numbering import is_plausible

logger = logging.getLogger(__name__)

#: Engine events turned into wire events before the event loop gets a turn.
PASS_EVENTS = 2_000
#: Reports in one message; they are short.
REPORTS = 500


class PublisherOptions(msgspec.Struct, frozen=True):
    """Limits of one publisher.

    :param heartbeat_s: seconds between heartbeats.
    :param inbox_events: engine events that may wait for the event loop.
    :param queue_batches: encoded batches that may wait for the broker; the oldest go first.
    :param queue_bytes: the same in bytes.
    :param batch_bytes: larger batches are split; must stay below the broker's max payload.
    """

    heartbeat_s: float = 1.0
    inbox_events: int = 200_000
    queue_batches: int = 4_096
    queue_bytes: int = 64 << 20
    batch_bytes: int = 256 << 10


class PublisherStats(msgspec.Struct):
    """Counters since start, for /metrics and tests; what the ledger counts is in its own."""

    heartbeats: int = 0
    bytes: int = 0
    dropped_batches: int = 0
    send_errors: int = 0
    implausible_epochs: int = 0


class Superseded(StreamError):
    """Another publisher of the same rank has begun a higher epoch; this one must stop."""


class Sender(Protocol):
    """Where encoded batches go; raises ConnectError while it cannot take one."""

    def __call__(self, payload: bytes) -> Awaitable[None]: ...


def _never() -> bool:
    return False


class Publisher:
    """Publishes one rank. Constructing does nothing; :meth:`run` does all, until :meth:`close`.

    :param send: writes one encoded batch.
    :param observe: called with each batch and its source (the hook ``vswa_kv_batch``); must not raise.
    :param last_epoch: an epoch of this rank that is known from before; ours is higher.
    :param ready: whether ``send`` would return without waiting, which saves a turn of the loop.
    :param observe_stored: called with each event that stored blocks and the names of its leading blocks,
        before ``observe`` gets its batch (the hook ``vswa_kv_stored``); must not raise.
    :param memory: of the rank, as its engine states it.
    :param clock_ns: wall clock; ``clock``: monotonic seconds.
    """

    def __init__(
        self,
        source: Source,
        adapter: EventAdapter,
        residency: Residency,
        send: Sender,
        observe: Callable[[Source, Batch], None],
        options: PublisherOptions | None = None,
        last_epoch: int = 0,
        ready: Callable[[], bool] = _never,
        observe_stored: Callable[[Source, BlocksStored, Sequence[Node]], None] | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
        memory: Memory | None = None,
    ) -> None:
        self.source = source
        self.options = options or PublisherOptions()
        self.stats = PublisherStats()
        self.ledger = Ledger(
            str(source),
            residency,
            LedgerOptions(self.options.batch_bytes, self.options.heartbeat_s, memory=memory),
            clock_ns=clock_ns,
            clock=clock,
            last_epoch=last_epoch,
            observe_stored=None if observe_stored is None else self._show_stored,
        )
        self._clock_ns = clock_ns
        self._superseded: Batch | None = None
        self._adapter = with_prompts(adapter)
        #: Whether events were fed to the adapter of which more may follow.
        self._unsettled = False
        self._send = send
        self._ready = ready
        self._observe = observe
        self._observe_stored = observe_stored
        self._inbox: deque[RawEvent | Claim] = deque()
        self._reports: list[ReuseReport] = []
        self._overflowed = False
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._unobserved: deque[Callable[[], None]] = deque()
        self._failing = False
        self._sending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        #: What :meth:`run` waits for; a bare future, because each step of a wait costs latency.
        self._waiter: asyncio.Future[None] | None = None
        self._waking = False
        self._queue_filled = asyncio.Event()
        self._closing = False

    def offer(self, events: Sequence[RawEvent]) -> None:
        """Take the engine's events, from any thread; never waits, never raises."""
        if len(self._inbox) + len(events) > self.options.inbox_events:
            self._overflowed = True
        else:
            self._inbox.extend(events)
        self._wake_from_thread()

    def prompt(self, token_ids: Sequence[int], cache_salt: str | None, lora_name: str | None) -> None:
        """A request may go to this rank's engine: its adapter may name blocks by it. Event loop only."""
        try:
            if self._adapter.wants_prompts:
                self._adapter.prompt(token_ids, cache_salt, lora_name)
                self._wake()
        except VswaError as error:
            self.ledger.reject(error)

    def answer(self, payload: bytes) -> bytes:
        """The answer to a reader's replay or snapshot request. Event loop only."""
        return self.ledger.history.answer(payload)

    def on_foreign(self, payload: bytes) -> None:
        """A batch on our own subject that is not ours: where its epoch is higher, :meth:`run` ends."""
        try:
            batch = decode(payload)
        except ProtocolError as error:
            logger.warning("%s: another publisher uses the subject of this one: %s", self.source, error)
            return
        if batch.epoch <= self.ledger.epoch:
            return
        if not is_plausible(batch.epoch, self.ledger.epoch, self._clock_ns()):
            if not self.stats.implausible_epochs:
                logger.warning(
                    "%s: another publisher's epoch %d lies too far ahead of our clock, and is ignored "
                    "(further ones are only counted)",
                    *(self.source, batch.epoch),
                )
            self.stats.implausible_epochs += 1
            return
        self._superseded = batch
        self._wake()

    @property
    def waiting(self) -> int:
        """Engine events that wait for the event loop. Any thread."""
        return len(self._inbox)

    @property
    def engine_events(self) -> int:
        """How many events of the engine were taken in: what :attr:`Claim.mark` is counted in."""
        return self.ledger.healing.events

    @property
    def healing(self) -> bool:
        """Whether finished requests can prove blocks: only after events were lost."""
        return self.ledger.healing.active

    def claim(self, claim: Claim) -> None:
        """A finished request proves blocks; of use only while :attr:`healing`. Event loop only."""
        if self.healing:
            self._inbox.append(claim)
            self._wake()

    def report(self, report: ReuseReport) -> None:
        """A request has ended: routers that do not see its answer learn what was reused. Event loop only."""
        self._reports.append(report)
        self._wake()

    async def run(self) -> None:
        """Publish until :meth:`close`. First is the layout, corrected by what is in the inbox already.

        :raises Superseded: another publisher has a higher epoch of this rank.
        """
        self._loop = asyncio.get_running_loop()
        sender = asyncio.create_task(self._send_queue(), name=f"send {self.source}")
        self._read_inbox()  # what came before the first batch, so that event 0 is the engine's own layout
        self.ledger.begin()
        self._publish()
        try:
            next_heartbeat = self._loop.time()
            while not self._closing:
                if self._superseded is not None:
                    raise Superseded(
                        f"{self.source}: another publisher has epoch {self._superseded.epoch}, ours is "
                        f"{self.ledger.epoch}; is a worker running twice with the same id?"
                    )
                self._drain()
                if self._loop.time() >= next_heartbeat:
                    self._enqueue(self.ledger.heartbeat())
                    self.stats.heartbeats += 1
                    next_heartbeat = self._loop.time() + self.options.heartbeat_s
                await self._hand_over()
                if self._inbox or self._overflowed or not self._prepare():
                    await asyncio.sleep(0)
                    continue
                await self._pause(next_heartbeat)
            while self._inbox or self._overflowed or self._reports:
                self._drain()
        finally:
            self._closing = True
            self._queue_filled.set()
            await sender
            self._tell_observers()

    def _prepare(self) -> bool:
        """Do pieces of what is better done before it is needed; False where more of it is left."""
        try:
            prepared = self._adapter.prepare()
        except VswaError as error:
            self.ledger.reject(error)
            prepared = True
        return self.ledger.healing.prepare() and prepared

    async def _hand_over(self) -> None:
        """Send a lone batch here, without a turn of the loop, or let the sending task do it."""
        if len(self._queue) == 1 and not self._sending and self._ready():
            await self._send_next()
        elif self._queue:
            self._queue_filled.set()
        self._tell_observers()

    def close(self) -> None:
        """Ask :meth:`run` to publish what is in the inbox and return. Any thread."""
        self._closing = True
        self._wake_from_thread()

    async def _pause(self, until: float) -> None:
        """Sleep until that time of the loop, or until woken."""
        assert self._loop is not None
        self._waiter = self._loop.create_future()
        timer = self._loop.call_at(until, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        self._waking = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _wake_from_thread(self) -> None:
        # One wake-up on its way is enough: it finds all that is in the inbox by then.
        if self._loop is not None and not self._waking:
            self._waking = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has stopped
                self._loop.call_soon_threadsafe(self._wake)

    def _drain(self) -> None:
        self._read_inbox()
        self._publish()
        while self._reports:
            self._enqueue(self.ledger.heartbeat(self._reports[:REPORTS]))
            del self._reports[:REPORTS]

    def _publish(self) -> None:
        for published in self.ledger.flush():
            self._enqueue(published.payload)
            self._unobserved.append(partial(self._observe, self.source, published.batch))

    def _read_inbox(self) -> None:
        """Enter what waits into the ledger."""
        ledger = self.ledger
        if self._overflowed:
            self._overflowed = False
            self._inbox.clear()
            ledger.lose(f"over {self.options.inbox_events} engine events waited: the loop was held up")
        for item in self._take():
            if isinstance(item, Claim):
                ledger.prove(item)
                continue
            ledger.healing.events += 1
            self._unsettled = True
            self._enter(self._adapter.feed, item)
        if self._unsettled and not self._inbox:  # an engine offers all events of a step at once
            self._unsettled = False
            self._enter(self._adapter.settle)

    def _enter(self, read: Callable[..., list[EngineEvent]], *item: RawEvent) -> None:
        """Enter what the adapter makes of the engine's events."""
        ledger = self.ledger
        try:
            events = read(*item)
        except VswaError as error:
            ledger.reject(error)
            ledger.lose(f"an engine event could not be read: {error}")
            return
        for event in events:
            try:
                ledger.add(event)
            except VswaError as error:
                ledger.reject(error)

    def _show_stored(self, event: BlocksStored, nodes: Sequence[Node]) -> None:
        assert self._observe_stored is not None
        self._unobserved.append(partial(self._observe_stored, self.source, event, nodes))

    def _take(self) -> Iterator[RawEvent | Claim]:
        """Up to :data:`PASS_EVENTS` waiting events: the loop has other work too, heartbeats above all."""
        for _ in range(PASS_EVENTS):
            if not self._inbox:
                return
            yield self._inbox.popleft()

    def _tell_observers(self) -> None:
        """After sending: what observers do with a batch must not delay it."""
        while self._unobserved:
            self._unobserved.popleft()()

    def _enqueue(self, payload: bytes) -> None:
        self._queue.append(payload)
        self._queued_bytes += len(payload)
        limits = self.options
        while len(self._queue) > limits.queue_batches or self._queued_bytes > limits.queue_bytes:
            self._queued_bytes -= len(self._queue.popleft())
            self.stats.dropped_batches += 1

    async def _send_queue(self) -> None:
        while True:
            if not self._queue:
                if self._closing:
                    return
                self._queue_filled.clear()
                await self._queue_filled.wait()
            elif not await self._send_next():
                if self._closing:
                    return
                await asyncio.sleep(0.1)

    async def _send_next(self) -> bool:
        """Send the first batch of the queue; False where it was lost because the broker is away."""
        payload = self._queue.popleft()
        self._queued_bytes -= len(payload)
        self._sending = True
        try:
            await self._send(payload)
        except ConnectError as error:
            self.stats.send_errors += 1
            if not self._failing:
                logger.warning("%s: batches are dropped while the broker is away: %s", self.source, error)
            self._failing = True
            return False
        finally:
            self._sending = False
        self.stats.bytes += len(payload)
        self._failing = False
        return True


def check_batch_bytes(options: PublisherOptions, max_payload: int) -> PublisherOptions:
    """``options`` that fit a broker which takes ``max_payload`` bytes a message."""
    if max_payload <= 0:
        raise InvariantError(f"expected a broker with a max payload, got {max_payload}")
    return msgspec.structs.replace(options, batch_bytes=min(options.batch_bytes, max_payload * 3 // 4))
