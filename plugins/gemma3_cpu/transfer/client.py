"""The decode side: fetch blocks with a ticket, check each run, then store it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from vswa_plugin.errors import ProtocolError

from .errors import Cause, TransferError
from .messages import VERSION, Ack, BlocksHeader, Done, Nack, Pull, PullRefused, checksum, clip, decode_answer
from .plan import GroupBlocks
from .wire import Connection, Timeouts


class WriteBlocks(Protocol):
    def __call__(self, group: int, first: int, data: memoryview, /) -> None:
        """Store whole blocks of a group from block ``first`` on. ``data`` is valid during the call only."""


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to fetch, from where, and where to put it.

    :param address: (host, port) of the prefill worker's server.
    :param groups: wanted blocks per cache group, in order; empty ranges where nothing is lacking. A request
        for nothing at all is of use too: it lets the prefill side free its blocks at once.
    :param write: called from the pulling thread, for checked runs only, each block once, in order.
    """

    address: tuple[str, int]
    ticket: str = field(repr=False)
    fingerprint: str
    groups: tuple[GroupBlocks, ...]
    write: WriteBlocks


@dataclass(frozen=True, slots=True)
class PullResult:
    """Raw bytes that came per cache group, and how long it took."""

    bytes_per_group: tuple[int, ...]
    seconds: float


class Cancellation:
    """Ends a pull from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Returns at once; the pull may store one more run before it raises."""
        with self._lock:
            self._cancelled = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def covers(self, peer: socket.socket) -> Iterator[None]:
        """Shut ``peer`` down when cancelled; never once it is closed, as its descriptor may be reused."""
        with self._lock:
            if self._cancelled:
                raise ConnectionAbortedError("cancelled")
            self._socket = peer
        try:
            yield
        finally:
            with self._lock:
                self._socket = None


class _Failure(Exception):
    """Why the transfer ends."""

    def __init__(self, cause: Cause, what: str) -> None:
        super().__init__(what)
        self.cause = cause


def pull(
    request: PullRequest, timeouts: Timeouts | None = None, cancellation: Cancellation | None = None
) -> PullResult:
    """Fetch, check and store all blocks of ``request``; acknowledged only after the last is stored. Blocks.

    :raises TransferError: the message states the reason; some of the blocks may have been written.
    """
    started = time.monotonic()
    cancellation = cancellation or Cancellation()
    try:
        moved = _pull(request, timeouts or Timeouts(), cancellation)
    except (_Failure, ProtocolError, OSError) as error:
        if cancellation.cancelled:
            raise TransferError("cancelled", request.address, "cancelled") from error
        raise TransferError(_cause(error), request.address, str(error)) from error
    return PullResult(moved, time.monotonic() - started)


def _cause(error: _Failure | ProtocolError | OSError) -> Cause:
    if isinstance(error, _Failure):
        return error.cause
    if isinstance(error, ProtocolError):
        return "protocol"
    return "timeout" if isinstance(error, TimeoutError) else "lost"


def _pull(request: PullRequest, timeouts: Timeouts, cancellation: Cancellation) -> tuple[int, ...]:
    try:
        peer = socket.create_connection(request.address, timeouts.connect_s)
    except (OSError, UnicodeError, OverflowError) as error:
        raise _Failure(
            "connect",
            f"expected a connection within {timeouts.connect_s} s, got: {error}; is the worker alive?",
        ) from error
    with peer, Connection(peer, timeouts) as connection, cancellation.covers(peer):
        try:
            return _fetch(connection, request)
        except (_Failure, ProtocolError) as error:
            with contextlib.suppress(OSError):
                connection.send(Nack(clip(str(error))))
            raise


def _fetch(connection: Connection, request: PullRequest) -> tuple[int, ...]:
    ranges = tuple(group.bounds for group in request.groups)
    connection.send(Pull(VERSION, request.ticket, request.fingerprint, ranges))
    # As large as this side's own plan needs, whatever size the peer announces.
    buffer = memoryview(bytearray(max((group.run_bytes for group in request.groups), default=0)))
    moved = [0] * len(request.groups)
    for index, group in enumerate(request.groups):
        first, stop = group.bounds
        while first < stop:
            answer = _receive(connection)
            header = _check_header(answer, index, range(first, stop), group.block_bytes, len(buffer))
            data = buffer[: header.nbytes]
            _receive_run(connection, header, data)
            _write(request, index, first, data)
            moved[index] += header.nbytes
            first += header.count
    _check_done(_receive(connection), sum(moved))
    connection.send(Ack(sum(moved)))
    return tuple(moved)


def _receive(connection: Connection) -> BlocksHeader | Done:
    answer = connection.receive(decode_answer)
    if isinstance(answer, PullRefused):
        raise _Failure("refused", f"refused (its transfer version is {answer.version}): {answer.reason!r}")
    return answer


def _check_header(
    answer: BlocksHeader | Done, group: int, missing: range, block_bytes: int, room: int
) -> BlocksHeader:
    """The header of a run that begins with the first missing block and ends with or before the last."""
    where = f"cache group {group}: expected blocks from {missing.start} to {missing.stop}"
    if isinstance(answer, Done):
        raise _Failure("protocol", f"{where}, got the end of the transfer")
    h = answer
    if (h.group, h.first) != (group, missing.start) or not 1 <= h.count <= len(missing):
        raise _Failure("protocol", f"{where}, got {h.count} blocks from {h.first} of cache group {h.group}")
    if h.nbytes != h.count * block_bytes or h.nbytes > room:
        raise _Failure(
            "protocol",
            f"{where} in runs of at most {room} bytes, {block_bytes} each, got {h.count} in {h.nbytes} bytes",
        )
    return h


def _receive_run(connection: Connection, header: BlocksHeader, data: memoryview) -> None:
    connection.receive_bytes(data)
    actual = checksum(data)
    if actual != header.checksum:
        raise _Failure(
            "corrupt",
            f"cache group {header.group}, {header.count} blocks from {header.first}: expected checksum "
            f"{header.checksum:016x}, got {actual:016x}",
        )


def _write(request: PullRequest, group: int, first: int, data: memoryview) -> None:
    try:
        request.write(group, first, data.toreadonly())
    except Exception as error:
        raise _Failure(
            "write",
            f"cache group {group}, blocks from {first} could not be stored: {type(error).__name__}: {error}",
        ) from error


def _check_done(answer: BlocksHeader | Done, total: int) -> None:
    if not isinstance(answer, Done):
        raise _Failure("protocol", f"expected the end of the transfer after {total} bytes, got more blocks")
    if answer.total != total:
        raise _Failure("protocol", f"expected {total} bytes in all, the prefill worker counts {answer.total}")
