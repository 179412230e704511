"""The registry of live workers: one entry each, gone when the worker is. Entry and contract; no I/O.

Dynamo's own discovery tells which instances serve a model. This registry tells what a router of ours
needs besides: the cache groups and reuse rule of each rank, and the epoch of its event stream.

opening.py          which registry: from an argument or the environment
watching.py         what watching a registry means, for every backend
etcd.py             the registry in etcd: one leased key per worker
etcd_settings.py    which etcd, and how to reach it
etcd_watch.py       watching a prefix without losing an event
_etcd3_client.py    the connection; nothing else imports etcd3
_etcd3_compat.py    makes etcd3 importable with protobuf 4 and later
file.py             the registry in a directory
entry_files.py      entry files: written atomically, locked while their writer lives
threads.py          one thread for calls that block
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec

from vswa_plugin.blocks.layout import CacheGroup, Naming, Resumption
from vswa_plugin.errors import ConfigError, InvariantError, ProtocolError, one_line
from vswa_plugin.wire.events import Rank
from vswa_plugin.wire.subjects import check_name

if TYPE_CHECKING:
    from vswa_plugin.registry.watching import Watcher

__all__ = [
    "MAX_ENTRIES",
    "MAX_ENTRY_BYTES",
    "PREFIX",
    "Change",
    "Connected",
    "Disconnected",
    "Entry",
    "Joined",
    "Left",
    "Registry",
    "Updated",
    "decode_entry",
    "encode_entry",
]

#: All keys of this project in a shared etcd.
PREFIX = "vswa/v1/workers/"
#: Bytes of an entry: one of 64 ranks and 8 cache groups has 3,000.
MAX_ENTRY_BYTES = 256 << 10
#: Workers that a reader follows: in the order of their keys, those beyond are left out.
MAX_ENTRIES = 1 << 14
#: What an entry may hold of each, and the largest number of tokens or blocks in it.
_MAX_RANKS, _MAX_GROUPS, _MAX_TAINTS, _MAX_TEXT, _MAX_COUNT = 4_096, 1_024, 1_024, 4_096, 1 << 53


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One worker, as its router and its operators need to know it. JSON in the registry.

    :param epochs: current epoch of each dp_rank's event stream.
    :param worker_id: Dynamo's instance id.
    :param host: name of the worker's machine; the file backend sees a crash at once where it is its own.
    :param taints: labels that requests can demand, prefer or avoid.
    :param status_url: where the worker serves /health, /ready and /metrics; None: nowhere.
    :param version: of vswa-plugin; ``engine_version``: of the engine. Empty: not known.
    :param engine_reason: why the worker runs this engine.
    :param capacity: window label -> blocks that one rank's device has for it; a window may be left out.
    :param visible: whether Dynamo's frontends see its model: then they send requests past any router of ours.
    """

    namespace: str
    component: str
    worker_id: int
    mode: str
    engine: str
    served_model_name: str
    model_path: str
    context_length: int
    block_size: int
    rule: str
    hash_scheme: str
    groups: tuple[CacheGroup, ...]
    epochs: dict[int, int]
    total_kv_blocks: int
    endpoint: str = "generate"
    host: str = ""
    pid: int = 0
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    taints: tuple[str, ...] = ()
    visible: bool = True
    status_url: str | None = None
    version: str = ""
    engine_version: str = ""
    engine_reason: str = ""
    resumption: Resumption | None = None
    capacity: dict[str, int] = {}

    @property
    def naming(self) -> Naming:
        """How its ranks name the prefixes of a prompt."""
        where = self.resumption
        if where is not None:
            return Naming(self.block_size, where.hash_block_size, where.lookahead)
        sizes = [group.block_size for group in self.groups]
        return Naming(self.block_size, math.gcd(*sizes) or self.block_size)

    @property
    def key(self) -> str:
        """The registry key: unique per worker, sorted by namespace and component."""
        return f"{PREFIX}{self.namespace}/{self.component}/{self.worker_id:016x}"


class Joined(msgspec.Struct, frozen=True):
    """A worker that was not there before, or that was there when the watch began."""

    entry: Entry


class Updated(msgspec.Struct, frozen=True):
    """The entry that replaces the former one of the same key."""

    entry: Entry


class Left(msgspec.Struct, frozen=True):
    """The worker has left, its registration ran out, or its entry cannot be read any more.

    :param entry: as it was last seen.
    """

    entry: Entry


class Connected(msgspec.Struct, frozen=True):
    """Everything that the registry holds has been reported; comes first after the first listing."""


class Disconnected(msgspec.Struct, frozen=True):
    """The registry cannot be read: what was reported before stands until the next ``Connected``.

    A registration that is missing meanwhile says nothing about its worker.
    """

    reason: str


#: What a watcher of the registry is given, in the order in which it happened.
Change: TypeAlias = Joined | Updated | Left | Connected | Disconnected


def encode_entry(entry: Entry) -> bytes:
    """The entry as JSON."""
    return msgspec.json.encode(entry)


def decode_entry(key: str, payload: bytes) -> Entry:
    """The entry in ``payload``; raises ProtocolError that names the key and the field."""
    if len(payload) > MAX_ENTRY_BYTES:
        raise ProtocolError(
            f"expected a worker entry of at most {MAX_ENTRY_BYTES} bytes at {key}, got {len(payload)}"
        )
    try:
        entry = msgspec.json.decode(payload, type=Entry)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        raise ProtocolError(f"expected a worker entry at {key}, got {len(payload)} bytes: {error}") from error
    if entry.key != key:
        raise ProtocolError(f"expected a worker entry at {key}, got that of {one_line(entry.key)}")
    if (reason := oddity(entry)) is not None:
        raise ProtocolError(f"the worker entry at {key} is of no use: {reason}")
    return entry


