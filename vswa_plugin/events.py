"""The wire protocol, version 1: what a worker tells about its KV blocks. Structs only, no I/O.

MessagePack by msgspec; every struct is an array whose first element is its tag. Later versions only
append fields with defaults: an unknown trailing field is ignored. Hashes are sequence hashes (see
hashing.py); token ids and engine hashes never occur here.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from vswa_plugin.errors import ProtocolError
from vswa_plugin.layout import CacheGroup, CacheLayout

VERSION = 1
#: The best tier that holds a block, fastest first.
TIERS = ("device", "host", "disk")


class Source(msgspec.Struct, frozen=True):
    """Who publishes: one data-parallel rank of one worker."""

    namespace: str
    component: str
    worker_id: int
    dp_rank: int = 0

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component} worker {self.worker_id:x} dp_rank {self.dp_rank}"


class Layout(msgspec.Struct, frozen=True, array_like=True, tag="layout"):
    """The cache groups of the rank and its reuse rule: event 0 of every epoch."""

    groups: tuple[CacheGroup, ...]
    rule: str
    hash_scheme: str
    model: str


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="stored"):
    """Consecutive blocks now resident in one group.

    :param position: index of the first block in its sequence.
    :param parent_hash: sequence hash of the block before it; None at the root.
    """

    group_id: int
    position: int
    parent_hash: int | None
    sequence_hashes: tuple[int, ...]
    tier: str = TIERS[0]


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="removed"):
    """Blocks of which the group holds no copy in any tier."""

    group_id: int
    sequence_hashes: tuple[int, ...]


class Moved(msgspec.Struct, frozen=True, array_like=True, tag="moved"):
    """Blocks whose best tier has changed; they stay resident."""

    group_id: int
    sequence_hashes: tuple[int, ...]
    tier: str


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag="cleared"):
    """Nothing is resident any more, in one group or (None) in all."""

    group_id: int | None = None


Event: TypeAlias = Layout | Stored | Removed | Moved | Cleared


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """Consecutively numbered events of one rank in one epoch; without events: a heartbeat.

    :param epoch: one life of a publisher; a higher one replaces all before it.
    :param first_event_id: id of ``events[0]``; in a heartbeat, the id that comes next.
    :param published_at_ns: wall clock, for the lag figure only.
    """

    version: int
    epoch: int
    first_event_id: int
    published_at_ns: int
    events: tuple[Event, ...] = ()

    @property
    def next_event_id(self) -> int:
        return self.first_event_id + len(self.events)


def layout_event(layout: CacheLayout) -> Layout:
    """The event that announces ``layout``."""
    return Layout(layout.groups, layout.rule, layout.hash_scheme, layout.model)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Batch)


def encode(batch: Batch) -> bytes:
    return _encoder.encode(batch)


def decode(payload: bytes) -> Batch:
    """The batch in ``payload``.

    :raises ProtocolError: not MessagePack, not of this shape (the path is named), or another version.
    """
    try:
        batch = _decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ProtocolError(
            f"expected a batch of wire version {VERSION}, got {len(payload)} bytes: {error}"
        ) from error
    if batch.version != VERSION:
        raise ProtocolError(f"expected wire version {VERSION}, got {batch.version}; update the older side")
    return batch
