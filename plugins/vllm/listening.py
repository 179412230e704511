"""The engine's event batches, received in a thread of its own, in order, and handed on by rank.

Each engine core publishes on a ZeroMQ socket, see :mod:`.frames`. A subscriber that is slow to join misses
the first batches without a sign, and one that misses the last ones finds out with the next. So what is
missing is also asked for where nothing has shown it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vswa_plugin.engine import EventSink
from vswa_plugin.errors import ProtocolError

from .adapter import lost
from .frames import END, Action, Ask, Batch, BatchOrder, Lost, answered, events_of, question, subscribed
from .sockets import Sockets

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger(__name__)

#: What becomes of the connection to a rank: it has been reached; what its publisher still keeps of earlier
#: batches has been handed on; it is gone.
REACHED, CAUGHT_UP, GONE = "reached", "caught up", "gone"
#: How often a watched publisher has to show that it is there, and how long it may fail to.
HEARTBEAT_MS, DEAD_MS = 2_000, 10_000
#: The longest pause between two tries to connect.
RECONNECT_MS = 1_000
#: More is no message of an engine.
MAX_MESSAGE = 256 << 20
#: How long the thread waits for a batch before it looks at anything else.
POLL_MS = 100
#: How long a rank may be silent before it is asked whether there was more.
QUIET_S = 1.0
#: How long the next message of an answer may take: an engine that is idle looks every 0.1 s.
ANSWER_S = 5.0
#: How long the thread may take to end.
JOIN_S = 3 * ANSWER_S


class _Feed:
    """One rank: its sockets, and what has come of it."""

    def __init__(self, context: zmq.Context[Any], rank: int, sockets: Sockets, watched: bool) -> None:
        import zmq

        self.rank, self.sockets = rank, sockets
        #: Whether it can be asked; one that is not watched can from the start.
        self.reached = not watched
        self.caught_up = self.complained = False
        self.order = BatchOrder()
        #: When it is asked for more unless a batch comes; None: it has said that there is none.
        self.ask_at: float | None = None
        self.subscription = context.socket(zmq.SUB)
        self.subscription.setsockopt(zmq.RCVHWM, 0)
        self.subscription.setsockopt(zmq.SUBSCRIBE, b"")
        self.subscription.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        self.monitor: zmq.Socket[Any] | None = None
        if watched:
            self.subscription.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            self.subscription.setsockopt(zmq.HEARTBEAT_TIMEOUT, DEAD_MS)
            self.subscription.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS)
            kinds = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
            self.monitor = self.subscription.get_monitor_socket(kinds)
        self.subscription.connect(sockets.endpoint)

    def connection_changes(self) -> Iterator[str]:
        """What has become of the connection since the last call."""
        import zmq
        from zmq.utils.monitor import recv_monitor_message

        while self.monitor is not None and self.monitor.poll(0):
            is_there = recv_monitor_message(self.monitor)["event"] == zmq.Event.HANDSHAKE_SUCCEEDED
            if is_there != self.reached:
                self.reached = is_there
                yield REACHED if is_there else GONE

    def close(self) -> None:
        if self.monitor is not None:
            self.subscription.disable_monitor()


class EventListener:
    """Receives from :meth:`start` to :meth:`stop`, and hands on to ``sink``.

    :param sockets: of each rank, to connect to.
    :param check: what is wrong with an event, which ends the engine; None: nothing.
    :param fail: called once with the reason why the engine cannot go on.
    :param ranks: the numbers of the ranks; None: from 0.
    :param watch: for publishers of other processes, called with a rank and what has become of it: one of
        :data:`REACHED`, :data:`CAUGHT_UP` and :data:`GONE`.
    :ivar events: handed on so far; ``batches``, ``repaired_batches`` and ``lost_batches`` likewise.
    :ivar unreadable_messages: that are none of vLLM's; the first one of a rank is logged.
    """

    def __init__(
        self,
        sockets: Sequence[Sockets],
        sink: EventSink,
        check: Callable[[object], str | None],
        fail: Callable[[str], None],
        ranks: Sequence[int] | None = None,
        watch: Callable[[int, str], None] | None = None,
    ) -> None:
        self._sockets = dict(zip(range(len(sockets)) if ranks is None else ranks, sockets, strict=True))
        self._watch = watch
        self._sink = sink
        self._check = check
        self._fail = fail
        self.events = self.batches = self.repaired_batches = self.lost_batches = 0
        self.unreadable_messages = 0
        self._published = threading.Event()
        self._stopping = threading.Event()
        self._last_look = True
        self._thread = threading.Thread(target=self._run, name="kv events", daemon=True)

    def start(self) -> None:
        """Subscribe; the engine need not have begun to publish."""
        self._thread.start()

    def published(self) -> None:
        """The engine publishes now: from here on it can be asked."""
        self._published.set()

    def stop(self, *, look: bool) -> None:
        """Take what is there and end. Called once.

        :param look: whether the engine still lives, and is asked for what has not come yet.
        """
        self._last_look = look
        self._stopping.set()
        self._thread.join(JOIN_S)
        if self._thread.is_alive():
            logger.warning("the last KV events have not come within %.0f s", JOIN_S)

    def _run(self) -> None:
        import zmq

        context: zmq.Context[Any] = zmq.Context()
        feeds: list[_Feed] = []
        try:
            watched = self._watch is not None
            feeds = [_Feed(context, rank, each, watched) for rank, each in self._sockets.items()]
            poller = zmq.Poller()
            for feed in feeds:
                poller.register(feed.subscription, zmq.POLLIN)
                if feed.monitor is not None:
                    poller.register(feed.monitor, zmq.POLLIN)
            while not self._stopping.is_set():
                ready = dict(poller.poll(POLL_MS))
                for feed in feeds:
                    for change in feed.connection_changes():
                        self._changed(feed, change)
                    if feed.subscription in ready:
                        self._receive(context, feed)
                    self._look(context, feed)
            for feed in feeds if self._watch is None else ():
                self._receive(context, feed)
                if self._last_look and self._published.is_set():
                    self._do(context, feed, feed.order.ask())
        except Exception as error:
            logger.exception("the thread that receives KV events has ended")
            self._fail(f"the thread that receives KV events has ended: {type(error).__name__}: {error}")
        finally:
            for feed in feeds:
                feed.close()
            context.destroy(linger=0)

    def _receive(self, context: zmq.Context[Any], feed: _Feed) -> None:
        """All batches that wait."""
        while feed.subscription.poll(0):
            try:
                batch = subscribed(feed.subscription.recv_multipart())
            except ProtocolError as error:
                self._cannot_read(feed, f"a message of its events cannot be read: {error}")
                continue
            feed.ask_at = time.monotonic() + QUIET_S
            self._do(context, feed, feed.order.came(batch))

    def _look(self, context: zmq.Context[Any], feed: _Feed) -> None:
        """Ask a rank that has become quiet; one that has never said anything, again and again."""
        now = time.monotonic()
        if (
            not feed.reached
            or not self._published.is_set()
            or (feed.ask_at is not None and now < feed.ask_at)
        ):
            return
        if feed.ask_at is None and feed.order.expected:
            return
        self._do(context, feed, feed.order.ask())
        # Once more after the first time: the subscription may have begun only after the answer.
        again = not feed.order.expected or not feed.caught_up
        feed.ask_at = time.monotonic() + QUIET_S if again else None
        if not feed.caught_up:
            feed.caught_up = True
            self._changed(feed, CAUGHT_UP)

    def _changed(self, feed: _Feed, change: str) -> None:
        if self._watch is not None:
            self._watch(feed.rank, change)

    def _cannot_read(self, feed: _Feed, what: str) -> None:
        self.unreadable_messages += 1
        if not feed.complained:
            feed.complained = True
            logger.error("rank %d: %s (further ones are only counted)", feed.rank, what)

    def _do(self, context: zmq.Context[Any], feed: _Feed, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Lost):
                self._lose(feed, action)
            elif isinstance(action, Ask):
                before = self.batches
                for again in self._answer(context, feed, action.start):
                    self._do(context, feed, feed.order.again(again))
                self.repaired_batches += self.batches - before
                self._do(context, feed, feed.order.answer_ended())
            else:
                self._hand_on(feed, action.batch)

    def _answer(self, context: zmq.Context[Any], feed: _Feed, start: int) -> Iterator[Batch]:
        """The batches from ``start`` on that the publisher has; on a new socket, without old answers."""
        import zmq

        if not feed.sockets.replay_endpoint:
            return
        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.connect(feed.sockets.replay_endpoint)
            socket.send_multipart(question(start))
            while self._comes(socket):
                try:
                    batch = answered(socket.recv_multipart())
                except ProtocolError as error:
                    self._cannot_read(feed, f"an answer about its events cannot be read: {error}")
                    return
                if batch.number == END:
                    return
                yield batch
            if not self._stopping.is_set():
                logger.warning(
                    "rank %d: vLLM has not answered for %.0f s when asked for its events from batch %d on",
                    feed.rank,
                    ANSWER_S,
                    start,
                )

    def _comes(self, socket: zmq.Socket[Any]) -> bool:
        """Whether a message comes in time; one that is there is taken also while this listener stops."""
        deadline = time.monotonic() + ANSWER_S
        while not socket.poll(POLL_MS):
            if time.monotonic() > deadline or (self._stopping.is_set() and not self._last_look):
                return False
        return True

    def _hand_on(self, feed: _Feed, batch: Batch) -> None:
        try:
            events = events_of(batch.payload, feed.rank)
        except ProtocolError as error:
            self._cannot_read(feed, f"batch {batch.number} cannot be read: {error}")
            self._lose(feed, Lost(batch.number, batch.number + 1))
            return
        for event in events:
            if (wrong := self._check(event)) is not None:
                self._fail(wrong)
        self.batches += 1
        self.events += len(events)
        self._sink(feed.rank, events)

    def _lose(self, feed: _Feed, action: Lost) -> None:
        logger.warning(
            "rank %d: event batches from %d to %d are lost: vLLM does not have them any more",
            feed.rank,
            action.expected,
            action.got - 1,
        )
        self.lost_batches += max(1, action.got - action.expected)
        self._sink(feed.rank, [lost(action.expected, action.got)])
