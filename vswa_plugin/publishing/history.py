"""What a publisher keeps so that readers can repair themselves: recent batches, and frozen snapshots.

No I/O: :meth:`History.answer` turns the bytes of a request into the bytes of the answer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import msgspec

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.engine.contract import EngineHash
from vswa_plugin.errors import ProtocolError
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire import control
from vswa_plugin.wire.control import (
    PartRequest,
    Refused,
    Replay,
    ReplayRequest,
    SnapshotHead,
    SnapshotRequest,
)
from vswa_plugin.wire.events import Batch, Event, Stored, layout_event

#: (engine hash, tier) of one group, as frozen.
Frozen: TypeAlias = tuple[tuple[EngineHash, str], ...]

#: A stored event of a single block takes at most this many bytes: where no two blocks form a run.
_BYTES_PER_BLOCK = 64


class HistoryOptions(msgspec.Struct, frozen=True):
    """Limits of what is kept.

    :param ring_batches: batches kept for replay.
    :param ring_bytes: the same in bytes.
    :param message_bytes: size of an answer; must stay below the broker's max payload.
    :param share_s: a snapshot this young is given to the next reader too.
    :param expire_s: a snapshot that no reader requests in this time is dropped.
    :param snapshots: frozen snapshots kept at a time.
    """

    ring_batches: int = 20_000
    ring_bytes: int = 64 << 20
    message_bytes: int = 256 << 10
    share_s: float = 1.0
    expire_s: float = 30.0
    snapshots: int = 4


class Ring:
    """The last batches of one epoch, encoded; contiguous ids."""

    def __init__(self, max_batches: int, max_bytes: int) -> None:
        self._max_batches = max_batches
        self._max_bytes = max_bytes
        self._first_ids: deque[int] = deque()
        self._payloads: deque[bytes] = deque()
        self._bytes = 0
        self.next_event_id = 0

    @property
    def oldest_event_id(self) -> int:
        """First id that can be replayed; the next id to come where the ring is empty."""
        return self._first_ids[0] if self._first_ids else self.next_event_id

    def add(self, batch: Batch, payload: bytes) -> None:
        self._first_ids.append(batch.first_event_id)
        self._payloads.append(payload)
        self._bytes += len(payload)
        self.next_event_id = batch.next_event_id
        while len(self._payloads) > self._max_batches or self._bytes > self._max_bytes:
            self._first_ids.popleft()
            self._bytes -= len(self._payloads.popleft())

    def clear(self) -> None:
        self._first_ids.clear()
        self._payloads.clear()
        self._bytes = self.next_event_id = 0

    def since(self, event_id: int, max_bytes: int) -> tuple[bytes, ...] | None:
        """Payloads from the batch that holds ``event_id`` on, at least one; None where it is gone."""
        if event_id < self.oldest_event_id:
            return None
        chosen: list[bytes] = []
        size = 0
        for payload in islice(self._payloads, max(0, bisect_right(self._first_ids, event_id) - 1), None):
            if chosen and size + len(payload) > max_bytes:
                break
            chosen.append(payload)
            size += len(payload)
        return tuple(chosen) if event_id < self.next_event_id else ()


@dataclass
class _Snapshot:
    head: SnapshotHead
    layout: CacheLayout
    groups: list[tuple[int, Frozen]]
    made_at: float
    used_at: float


class History:
    """Ring and snapshots of one publisher.

    :param clock: monotonic seconds.
    :param announce: the event by which a snapshot begins, of the layout at its instant.
    """

    def __init__(
        self,
        residency: Residency,
        options: HistoryOptions,
        clock: Callable[[], float],
        announce: Callable[[CacheLayout], Event] = layout_event,
    ) -> None:
        self._announce = announce
        self._residency = residency
        self._options = options
        self._clock = clock
        self._snapshots: dict[int, _Snapshot] = {}
        self._ids = 0
        self._epoch = 0
        self.ring = Ring(options.ring_batches, options.ring_bytes)
        self.replays = 0
        self.snapshots_made = 0

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self.ring.clear()
        self._snapshots.clear()

    def answer(self, payload: bytes) -> bytes:
        """The answer to one request; never raises for what a reader sends."""
        try:
            request = control.decode_request(payload)
        except ProtocolError as error:
            return control.encode(Refused(self._epoch, str(error)))
        if request.epoch != self._epoch:
            reason = f"expected epoch {self._epoch}, got {request.epoch}"
            return control.encode(Refused(self._epoch, reason))
        match request:
            case ReplayRequest():
                reply: control.Reply = self._replay(request.from_event_id)
            case SnapshotRequest():
                head = self._snapshot().head
                reply = msgspec.structs.replace(head, end_event_id=self.ring.next_event_id)
            case PartRequest():
                reply = self._part(request)
        return control.encode(reply)

    def _replay(self, event_id: int) -> control.Reply:
        if event_id > self.ring.next_event_id:
            return Refused(self._epoch, f"event {event_id} is not published yet")
        payloads = self.ring.since(event_id, self._options.message_bytes)
        if payloads is None:
            return control.TooOld(self._epoch, self.ring.oldest_event_id)
        self.replays += 1
        return Replay(self._epoch, payloads, self.ring.next_event_id)

    def _snapshot(self) -> _Snapshot:
        """A recent snapshot from whose end the ring still goes on, or a new one."""
        now = self._clock()
        self._expire(now)
        for snapshot in self._snapshots.values():
            young = now - snapshot.made_at <= self._options.share_s
            if young and snapshot.head.next_event_id >= self.ring.oldest_event_id:
                snapshot.used_at = now
                return snapshot
        self._ids += 1
        groups = list(self._residency.frozen().items())
        blocks = sum(len(frozen) for _, frozen in groups)
        parts = max(1, -(-blocks // self._blocks_per_part))
        head = SnapshotHead(self._epoch, self._ids, self.ring.next_event_id, parts)
        self._snapshots[self._ids] = _Snapshot(head, self._residency.layout, groups, now, now)
        self.snapshots_made += 1
        while len(self._snapshots) > self._options.snapshots:
            del self._snapshots[min(self._snapshots)]
        return self._snapshots[self._ids]

    def _expire(self, now: float) -> None:
        for snapshot_id, snapshot in list(self._snapshots.items()):
            if now - snapshot.used_at > self._options.expire_s:
                del self._snapshots[snapshot_id]

    @property
    def _blocks_per_part(self) -> int:
        return max(1, self._options.message_bytes // _BYTES_PER_BLOCK)

    def _part(self, request: PartRequest) -> control.Reply:
        now = self._clock()
        self._expire(now)
        snapshot = self._snapshots.get(request.snapshot_id)
        if snapshot is None or request.part >= snapshot.head.parts:
            return Refused(self._epoch, f"snapshot {request.snapshot_id} has expired or has no such part")
        snapshot.used_at = now
        begin = request.part * self._blocks_per_part
        end = begin + self._blocks_per_part
        events: list[Event] = [self._announce(snapshot.layout)] if request.part == 0 else []
        for group_id, frozen in snapshot.groups:
            events += runs(group_id, frozen[max(0, begin) : max(0, end)], self._residency)
            begin -= len(frozen)
            end -= len(frozen)
        return control.SnapshotPart(self._epoch, request.snapshot_id, request.part, tuple(events))


def runs(group_id: int, blocks: Frozen, residency: Residency) -> Iterator[Stored]:
    """Stored events for ``blocks``; those that follow one another in a sequence fall into one."""
    run: list[int] = []
    position, parent, run_tier = 0, None, ""
    for engine_hash, tier in blocks:
        node = residency.nodes.get(engine_hash)
        if node is None:
            continue  # evicted since it was frozen, and forgotten: its removal comes with the live events
        index = residency.block_index(group_id, node)
        if run and node.parent_hash == run[-1] and index == position + len(run) and tier == run_tier:
            run.append(node.sequence_hash)
            continue
        if run:
            yield Stored(group_id, position, parent, tuple(run), run_tier)
        run, position, parent, run_tier = [node.sequence_hash], index, node.parent_hash, tier
    if run:
        yield Stored(group_id, position, parent, tuple(run), run_tier)
