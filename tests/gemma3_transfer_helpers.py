"""Both sides of a KV transfer on loopback, and peers that misbehave.

:class:`Prefill` checks of itself, when it stops, that every offer was released exactly once and that no
ticket was logged.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from vswa_plugins.gemma3_cpu.transfer.client import PullRequest, PullResult, pull
from vswa_plugins.gemma3_cpu.transfer.messages import (
    VERSION,
    BlocksHeader,
    Done,
    Pull,
    checksum,
    decode_answer,
    decode_pull,
)
from vswa_plugins.gemma3_cpu.transfer.plan import GroupBlocks
from vswa_plugins.gemma3_cpu.transfer.server import ServerOptions, TransferServer
from vswa_plugins.gemma3_cpu.transfer.serving import BytesLike, Offer, ReadBlocks
from vswa_plugins.gemma3_cpu.transfer.tickets import Outcome
from vswa_plugins.gemma3_cpu.transfer.wire import Connection, Timeouts

FINGERPRINT = "gemma3_cpu model=1 dtype=float32 block_size=32 groups=512:24,global:40"
#: A sliding group that holds its last window, and a global one.
OFFERED = (GroupBlocks(range(6, 10), 24), GroupBlocks(range(10), 40))
#: More than the buffers of both sockets take.
HUGE = (GroupBlocks(range(32), 1 << 20),)
FULL = tuple(group.bounds for group in OFFERED)
TOTAL = 4 * 24 + 10 * 40
QUICK = Timeouts(connect_s=1.0, io_s=0.25, total_s=2.0)
PATIENT = Timeouts(connect_s=5.0, io_s=5.0, total_s=10.0)
Release = tuple[str, Outcome, tuple[int, ...]]


def content(group: int, block: int, size: int) -> bytes:
    """The bytes of one block: no two blocks are equal."""
    return bytes((group * 101 + block * 7 + i) % 256 for i in range(size))


def read_offered(group: int, first: int, stop: int) -> BytesLike:
    return b"".join(content(group, block, OFFERED[group].block_bytes) for block in range(first, stop))


def read_huge(group: int, first: int, stop: int) -> bytes:
    return bytes((stop - first) << 20)


def ask(connection: Connection, ticket: str, ranges: tuple[tuple[int, int], ...] = FULL) -> None:
    connection.send(Pull(VERSION, ticket, FINGERPRINT, ranges))


def read_all(connection: Connection) -> int:
    """Bytes of all runs up to the end of the transfer."""
    total = 0
    while isinstance(answer := connection.receive(decode_answer), BlocksHeader):
        connection.receive_bytes(memoryview(bytearray(answer.nbytes)))
        total += answer.nbytes
    assert Done(total) == answer
    return total


def header(group: int, first: int, count: int, data: bytes) -> BlocksHeader:
    return BlocksHeader(group, first, count, len(data), checksum(memoryview(data)))


class Prefill:
    """A transfer server, its offers and what became of them."""

    def __init__(self, options: ServerOptions | None = None, timeouts: Timeouts = PATIENT) -> None:
        self.server = TransferServer(options=options or ServerOptions(hello_s=2.0, timeouts=timeouts))
        self.tickets: list[str] = []
        self.releases: queue.Queue[Release] = queue.Queue()
        self.all_releases: list[Release] = []
        self.log: list[str] = []

    def offer(
        self,
        read: ReadBlocks = read_offered,
        groups: tuple[GroupBlocks, ...] = OFFERED,
        deadline_s: float = 60.0,
    ) -> str:
        ticket = self.server.offer(Offer(FINGERPRINT, groups, read, self._released), deadline_s)
        self.tickets.append(ticket)
        return ticket

    def released(self) -> Release:
        return self.releases.get(timeout=5)

    def _released(self, ticket: str, outcome: Outcome, moved: tuple[int, ...]) -> None:
        self.all_releases.append((ticket, outcome, moved))
        self.releases.put((ticket, outcome, moved))

    def __enter__(self) -> Prefill:
        self._handler = _Collect(self.log)
        logging.getLogger("vswa_plugins.gemma3_cpu").addHandler(self._handler)
        logging.getLogger("vswa_plugins.gemma3_cpu").setLevel(logging.DEBUG)
        self.server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.stop()
        logging.getLogger("vswa_plugins.gemma3_cpu").removeHandler(self._handler)
        assert Counter(self.tickets) == Counter(ticket for ticket, *_ in self.all_releases)
        assert not [ticket for ticket in self.tickets if ticket in "\n".join(self.log)]


class _Collect(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.DEBUG)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.getMessage()} {record.exc_info}")


@dataclass
class Decode:
    """What a decode worker has stored; a block that is stored twice fails."""

    blocks: dict[tuple[int, int], bytes] = field(default_factory=dict)
    groups: tuple[GroupBlocks, ...] = OFFERED

    def write(self, group: int, first: int, data: memoryview) -> None:
        size = self.groups[group].block_bytes
        assert data.readonly
        assert not len(data) % size
        for i in range(len(data) // size):
            assert (group, first + i) not in self.blocks
            self.blocks[group, first + i] = bytes(data[i * size : (i + 1) * size])

    def request(self, address: tuple[str, int], ticket: str, fingerprint: str = FINGERPRINT) -> PullRequest:
        return PullRequest(address, ticket, fingerprint, self.groups, self.write)

    def pull(self, address: tuple[str, int], ticket: str, timeouts: Timeouts = PATIENT) -> PullResult:
        return pull(self.request(address, ticket), timeouts)


def expected_blocks(groups: tuple[GroupBlocks, ...]) -> dict[tuple[int, int], bytes]:
    return {(g, b): content(g, b, group.block_bytes) for g, group in enumerate(groups) for b in group.blocks}


@contextlib.contextmanager
def peer(script: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """A server whose one connection runs ``script``, then is closed."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(5)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(5)
                script(accepted)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[:2]
    finally:
        thread.join(10)
        listener.close()
    assert not failures, failures


