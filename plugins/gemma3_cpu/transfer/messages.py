"""The messages of a transfer, version 1. Structs and framing only, no I/O.

A frame is the length of its payload (4 bytes, big-endian) and the payload: one struct in MessagePack, an
array whose first element is its tag. After a :class:`BlocksHeader` follow ``nbytes`` raw bytes. Later
versions may append fields, which are ignored; any other change comes with a higher ``Pull.version``.
"""

from __future__ import annotations

import struct
from typing import Annotated, TypeAlias, TypeVar

import msgspec
import xxhash

from vswa_plugin.errors import ProtocolError

VERSION = 1
#: No message is longer; a longer one is refused by its length, unread.
MAX_HEADER_BYTES = 16 << 10
MAX_GROUPS = 64
#: Characters; two fingerprints and the words around them fit into one message.
MAX_FINGERPRINT = 1024
MAX_REASON = 3000
LENGTH = struct.Struct(">I")

U64 = Annotated[int, msgspec.Meta(ge=0)]
Fingerprint = Annotated[str, msgspec.Meta(max_length=MAX_FINGERPRINT)]
Reason = Annotated[str, msgspec.Meta(max_length=MAX_REASON)]


class Pull(msgspec.Struct, frozen=True, array_like=True, tag="pull"):
    """The request of the decode side. Never logged: it holds the ticket.

    :param ranges: per cache group, in order, first block and the one after the last; equal for none.
    """

    version: U64
    ticket: Annotated[str, msgspec.Meta(max_length=64)]
    fingerprint: Fingerprint
    ranges: Annotated[tuple[tuple[U64, U64], ...], msgspec.Meta(max_length=MAX_GROUPS)]


class PullRefused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The refusal of the prefill side: it sends nothing (more). Has this shape in every version."""

    reason: Reason
    version: U64 = VERSION


class BlocksHeader(msgspec.Struct, frozen=True, array_like=True, tag="blocks"):
    """One run: ``nbytes`` raw bytes of ``count`` consecutive blocks follow.

    :param group: index of the cache group.
    :param first: index of the first block in the sequence.
    :param checksum: xxh3_64 of the raw bytes.
    """

    group: U64
    first: U64
    count: U64
    nbytes: U64
    checksum: U64


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """Everything that was requested has been sent: ``total`` raw bytes."""

    total: U64


class Ack(msgspec.Struct, frozen=True, array_like=True, tag="ack"):
    """The decode side has checked and stored all of it."""

    total: U64


class Nack(msgspec.Struct, frozen=True, array_like=True, tag="nack"):
    """The decode side gives up."""

    reason: Reason


Answer: TypeAlias = BlocksHeader | Done | PullRefused
Verdict: TypeAlias = Ack | Nack

T = TypeVar("T")


class _Opening(msgspec.Struct, array_like=True, tag="pull"):
    """What every version of a pull begins with."""

    version: U64


_encoder = msgspec.msgpack.Encoder()
_opening_decoder = msgspec.msgpack.Decoder(_Opening)
_pull_decoder = msgspec.msgpack.Decoder(Pull)
_answer_decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_verdict_decoder: msgspec.msgpack.Decoder[Verdict] = msgspec.msgpack.Decoder(Verdict)


def frame(message: Pull | Answer | Verdict) -> bytes:
    payload = _encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


def payload_length(prefix: bytes | bytearray | memoryview) -> int:
    """Bytes of the payload that follows the 4 bytes of ``prefix``.

    :raises ProtocolError: more than any message has.
    """
    length: int = LENGTH.unpack(prefix)[0]
    if length > MAX_HEADER_BYTES:
        raise ProtocolError(f"expected a message of at most {MAX_HEADER_BYTES} bytes, got one of {length}")
    return length


def decode_pull(payload: bytes | bytearray) -> Pull:
    """Raises ProtocolError: not a pull, or one of another version."""
    opening = _decode(_opening_decoder, payload, "a pull")
    if opening.version != VERSION:
        raise ProtocolError(
            f"expected a pull of transfer version {VERSION}, got version {opening.version}; run the same "
            "release of the worker on both sides"
        )
    return _decode(_pull_decoder, payload, "a pull")


def decode_answer(payload: bytes | bytearray) -> Answer:
    """Raises ProtocolError: nothing that the prefill side sends."""
    return _decode(_answer_decoder, payload, "a run of blocks or the end of the transfer")


def decode_verdict(payload: bytes | bytearray) -> Verdict:
    """Raises ProtocolError: neither an acknowledgement nor its refusal."""
    return _decode(_verdict_decoder, payload, "an acknowledgement")


def checksum(data: memoryview) -> int:
    """xxh3_64 of raw bytes."""
    return xxhash.xxh3_64_intdigest(data)


def clip(reason: str) -> str:
    """``reason`` as long as a message takes."""
    return reason[:MAX_REASON]


def _decode(decoder: msgspec.msgpack.Decoder[T], payload: bytes | bytearray, what: str) -> T:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"expected {what}, got {len(payload)} bytes: {error}") from error
