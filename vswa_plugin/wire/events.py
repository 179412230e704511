"""The wire protocol, version 1: what a worker publishes about its KV blocks. Structs only, no I/O.

MessagePack by msgspec; every struct is an array whose first element is its tag. Later versions only
append fields with defaults: an unknown trailing field is ignored. Hashes are sequence hashes (see
hashing.py); token ids and engine hashes never occur here.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.memory import Memory
from vswa_plugin.errors import ProtocolError

VERSION = 1
#: No publisher sends more in one message; what is larger is refused unread.
MAX_MESSAGE_BYTES = 8 << 20
U64 = Annotated[int, msgspec.Meta(ge=0)]
#: No publisher pauses longer between two heartbeats; a layout with a larger value is taken to give none.
MAX_HEARTBEAT_S = 3_600.0
#: The best tier that holds a block, fastest first.
TIERS = ("device", "host", "disk")


def id_text(worker_id: int) -> str:
    """A worker's id wherever people or JSON read it: Dynamo's spelling, decimal.

    In JSON it is this text too: most readers of JSON round whole numbers beyond 2**53.
    """
    return str(worker_id)


def source_as_json(source: Source) -> dict[str, object]:
    """``source`` for JSON that people or scripts read."""
    return {**msgspec.structs.asdict(source), "worker_id": id_text(source.worker_id)}


def hash_text(sequence_hash: int) -> str:
    """A block's hash wherever people read it, and in the JSON of the commands."""
    return f"{sequence_hash:016x}"


class Rank(NamedTuple):
    """What a router chooses: one data-parallel rank of one worker."""

    worker_id: int
    dp_rank: int = 0

    def __str__(self) -> str:
        return f"{id_text(self.worker_id)}/{self.dp_rank}"


class Source(msgspec.Struct, frozen=True):
    """The publisher of events: one data-parallel rank of one worker."""

    namespace: str
    component: str
    worker_id: int
    dp_rank: int = 0

    @property
    def rank(self) -> Rank:
        return Rank(self.worker_id, self.dp_rank)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component} worker {id_text(self.worker_id)} dp_rank {self.dp_rank}"


class Layout(msgspec.Struct, frozen=True, array_like=True, tag="layout"):
    """The cache groups of the rank and its reuse rule: event 0 of every epoch.

    :param heartbeat_s: seconds between the publisher's heartbeats; None: it does not say.
    :param resumption: as in :class:`~vswa_plugin.blocks.layout.CacheLayout`.
    :param memory: sizes of the pools and order of eviction; None: it does not say.
    """

    groups: tuple[CacheGroup, ...]
    rule: str
    hash_scheme: str
    model: str
    heartbeat_s: float | None = None
    resumption: Resumption | None = None
    memory: Memory | None = None

    @property
    def cache_layout(self) -> CacheLayout:
        """The layout that is announced, unchecked."""
        return CacheLayout(self.groups, self.rule, self.model, self.hash_scheme, self.resumption)

    @property
    def heartbeat(self) -> float | None:
        """:attr:`heartbeat_s` where it is plausible; else None."""
        stated = self.heartbeat_s
        return stated if stated is not None and 0 < stated <= MAX_HEARTBEAT_S else None


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="stored"):
    """Consecutive blocks now resident in one group.

    :param position: index of the first block in its sequence.
    :param parent_hash: sequence hash of the block before it; None at the root.
    """

    group_id: U64
    position: U64
    parent_hash: U64 | None
    sequence_hashes: tuple[U64, ...]
    tier: str = TIERS[0]


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="removed"):
    """Blocks of which the group holds no copy in any tier."""

    group_id: U64
    sequence_hashes: tuple[U64, ...]


class Moved(msgspec.Struct, frozen=True, array_like=True, tag="moved"):
    """Blocks whose best tier has changed; they stay resident."""

    group_id: U64
    sequence_hashes: tuple[U64, ...]
    tier: str


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag="cleared"):
    """Nothing is resident any more, in one group or (None) in all."""

    group_id: U64 | None = None


class Unknown(msgspec.Struct, frozen=True, array_like=True, tag="unknown"):
    """An event of a later version: it has an id, and it may have been a removal. It is never sent."""

    tag: str


#: What may happen to the blocks of one rank, in this version of the protocol.
Event: TypeAlias = Layout | Stored | Removed | Moved | Cleared


