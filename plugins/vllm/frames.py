"""vLLM's event batches on ZeroMQ: frames in, batches in their order out. No I/O.

A publisher numbers its batches from 0 and keeps the last ones to be asked for again::

    SUB     topic, number (8 bytes, big-endian), payload
    asked   "", number of the first batch
    answer  "", topic, number, payload            for each that is kept, then once with number -1

The payload is msgpack: time, events, data-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec

from vswa_plugin.errors import ProtocolError, shown

_NUMBER_BYTES = 8
END = -1


class Batch(NamedTuple):
    """One batch as it is on the wire; ``number`` is :data:`END` behind the last one of an answer."""

    number: int
    payload: bytes


class Take(NamedTuple):
    """The next batch, to be handed on."""

    batch: Batch


class Ask(NamedTuple):
    """Ask the publisher for its batches from this number on; then say what came of it."""

    start: int


class Lost(NamedTuple):
    """The batches in [expected, got) will not come any more."""

    expected: int
    got: int


Action: TypeAlias = Take | Ask | Lost


def subscribed(frames: Sequence[bytes]) -> Batch:
    """The batch in the frames of a SUB socket; raises ProtocolError."""
    if len(frames) != 3:
        raise ProtocolError(f"expected the frames topic, number and payload, got {len(frames)} frames")
    return _batch(frames[1], frames[2], signed=False)


def answered(frames: Sequence[bytes]) -> Batch:
    """The batch in the frames of an answer; raises ProtocolError."""
    if len(frames) != 4:
        raise ProtocolError(f"expected an answer of 4 frames, got {len(frames)}")
    return _batch(frames[2], frames[3], signed=True)


def question(start: int) -> list[bytes]:
    """The frames that ask for all kept batches from ``start`` on."""
    return [b"", start.to_bytes(_NUMBER_BYTES, "big")]


def _batch(number: bytes, payload: bytes, *, signed: bool) -> Batch:
    if len(number) != _NUMBER_BYTES:
        raise ProtocolError(f"expected a number of {_NUMBER_BYTES} bytes, got {len(number)}")
    return Batch(int.from_bytes(number, "big", signed=signed), payload)


def events_of(payload: bytes, dp_rank: int) -> list[Any]:
    """The events of a batch of rank ``dp_rank``.

    :raises ProtocolError: it is no batch, or one of another rank. Nothing of it is quoted, because it holds
        token ids.
    """
    try:
        decoded = msgspec.msgpack.decode(payload)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"expected a batch in msgpack, got {len(payload)} bytes: {error}") from None
    if not isinstance(decoded, list) or len(decoded) < 2 or not isinstance(decoded[1], list):
        raise ProtocolError("expected a batch as an array of time, events and rank, got something else")
    rank = decoded[2] if len(decoded) > 2 else None
    if rank is not None and rank != dp_rank:
        raise ProtocolError(f"expected a batch of data-parallel rank {dp_rank}, got one of {shown(rank)}")
    return decoded[1]


class BatchOrder:
    """Puts the batches of one publisher in order, each once; what is missing is asked for, then given up.

    Each method returns what is to be done, in order. After an :class:`Ask` come calls of :meth:`again`, then
    one of :meth:`answer_ended`, also where no answer came; batches that are subscribed to in between wait.

    :ivar expected: number of the next batch.
    """

    def __init__(self) -> None:
        self.expected = 0
        self._last = END
        self._asking = False
        #: The answer that is coming may be of a publisher that is gone.
        self._void = False
        self._held: dict[int, Batch] = {}

    def ask(self) -> list[Action]:
        """Look for what is missing without a sign of it: at the start, or behind the last batch."""
        if self._asking:
            return []
        self._asking = True
        return [Ask(self.expected)]

    def came(self, batch: Batch) -> list[Action]:
        """A batch has come by subscription. Its number is higher than the last one's, or all began anew."""
        actions: list[Action] = []
        if batch.number <= self._last:
            actions += [*self._let_go(None), Lost(self.expected, batch.number)]
            self.expected = 0
            self._void = self._asking
        self._last = batch.number
        if self._asking:
            self._held[batch.number] = batch
        elif batch.number == self.expected:
            actions.append(self._take(batch))
        elif batch.number > self.expected:
            self._held[batch.number] = batch
            actions += self.ask()
        return actions

    def again(self, batch: Batch) -> list[Action]:
        """A batch of an answer; those before it are not kept any more."""
        if self._void or batch.number < self.expected:
            return []
        self._held.pop(batch.number, None)
        return [*self._let_go(batch.number), self._take(batch)]

    def answer_ended(self) -> list[Action]:
        """All of an answer has come, or will not come."""
        self._asking = False
        if self._void:
            self._void = False
            return self.ask()
        return self._let_go(None)

    def _take(self, batch: Batch) -> Take:
        self.expected = batch.number + 1
        return Take(batch)

    def _let_go(self, end: int | None) -> list[Action]:
        """Take what waits below ``end``, and give up what is missing there."""
        actions: list[Action] = []
        for number in sorted(each for each in self._held if end is None or each < end):
            batch = self._held.pop(number)
            if number < self.expected:
                continue
            if number > self.expected:
                actions.append(Lost(self.expected, number))
            actions.append(self._take(batch))
        if end is not None and end > self.expected:
            actions.append(Lost(self.expected, end))
        return actions
