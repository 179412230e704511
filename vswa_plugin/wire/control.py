"""Requests of a reader that closes a gap or joins late, and a publisher's answers. Structs only, no I/O.

MessagePack by msgspec, tagged arrays, on the rank's ``control`` subject (request/reply). Every answer
names the publisher's current epoch, so that a reader of an older one learns of it at once.
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import msgspec

from vswa_plugin.errors import ProtocolError
from vswa_plugin.wire.events import MAX_MESSAGE_BYTES, U64, VERSION, Event


class ReplayRequest(msgspec.Struct, frozen=True, array_like=True, tag="replay"):
    """Send again what was published from ``from_event_id`` on."""

    epoch: U64
    from_event_id: U64
    version: U64 = VERSION


class SnapshotRequest(msgspec.Struct, frozen=True, array_like=True, tag="snapshot"):
    """Freeze what is resident, or name a frozen one that will do."""

    epoch: U64
    version: U64 = VERSION


class PartRequest(msgspec.Struct, frozen=True, array_like=True, tag="part"):
    """One part of a frozen snapshot, 0 <= ``part`` < parts."""

    epoch: U64
    snapshot_id: U64
    part: U64
    version: U64 = VERSION


Request: TypeAlias = ReplayRequest | SnapshotRequest | PartRequest


class Replay(msgspec.Struct, frozen=True, array_like=True, tag="batches"):
    """Encoded batches, in order, the first with ``from_event_id``. Not always all: request the rest.

    :param end_event_id: the next id that the publisher will assign; None: an older publisher does not say.
    """

    epoch: U64
    payloads: tuple[bytes, ...]
    end_event_id: U64 | None = None


class TooOld(msgspec.Struct, frozen=True, array_like=True, tag="too_old"):
    """The publisher no longer has those batches; a snapshot is needed."""

    epoch: U64
    oldest_event_id: U64


class SnapshotHead(msgspec.Struct, frozen=True, array_like=True, tag="head"):
    """A frozen snapshot: what was resident when ``next_event_id`` was the next id to give.

    :param end_event_id: the next id now, which is higher where an earlier reader's snapshot is shared; None:
        an older publisher does not say.
    """

    epoch: U64
    snapshot_id: U64
    next_event_id: U64
    parts: U64
    end_event_id: U64 | None = None


class SnapshotPart(msgspec.Struct, frozen=True, array_like=True, tag="events"):
    """Layout (first in part 0) and stored runs."""

    epoch: U64
    snapshot_id: U64
    part: U64
    events: tuple[Event, ...]


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """Why there is no answer: another epoch, an expired snapshot, a request that cannot be read."""

    epoch: U64
    reason: str


Reply: TypeAlias = Replay | TooOld | SnapshotHead | SnapshotPart | Refused

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    return _encoder.encode(message)


def decode_request(payload: bytes) -> Request:
    """Raises ProtocolError: not a request of this version; requests are small, so large ones are refused."""
    request = _decode(_request_decoder, payload, 1024)
    if request.version != VERSION:
        raise ProtocolError(f"expected a request of wire version {VERSION}, got {request.version}")
    return request


def decode_reply(payload: bytes) -> Reply:
    """Raises ProtocolError: not an answer of this version."""
    return _decode(_reply_decoder, payload, MAX_MESSAGE_BYTES)


def _decode(decoder: msgspec.msgpack.Decoder[T], payload: bytes, limit: int) -> T:
    try:
        if len(payload) > limit:
            raise msgspec.ValidationError(f"more than {limit} bytes")
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"expected a control message, got {len(payload)} bytes: {error}") from error
