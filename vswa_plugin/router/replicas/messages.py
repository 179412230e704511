"""The messages by which routers share their load: one message per turn of the loop, on NATS.

On ``vswa.v1.<namespace>.routers.<router id, hex>.load``: MessagePack, an array [version, router id, words].
Every word is absolute and may be repeated; nothing is numbered or confirmed:

    put      one request: where it is, its sequence hashes, what of it is computed
    state    the same request further on: its rank, prompt tokens still to compute, tokens generated
    free     it has ended
    digest   the states of all requests whose keys are in a range; each second
    want     requests of another router that are in its digest and not here
    bye      this router ends

Token ids are never sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, TypeAlias

import msgspec

from vswa_plugin.errors import ProtocolError
from vswa_plugin.wire.events import U64, Rank

LOAD_VERSION = 1
#: What is larger is refused unread; below the 1 MiB that a broker takes by default.
MAX_LOAD_BYTES = 768 << 10
#: One message is closed when it has so much in it.
_FULL_BYTES = 128 << 10
#: Of a longer prompt the rest is not sent: the others see less load than there is.
MAX_HASHES = 32_768
#: Requests in one part of a digest, and in one wish.
MAX_KEYS = 2_048

#: Longer names of models are nobody's: the registry takes none.
_Name = Annotated[str, msgspec.Meta(max_length=4_096)]
_Hashes = Annotated[tuple[U64, ...], msgspec.Meta(max_length=MAX_HASHES)]


class State(msgspec.Struct, array_like=True, tag="state"):
    """Where a request is by now. ``key`` is its router's own number for it."""

    key: U64
    worker_id: U64
    dp_rank: U64
    prefill_tokens: U64
    output_tokens: U64 = 0

    @property
    def rank(self) -> Rank:
        return Rank(self.worker_id, self.dp_rank)


class Put(msgspec.Struct, array_like=True, tag="put"):
    """A request; arguments of :meth:`LoadBook.add`."""

    state: State
    model: _Name
    hashes: _Hashes
    prompt_len: U64
    cached_blocks: U64
    shared: bool


class Free(msgspec.Struct, array_like=True, tag="free"):
    key: U64


class Digest(msgspec.Struct, array_like=True, tag="digest"):
    """All requests with ``first`` <= key < ``end`` (None: and above)."""

    first: U64
    end: U64 | None
    states: Annotated[tuple[State, ...], msgspec.Meta(max_length=MAX_KEYS)]


class Want(msgspec.Struct, array_like=True, tag="want"):
    router: U64
    keys: Annotated[tuple[U64, ...], msgspec.Meta(max_length=MAX_KEYS)]


class Bye(msgspec.Struct, array_like=True, tag="bye"):
    pass


Word: TypeAlias = Put | State | Free | Digest | Want | Bye


class Message(msgspec.Struct, array_like=True):
    version: U64
    router: U64
    words: tuple[Word, ...]


class _Header(msgspec.Struct, array_like=True):
    version: U64


class ForeignVersion(ProtocolError):
    """A message of another version of this protocol."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_header_decoder = msgspec.msgpack.Decoder(_Header)


def decode(payload: bytes) -> Message:
    """Raises ProtocolError: too large, not of this shape, or (ForeignVersion) not of this version."""
    try:
        if len(payload) > MAX_LOAD_BYTES:
            raise msgspec.ValidationError(f"more than {MAX_LOAD_BYTES} bytes")
        version = _header_decoder.decode(payload).version
        if version != LOAD_VERSION:
            raise ForeignVersion(f"expected router load of version {LOAD_VERSION}, got {version}")
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"expected router load, got {len(payload)} bytes: {error}") from error


def encode(router: int, words: Iterable[Word]) -> Iterator[bytes]:
    """``words`` in as few messages as stay small."""
    gathered: list[msgspec.Raw] = []
    size = 0
    for word in words:
        encoded = _encoder.encode(word)
        if gathered and size + len(encoded) > _FULL_BYTES:
            yield _encoder.encode((LOAD_VERSION, router, gathered))
            gathered, size = [], 0
        gathered.append(msgspec.Raw(encoded))
        size += len(encoded)
    if gathered:
        yield _encoder.encode((LOAD_VERSION, router, gathered))


def parts(keys: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """As many at a time as one word may hold."""
    return (tuple(keys[at : at + MAX_KEYS]) for at in range(0, len(keys), MAX_KEYS))