def oddity(entry: Entry) -> str | None:
    """Why no worker of ours can have made this entry, or None.

    No router could send it a request or receive its events, and its values must not reach load book or index.
    """
    try:
        check_name("namespace", entry.namespace)
        check_name("component", entry.component)
    except ConfigError as error:
        return str(error)[:300]
    if entry.block_size < 1:
        return f"block_size: expected at least 1, got {entry.block_size}"
    if not entry.epochs:
        return "epochs: expected one of each dp_rank, got none"
    if (reason := _too_much(entry)) is not None:
        return reason
    numbers = [("worker_id", entry.worker_id)]
    for rank, epoch in entry.epochs.items():
        numbers += [("dp_rank", rank), ("epoch", epoch)]
    for what, number in numbers:
        if not 0 <= number < 1 << 64:
            return f"{what}: expected a number from 0 to 2**64 - 1, got {number}"
    return None


def _too_much(entry: Entry) -> str | None:
    """Which part of the entry is larger than any worker's, or None."""
    for what, size, most in (
        ("epochs", len(entry.epochs), _MAX_RANKS),
        ("groups", len(entry.groups), _MAX_GROUPS),
        ("taints", len(entry.taints), _MAX_TAINTS),
        ("capacity", len(entry.capacity), _MAX_GROUPS),
    ):
        if size > most:
            return f"{what}: expected at most {most}, got {size}"
    for field in entry.__struct_fields__:
        value = getattr(entry, field)
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            return f"{field}: expected at most {_MAX_TEXT} characters, got {len(value)}"
    groups = [(each.window_size or 0, each.block_size, each.chunk_size or 0) for each in entry.groups]
    where = entry.resumption or Resumption(entry.block_size, 1)
    tokens = (where.alignment, where.hash_block_size, where.lookahead, where.least_tokens)
    blocks = (entry.total_kv_blocks, *entry.capacity.values())
    for number in (entry.block_size, entry.context_length, *blocks, *sum(groups, ()), *tokens):
        if not 0 <= number <= _MAX_COUNT:
            return f"expected numbers of tokens and blocks from 0 to {_MAX_COUNT}, got {number}"
    if where.hash_block_size < 1 or entry.block_size % where.hash_block_size:
        return f"hash_block_size: expected a part of {entry.block_size}, got {where.hash_block_size}"
    return None


def prefix_of(namespace: str | None) -> str:
    """The prefix of the keys of one Dynamo namespace, or of all."""
    return f"{PREFIX}{namespace}/" if namespace else PREFIX


def last_epoch(entries: Iterable[Entry], rank: Rank) -> int:
    """The highest epoch that ``entries`` know of ``rank``; 0 where they know none.

    A publisher's next epoch is ``max(now_ns, last_epoch(...) + 1)``: it rises though the clock went back.
    """
    epochs = (entry.epochs.get(rank.dp_rank, 0) for entry in entries if entry.worker_id == rank.worker_id)
    return max(epochs, default=0)


def apart(epoch: int) -> int:
    """A known epoch, if any, with less than a millisecond added at random.

    So two processes of one worker id that follow the same epoch, with a clock that was set back, do not begin
    the same one.
    """
    return epoch and epoch + random.getrandbits(19)


def changed(entry: Entry | None, changes: dict[str, object]) -> Entry:
    """``entry`` with ``changes``; raises InvariantError before join() or for a field that Entry lacks."""
    if entry is None:
        raise InvariantError("expected update() between join() and leave(), got it without an entry")
    try:
        return msgspec.structs.replace(entry, **changes)
    except TypeError as error:
        raise InvariantError(f"expected fields of Entry in update(), got {sorted(changes)}") from error


def check_key(joined: Entry | None, entry: Entry) -> None:
    """Raise InvariantError where ``entry`` would not replace the one that has ``joined``."""
    if joined is not None and joined.key != entry.key:
        raise InvariantError(f"expected the key {joined.key} until leave(), got {entry.key}")


class Registry(Protocol):
    """Where workers announce themselves. All calls are made from one event loop; none blocks it.

    One entry at most per object. ``str(registry)`` says which and where, without secrets.
    """

    async def join(self, entry: Entry) -> None:
        """Put ``entry`` and keep it alive until :meth:`leave`; again: replace it.

        :raises ConnectError: the registry cannot be reached. The entry is put once it can.
        :raises ConfigError: it refuses our credentials.
        """

    async def update(self, **changes: object) -> Entry:
        """Replace fields of the joined entry, e.g. ``epochs``; returns the new entry. Raises as join."""

    async def entries(self, namespace: str | None = None) -> list[Entry]:
        """All live entries, of one Dynamo namespace where given; malformed ones are logged and left out.

        :raises ConnectError, ConfigError: as join.
        """

    def watch(self, namespace: str | None = None) -> Watcher:
        """Every change from now on, beginning with what is there: see :class:`Watcher`. Never raises."""

    async def leave(self) -> None:
        """Remove the entry and stop keeping it alive. Never raises: the TTL ends it otherwise.

        Without watchers nothing of this object runs any more; it may be used again.
        """

    async def close(self) -> None:
        """Leave, and end all watchers."""
