"""Numbering of batches, and cutting events so that a batch fits into a message. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from vswa_plugin.wire.events import VERSION, Batch, Event, Moved, Removed, ReuseReport, Stored

#: No clock is further ahead of another than that, except by a fault that somebody must mend.
MAX_EPOCH_AHEAD_S = 86_400.0


def is_plausible(epoch: int, known: int, now_ns: int, ahead_s: float = MAX_EPOCH_AHEAD_S) -> bool:
    """Whether a publisher can have begun ``epoch``, which is its wall clock or follows a ``known`` one.

    :param known: what a trusted source says, as the registry, or 0.
    :param now_ns: our wall clock.
    """
    return epoch <= max(known, now_ns) + ahead_s * 1e9


class Numbering:
    """Gives ids: consecutive from 0 within an epoch, which only rises. Pure but for the clock given."""

    def __init__(self, clock_ns: Callable[[], int], last_epoch: int = 0) -> None:
        self._clock_ns = clock_ns
        self.epoch = last_epoch
        self.next_event_id = 0
        self.new_epoch()

    def new_epoch(self) -> None:
        self.epoch = max(self._clock_ns(), self.epoch + 1)
        self.next_event_id = 0

    def batch(self, events: Sequence[Event] = (), reports: Sequence[ReuseReport] = ()) -> Batch:
        """The next batch; without events, a heartbeat, which uses up no id."""
        now_ns = self._clock_ns()
        batch = Batch(VERSION, self.epoch, self.next_event_id, now_ns, tuple(events), tuple(reports))
        self.next_event_id = batch.next_event_id
        return batch


def split(events: Sequence[Event], batch_bytes: int) -> Iterator[list[Event]]:
    """Parts of ``events``, in order, each about ``batch_bytes`` encoded at most. Splits long events too."""
    bounds = [_encoded_bound(event) for event in events]
    if sum(bounds) <= batch_bytes:  # as almost every batch is
        if bounds:
            yield list(events)
        return
    part: list[Event] = []
    room = batch_bytes
    for event in events:
        for piece in _pieces(event, max(1, batch_bytes // 9 - 16)):
            size = _encoded_bound(piece)
            if part and size > room:
                yield part
                part, room = [], batch_bytes
            part.append(piece)
            room -= size
    if part:
        yield part


def _encoded_bound(event: Event) -> int:
    """At least the bytes of ``event`` on the wire: 9 a hash, and the rest."""
    if isinstance(event, Stored | Removed | Moved):
        return 9 * len(event.sequence_hashes) + 128
    return len(msgspec.msgpack.encode(event)) + 16


def _pieces(event: Event, most: int) -> Iterator[Event]:
    match event:
        case Stored() if len(event.sequence_hashes) > most:
            parent = event.parent_hash
            for at in range(0, len(event.sequence_hashes), most):
                hashes = event.sequence_hashes[at : at + most]
                yield Stored(event.group_id, event.position + at, parent, hashes, event.tier)
                parent = hashes[-1]
        case Removed() if len(event.sequence_hashes) > most:
            for at in range(0, len(event.sequence_hashes), most):
                yield Removed(event.group_id, event.sequence_hashes[at : at + most])
        case _:
            yield event
