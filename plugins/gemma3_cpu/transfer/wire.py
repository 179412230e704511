"""One connection with a bound on every wait. Blocking: for threads of its own, never for an event loop."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import msgspec

from .messages import LENGTH, Ack, BlocksHeader, Done, Nack, Pull, PullRefused, frame, payload_length

T = TypeVar("T")


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds.

    :param connect_s: until the connection stands.
    :param io_s: for one message, or the raw bytes of one run (4 MiB), as a whole, however slowly they come.
    :param total_s: for the whole transfer from the connection on.
    """

    connect_s: float = 2.0
    io_s: float = 10.0
    total_s: float = 60.0


class Connection:
    """Sends and receives messages and raw bytes.

    All methods raise TimeoutError (a wait is over), ConnectionError (the peer has gone) or ProtocolError.
    """

    def __init__(self, peer: socket.socket, timeouts: Timeouts) -> None:
        self._socket = peer
        self._timeouts = timeouts
        self._end = time.monotonic() + timeouts.total_s
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            # Says "nothing more" before a close that, with bytes unread, would only reset.
            self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()

    def send(self, message: Pull | PullRefused | BlocksHeader | Done | Ack | Nack) -> None:
        self.send_bytes(frame(message))

    def send_bytes(self, data: bytes | memoryview) -> None:
        self._limit(self._until(None), "the peer takes nothing")
        try:
            # One time-out for all of ``data``, however slowly the peer takes it.
            self._socket.sendall(data)
        except TimeoutError as error:
            raise TimeoutError(f"the peer did not take {len(data)} bytes in time") from error

    def receive(self, decode: Callable[[bytearray], T], within_s: float | None = None) -> T:
        """The next message; ``within_s`` instead of ``io_s``."""
        until = self._until(within_s)
        prefix = bytearray(LENGTH.size)
        self._fill(memoryview(prefix), until)
        payload = bytearray(payload_length(prefix))
        self._fill(memoryview(payload), until)
        return decode(payload)

    def receive_bytes(self, into: memoryview) -> None:
        """Fill ``into`` with raw bytes."""
        self._fill(into, self._until(None))

    def _fill(self, into: memoryview, until: float) -> None:
        received = 0
        while received < len(into):
            self._limit(until, f"got {received} of {len(into)} bytes")
            try:
                count = self._socket.recv_into(into[received:])
            except TimeoutError as error:
                raise TimeoutError(f"got {received} of {len(into)} bytes in time") from error
            if not count:
                raise ConnectionResetError(
                    f"the peer closed the connection after {received} of {len(into)} bytes"
                )
            received += count

    def _until(self, within_s: float | None) -> float:
        wait = self._timeouts.io_s if within_s is None else within_s
        return min(time.monotonic() + wait, self._end)

    def _limit(self, until: float, what: str) -> None:
        remaining = until - time.monotonic()
        if remaining <= 0:
            raise TimeoutError(f"{what}: the time for the transfer is over")
        self._socket.settimeout(remaining)