@contextlib.contextmanager
def prefill_script(script: Callable[[Connection], None]) -> Iterator[tuple[str, int]]:
    """As :func:`peer`, for a script that speaks messages and has read the pull."""

    def run(accepted: socket.socket) -> None:
        with Connection(accepted, PATIENT) as connection:
            connection.receive(decode_pull)
            script(connection)

    with peer(run) as address:
        yield address


@contextlib.contextmanager
def connect(address: tuple[str, int]) -> Iterator[Connection]:
    """A decode worker that speaks messages itself."""
    with socket.create_connection(address, 5) as raw, Connection(raw, PATIENT) as connection:
        yield connection


@dataclass
class Fault:
    """What a :func:`proxy` does to the bytes of one direction.

    :param down: towards the decode side.
    :param flip_at: index of the byte that is changed.
    :param cut_at: bytes after which both connections are reset.
    """

    down: bool = True
    flip_at: int | None = None
    cut_at: int | None = None

    def apply(self, data: bytes, position: int) -> tuple[bytes, bool]:
        """The bytes to pass on, and whether to cut after them."""
        if self.flip_at is not None and position <= self.flip_at < position + len(data):
            at = self.flip_at - position
            data = data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]
        if self.cut_at is not None and position + len(data) >= self.cut_at:
            return data[: self.cut_at - position], True
        return data, False


@contextlib.contextmanager
def proxy(target: tuple[str, int], fault: Fault) -> Iterator[tuple[str, int]]:
    """One connection to ``target`` with a fault in it."""

    def run(near: socket.socket) -> None:
        with socket.create_connection(target, 5) as far:
            back = threading.Thread(target=_forward, args=(far, near, fault if fault.down else Fault()))
            back.start()
            _forward(near, far, Fault() if fault.down else fault)
            back.join(10)

    with peer(run) as address:
        yield address


def _forward(source: socket.socket, target: socket.socket, fault: Fault) -> None:
    position = 0
    cut = False
    with contextlib.suppress(OSError):
        while not cut and (data := source.recv(1 << 16)):
            changed, cut = fault.apply(data, position)
            target.sendall(changed)
            position += len(data)
    for each in (source, target) if cut else (target,):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR if cut else socket.SHUT_WR)