class ReuseReport(msgspec.Struct, frozen=True, array_like=True):
    """A request that this rank's engine has completed: for choosers outside the data path, which compare it
    with what they had promised.

    :param request_id: as Dynamo gave it to the worker.
    :param prompt_tokens: length of its prompt.
    :param cached_tokens: of the prompt, those that the engine reused.
    :param queue_s: seconds that it waited to be admitted; None: the engine does not say.
    """

    request_id: str
    prompt_tokens: U64
    cached_tokens: U64
    queue_s: float | None = None


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """Consecutively numbered events of one rank in one epoch; without events: a heartbeat.

    :param epoch: one life of a publisher; a higher one replaces all before it.
    :param first_event_id: id of ``events[0]``; in a heartbeat, the id that comes next.
    :param published_at_ns: wall clock, for the lag figure only.
    :param reports: of requests that have ended. They are no part of what is resident, have no ids, and are
        neither replayed nor missed.
    """

    version: U64
    epoch: U64
    first_event_id: U64
    published_at_ns: U64
    events: tuple[Event | Unknown, ...] = ()
    reports: tuple[ReuseReport, ...] = ()

    @property
    def next_event_id(self) -> int:
        return self.first_event_id + len(self.events)


def layout_event(
    layout: CacheLayout, heartbeat_s: float | None = None, memory: Memory | None = None
) -> Layout:
    """The event that announces ``layout``."""
    return Layout(
        layout.groups, layout.rule, layout.hash_scheme, layout.model, heartbeat_s, layout.resumption, memory
    )


class _Header(msgspec.Struct, array_like=True):
    """What every version of a batch begins with."""

    version: U64
    epoch: U64
    first_event_id: U64
    published_at_ns: U64
    events: tuple[msgspec.Raw, ...] = ()
    reports: msgspec.Raw = msgspec.Raw(b"\x90")


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Batch)
_header_decoder = msgspec.msgpack.Decoder(_Header)
_event_decoder = msgspec.msgpack.Decoder(Event)
_reports_decoder = msgspec.msgpack.Decoder(tuple[ReuseReport, ...])
_TAGS = frozenset(str(kind.__struct_config__.tag) for kind in (Layout, Stored, Removed, Moved, Cleared))


def encode(batch: Batch) -> bytes:
    """The batch as one message."""
    return _encoder.encode(batch)


def decode(payload: bytes) -> Batch:
    """The batch in ``payload``. Events of a later version become :class:`Unknown`: their ids count.
    Reports that cannot be read are left out.

    :raises ProtocolError: too large, not MessagePack, or not of this shape (the path is named).
    """
    try:
        if len(payload) > MAX_MESSAGE_BYTES:
            raise msgspec.ValidationError(f"more than {MAX_MESSAGE_BYTES} bytes")
        try:
            batch = _decoder.decode(payload)
        except msgspec.ValidationError as error:
            return _decode_one_by_one(payload, error)
        return batch if batch.version == VERSION else _decode_one_by_one(payload)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ProtocolError(
            f"expected a batch of wire version {VERSION}, got {len(payload)} bytes: {error}"
        ) from error


def _decode_one_by_one(payload: bytes, error: msgspec.ValidationError | None = None) -> Batch:
    """What a later version sends; raises ``error`` where the fault lies in what this version knows."""
    header = _header_decoder.decode(payload)
    known = _TAGS if header.version == VERSION else frozenset[str]()
    try:
        events = tuple(
            _event_decoder.decode(raw) if (tag := _tag_of(raw)) in known else Unknown(tag)
            for raw in header.events
        )
    except msgspec.ValidationError as inner:
        raise error or inner from None
    reports = _reports(header) if known else ()
    if error is not None and reports is not None and not any(isinstance(event, Unknown) for event in events):
        raise error
    begin = header.version, header.epoch, header.first_event_id, header.published_at_ns
    return Batch(*begin, events, reports or ())


def _reports(header: _Header) -> tuple[ReuseReport, ...] | None:
    """None: they cannot be read."""
    try:
        return _reports_decoder.decode(header.reports)
    except msgspec.ValidationError:
        return None


def _tag_of(raw: msgspec.Raw) -> str:
    event: Any = msgspec.msgpack.decode(raw)
    tag = event[0] if isinstance(event, list) and event else event
    return tag if isinstance(tag, str) else f"({type(tag).__name__})"
