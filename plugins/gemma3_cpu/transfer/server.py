"""The prefill side: offers finished blocks and serves each once, in threads of its own.

Neither the worker's event loop nor the engine's thread ever waits for a peer: :meth:`TransferServer.offer`
only writes into the ticket book. One thread accepts, one frees what was not fetched in time, and one per
connection, of which there are only so many: peers.py says who makes room for whom.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Sequence

import msgspec

from vswa_plugin.errors import ConfigError, ProtocolError, Unavailable

from .messages import Nack, Pull, PullRefused, clip, decode_pull, decode_verdict
from .peers import Peers
from .serving import Offer, Refusal, send_blocks, wrong_fingerprint
from .tickets import Outcome, TicketBook, TicketCounts
from .wire import Connection, Timeouts

logger = logging.getLogger(__name__)

#: The same answer to a wrong ticket, a used one and one that is too late.
UNKNOWN_TICKET = "the ticket is unknown, used or past its deadline"
_BACKLOG = 128


class ServerOptions(msgspec.Struct, frozen=True):
    """Limits of one server.

    :param max_connections: served at a time.
    :param hello_s: seconds within which a peer must have said what it wants.
    :param stop_s: seconds that :meth:`TransferServer.stop` waits for its threads.
    """

    max_connections: int = 16
    hello_s: float = 3.0
    stop_s: float = 5.0
    timeouts: Timeouts = Timeouts()


class TransferServer:
    """Serves the offers of one prefill worker.

    :param host: address to listen on; the loopback address serves workers on one machine.
    :param port: 0 for a free one.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        book: TicketBook[Offer] | None = None,
        options: ServerOptions | None = None,
    ) -> None:
        self._address = (host, port)
        self._book: TicketBook[Offer] = TicketBook() if book is None else book
        self._options = options or ServerOptions()
        self._lock = threading.Lock()
        #: Notified under the lock: another first deadline, a peer that spoke or left, or the end.
        self._changed = threading.Condition(self._lock)
        self._stopping = False
        self._peers = Peers(self._options.max_connections)
        self._serving: dict[socket.socket, threading.Thread] = {}
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) that it listens on, from :meth:`start` on with the real port."""
        return self._address

    def start(self) -> None:
        """Listen. Call once.

        :raises ConfigError: the address cannot be listened on.
        """
        host, port = self._address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server(self._address, family=family, backlog=_BACKLOG)
            self._address = self._listener.getsockname()[:2]
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"KV transfer: expected an address of this machine with a free port, got {host}:{port}: "
                f"{error}; choose another, or port 0 for any free one"
            ) from error
        for name, target in (("accept", self._accept), ("expire", self._expire)):
            thread = threading.Thread(target=target, name=f"kv transfer {name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Cut what is under way, free every offer, end the threads. Stopping twice does nothing.

        Not from within ``released``. An offer whose ``read`` hangs is freed when that returns.
        """
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            open_offers = self._book.close()
            self._changed.notify_all()
            serving = dict(self._serving)
        _shut_down([*serving, *([self._listener] if self._listener else [])])
        end = time.monotonic() + self._options.stop_s
        for thread in (*self._threads, *serving.values()):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                logger.warning(
                    "%s still runs %s s after its end was asked for", thread.name, self._options.stop_s
                )
        if self._listener is not None:
            self._listener.close()
        self._release(open_offers, Outcome.STOPPED)

    def offer(self, offer: Offer, deadline_s: float) -> str:
        """Hold the blocks of ``offer`` for the holder of the ticket, for ``deadline_s`` seconds.

        From any thread; returns at once. The ticket is a secret: not for logs.

        :raises Unavailable: the server has stopped; nothing is held, ``released`` is not called.
        """
        with self._lock:
            if self._stopping:
                raise Unavailable(
                    "KV transfer: expected a running server, this one has stopped; try another worker"
                )
            ticket = self._book.offer(offer, deadline_s)
            self._changed.notify_all()
            return ticket

    def withdraw(self, ticket: str, outcome: Outcome) -> bool:
        """Take back an offer that nobody has begun to fetch; whether it was there. From any thread."""
        with self._lock:
            offer = self._book.withdraw(ticket, outcome)
        if offer is None:
            return False
        _call_released(ticket, offer, outcome, (0,) * len(offer.groups))
        return True

    def counts(self) -> TicketCounts:
        """From any thread."""
        with self._lock:
            return self._book.counts()

    def _expire(self) -> None:
        while True:
            with self._lock:
                if self._stopping:
                    return
                expired = self._book.expire()
                if not expired:
                    deadline = self._book.next_deadline()
                    self._changed.wait(None if deadline is None else self._seconds_until(deadline))
            self._release(expired, Outcome.EXPIRED)

    def _seconds_until(self, deadline: float) -> float:
        # A deadline in the far future is looked at again: there is a longest wait.
        return min(max(0.0, deadline - self._book.clock()), 3600.0)

    def _release(self, entries: Sequence[tuple[str, Offer]], outcome: Outcome) -> None:
        for ticket, offer in entries:
            if outcome is Outcome.EXPIRED:
                logger.warning("no decode worker fetched the blocks of a prompt in time; they are freed")
            _call_released(ticket, offer, outcome, (0,) * len(offer.groups))

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                peer, address = self._listener.accept()
            except OSError as error:
                with self._lock:
                    if self._stopping:
                        return
                    logger.warning("KV transfer: cannot accept a connection: %s; trying again", error)
                    # Out of file descriptors, mostly: trying again at once would only burn a core.
                    self._changed.wait(0.1)
                continue
            self._begin(peer, str(address[0]), f"{address[0]}:{address[1]}")

    def _begin(self, peer: socket.socket, host: str, name: str) -> None:
        thread = threading.Thread(
            target=self._serve, args=(peer, host, name), name=f"kv transfer to {name}", daemon=True
        )
        with self._lock:
            if self._make_room(host):
                try:
                    # Under the lock: stop() joins only threads that run.
                    thread.start()
                    self._serving[peer] = thread
                    self._peers.enter(peer, host)
                    return
                except RuntimeError as error:
                    logger.warning("KV transfer: cannot serve %s: %s", name, error)
        peer.close()

    def _make_room(self, host: str) -> bool:
        """Wait for a place, or take that of a peer that says nothing; False: this one is not served."""
        while not self._stopping and not self._peers.is_barred(host):
            if not self._peers.full:
                return True
            silent = self._peers.displace()
            if isinstance(silent, socket.socket):
                _shut_down([silent])
            else:
                self._changed.wait(self._peers.next_silent())
        return False

    def _serve(self, peer: socket.socket, host: str, name: str) -> None:
        try:
            with peer, Connection(peer, self._options.timeouts) as connection:
                self._answer(connection, peer, host, name)
        except OSError as error:
            logger.info("KV transfer: %s: %s", name, error)
        finally:
            with self._lock:
                self._serving.pop(peer, None)
                self._peers.leave(peer)
                self._changed.notify_all()

    def _answer(self, connection: Connection, peer: socket.socket, host: str, name: str) -> None:
        try:
            pull = connection.receive(decode_pull, within_s=self._options.hello_s)
        except ProtocolError as error:
            logger.warning("KV transfer: refused %s: %s", name, error)
            connection.send(PullRefused(clip(str(error))))
            return
        with self._lock:
            offered = self._book.peek(pull.ticket)
        if offered is not None and pull.fingerprint != offered.fingerprint:
            self._refuse_fingerprint(connection, pull, offered, name)
            return
        with self._lock:
            offer = self._book.take(pull.ticket)
            if offer is None:
                self._peers.wrong(host)
            else:
                self._peers.spoke(peer)
        if offer is None:
            logger.info("KV transfer: refused %s: %s", name, UNKNOWN_TICKET)
            connection.send(PullRefused(UNKNOWN_TICKET))
            return
        self._transfer(connection, pull, offer, name)

    def _refuse_fingerprint(self, connection: Connection, pull: Pull, offer: Offer, name: str) -> None:
        """Free the blocks where the decode worker gives the prompt up; others leave the ticket good."""
        reason = str(wrong_fingerprint(pull, offer))
        logger.warning("KV transfer: refused %s: %s", name, reason)
        connection.send(PullRefused(clip(reason)))
        try:
            verdict = connection.receive(decode_verdict, within_s=self._options.hello_s)
        except ProtocolError:
            return
        with self._lock:
            taken = self._book.take(pull.ticket) if isinstance(verdict, Nack) else None
        if taken is not None:
            self._finish(pull.ticket, Outcome.FAILED, (0,) * len(offer.groups))

    def _transfer(self, connection: Connection, pull: Pull, offer: Offer, name: str) -> None:
        sent = [0] * len(offer.groups)
        outcome = Outcome.FAILED
        try:
            send_blocks(connection, pull, offer, sent)
            outcome = Outcome.ACKNOWLEDGED
        except (Refusal, ProtocolError) as error:
            logger.warning("KV transfer: refused %s: %s", name, error)
            _refuse(connection, str(error))
        except OSError as error:
            logger.warning("KV transfer: lost %s after %s bytes: %s", name, sum(sent), error)
        except Exception as error:
            logger.exception("KV transfer: the blocks for %s could not be read", name)
            _refuse(connection, f"the blocks could not be read: {type(error).__name__}")
        finally:
            self._finish(pull.ticket, outcome, tuple(sent))

    def _finish(self, ticket: str, outcome: Outcome, sent: tuple[int, ...]) -> None:
        with self._lock:
            if self._stopping and outcome is Outcome.FAILED:
                outcome = Outcome.STOPPED
            offer = self._book.finish(ticket, outcome)
        if offer is not None:
            _call_released(ticket, offer, outcome, sent)


def _refuse(connection: Connection, reason: str) -> None:
    with contextlib.suppress(OSError):
        connection.send(PullRefused(clip(reason)))


def _call_released(ticket: str, offer: Offer, outcome: Outcome, sent: tuple[int, ...]) -> None:
    try:
        offer.released(ticket, outcome, sent)
    except Exception:
        logger.exception("the callback of an offer failed; its blocks may stay held")


def _shut_down(sockets: Sequence[socket.socket]) -> None:
    """Wake the threads that wait on them."""
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
