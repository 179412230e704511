"""What a publisher keeps for readers: replay from the ring, frozen snapshots in parts, refusals."""

from __future__ import annotations

import contextlib

from hypothesis import example, given
from hypothesis import strategies as st

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksMoved, BlocksRemoved, BlocksStored, EngineBlock
from vswa_plugin.errors import ProtocolError
from vswa_plugin.publishing.history import History, HistoryOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire import control
from vswa_plugin.wire.control import (
    PartRequest,
    Refused,
    Replay,
    ReplayRequest,
    SnapshotHead,
    SnapshotPart,
    SnapshotRequest,
    TooOld,
)
from vswa_plugin.wire.events import Batch, Layout, Stored, encode

LAYOUT = CacheLayout((CacheGroup(0, 4, 2), CacheGroup(1, None, 2)), "trtllm_v2", "m")
EPOCH = 7


class Kept:
    """A history in epoch 7 with a clock of its own."""

    def __init__(self, **options: int | float) -> None:
        self.now = 0.0
        self.residency = Residency(LAYOUT)
        self.history = History(self.residency, HistoryOptions(**options), lambda: self.now)  # type: ignore[arg-type]
        self.history.begin_epoch(EPOCH)
        self.next_event_id = 0

    def publish(self, count: int = 1) -> bytes:
        events = tuple(Stored(0, 0, None, (self.next_event_id + n,)) for n in range(count))
        batch = Batch(1, EPOCH, self.next_event_id, 0, events)
        self.next_event_id = batch.next_event_id
        payload = encode(batch)
        self.history.ring.add(batch, payload)
        return payload

    def ask(self, request: control.Request) -> control.Reply:
        return control.decode_reply(self.history.answer(control.encode(request)))

    def chain(self, group: int, *names: str) -> None:
        """Store a chain of blocks; the same name is the same block."""
        blocks = tuple(EngineBlock(name, (ord(name[0]), depth)) for depth, name in enumerate(names))
        self.residency.apply(BlocksStored(group, None, blocks))

    def snapshot(self) -> tuple[SnapshotHead, list[SnapshotPart]]:
        head = self.ask(SnapshotRequest(EPOCH))
        assert isinstance(head, SnapshotHead)
        parts = [self.ask(PartRequest(EPOCH, head.snapshot_id, part)) for part in range(head.parts)]
        assert all(isinstance(part, SnapshotPart) for part in parts)
        return head, parts  # type: ignore[return-value]


def held(parts: list[SnapshotPart]) -> dict[int, list[int]]:
    """Sequence hashes of a snapshot by group, every block as often as it is told."""
    found: dict[int, list[int]] = {0: [], 1: []}
    for part in parts:
        for event in part.events:
            if isinstance(event, Stored):
                found[event.group_id] += event.sequence_hashes
    return found


def test_a_replay_begins_with_the_batch_that_holds_the_event() -> None:
    kept = Kept()
    payloads = [kept.publish(2) for _ in range(4)]

    assert kept.ask(ReplayRequest(EPOCH, 2)) == Replay(EPOCH, tuple(payloads[1:]), 8)
    assert kept.ask(ReplayRequest(EPOCH, 3)) == Replay(EPOCH, tuple(payloads[1:]), 8)
    assert kept.ask(ReplayRequest(EPOCH, 8)) == Replay(EPOCH, (), 8)


def test_a_replay_is_cut_to_fit_but_holds_one_batch_at_least() -> None:
    kept = Kept(message_bytes=1)
    payloads = [kept.publish() for _ in range(3)]

    assert kept.ask(ReplayRequest(EPOCH, 1)) == Replay(EPOCH, (payloads[1],), len(payloads))


def test_what_the_ring_has_dropped_is_too_old() -> None:
    kept = Kept(ring_batches=2)
    for _ in range(5):
        kept.publish()

    assert kept.ask(ReplayRequest(EPOCH, 2)) == TooOld(EPOCH, 3)
    assert isinstance(kept.ask(ReplayRequest(EPOCH, 3)), Replay)


def test_the_ring_is_bounded_in_bytes() -> None:
    kept = Kept(ring_bytes=100)
    sizes = [len(kept.publish()) for _ in range(50)]

    assert kept.history.ring.oldest_event_id == 50 - 100 // sizes[-1]


def test_what_is_not_published_yet_is_refused() -> None:
    kept = Kept()
    kept.publish()

    assert isinstance(kept.ask(ReplayRequest(EPOCH, 2)), Refused)


def test_another_epoch_is_refused_by_an_answer_that_names_the_current_one() -> None:
    kept = Kept()

    for request in (ReplayRequest(6, 0), SnapshotRequest(8), PartRequest(6, 1, 0)):
        reply = kept.ask(request)
        assert isinstance(reply, Refused)
        assert reply.epoch == EPOCH


def test_what_is_no_request_is_refused_and_nothing_else_happens() -> None:
    kept = Kept()

    for payload in (b"", b"\xc1", b"\x91" * 5_000, control.encode(Refused(1, "x")), b"x" * 2_000):
        assert isinstance(control.decode_reply(kept.history.answer(payload)), Refused)


@given(st.binary(max_size=300))
@example(b"\x91\xa1\x80").via("a tag that is not UTF-8")
def test_arbitrary_bytes_are_answered_and_nothing_is_raised(payload: bytes) -> None:
    kept = Kept()
    kept.publish()

    control.decode_reply(kept.history.answer(payload))


@given(st.binary(max_size=300))
@example(b"\x91\xa1\x80").via("a tag that is not UTF-8")
def test_an_answer_of_arbitrary_bytes_is_refused_by_the_reader(payload: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        control.decode_reply(payload)


def test_a_new_epoch_forgets_batches_and_snapshots() -> None:
    kept = Kept()
    kept.publish(3)
    head, _ = kept.snapshot()
    kept.history.begin_epoch(8)

    assert kept.ask(ReplayRequest(8, 0)) == Replay(8, (), 0)
    assert kept.history.ring.oldest_event_id == 0
    assert isinstance(kept.ask(PartRequest(8, head.snapshot_id, 0)), Refused)


def test_a_snapshot_holds_every_block_of_every_group_once_in_parts_that_fit() -> None:
    kept = Kept(message_bytes=256)  # four blocks a part
    kept.publish(5)
    kept.chain(0, *"abcdef")
    kept.chain(1, *"abcdefghijk")
    head, parts = kept.snapshot()
    resident = kept.residency.resident()

    assert head.next_event_id == 5
    assert head.parts == len(parts) == 5
    assert [type(event) for event in parts[0].events[:1]] == [Layout]
    assert sum(isinstance(event, Layout) for part in parts for event in part.events) == 1
    assert {group: sorted(blocks) for group, blocks in held(parts).items()} == {
        group: sorted(blocks) for group, blocks in resident.items()
    }
    assert all(len(control.encode(part)) <= 256 + 100 for part in parts)


def test_a_snapshot_is_frozen_at_one_instant() -> None:
    kept = Kept(message_bytes=64)
    kept.chain(1, *"abc")
    before = kept.residency.resident()[1]
    head = kept.ask(SnapshotRequest(EPOCH))
    assert isinstance(head, SnapshotHead)
    kept.residency.apply(BlocksRemoved(1, ("a", "b")))
    kept.chain(1, *"xyz")
    parts = [kept.ask(PartRequest(EPOCH, head.snapshot_id, part)) for part in range(head.parts)]

    assert set(held(parts)[1]) == before  # type: ignore[arg-type]


def test_blocks_that_follow_one_another_fall_into_one_run_and_others_do_not() -> None:
    kept = Kept()
    kept.chain(1, *"abcd")
    kept.chain(1, *"xy")
    kept.residency.apply(BlocksMoved(1, ("c",), "host"))
    _, (part,) = kept.snapshot()
    runs = [event for event in part.events if isinstance(event, Stored)]

    assert [(run.position, len(run.sequence_hashes), run.tier) for run in runs] == [
        (0, 2, "device"),
        (2, 1, "host"),
        (3, 1, "device"),
        (0, 2, "device"),
    ]
    assert [run.parent_hash is None for run in runs] == [True, False, False, True]
    assert runs[1].parent_hash == runs[0].sequence_hashes[-1]


def test_a_young_snapshot_is_shared_and_an_old_one_is_not() -> None:
    kept = Kept(share_s=1.0)
    kept.publish()
    first, _ = kept.snapshot()
    kept.publish()
    kept.now = 0.9
    second, _ = kept.snapshot()
    kept.now = 1.1
    third, _ = kept.snapshot()

    assert first.snapshot_id == second.snapshot_id != third.snapshot_id
    assert (second.next_event_id, third.next_event_id) == (1, 2)
    assert (second.end_event_id, third.end_event_id) == (2, 2), "what was published since is named"


def test_a_snapshot_from_which_the_ring_no_longer_leads_on_is_not_shared() -> None:
    kept = Kept(ring_batches=2)
    first, _ = kept.snapshot()
    for _ in range(4):
        kept.publish()
    second, _ = kept.snapshot()

    assert second.snapshot_id != first.snapshot_id
    assert second.next_event_id == 4


def test_a_snapshot_expires_when_nobody_asks_and_lives_while_somebody_does() -> None:
    kept = Kept(expire_s=30.0)
    head, _ = kept.snapshot()
    for kept.now in (20.0, 40.0, 60.0):
        assert isinstance(kept.ask(PartRequest(EPOCH, head.snapshot_id, 0)), SnapshotPart)
    kept.now = 91.0

    assert isinstance(kept.ask(PartRequest(EPOCH, head.snapshot_id, 0)), Refused)


def test_only_so_many_snapshots_are_kept() -> None:
    kept = Kept(snapshots=2, share_s=0.0)
    heads = []
    for kept.now in (1.0, 2.0, 3.0):
        heads.append(kept.snapshot()[0])
    answers = [kept.ask(PartRequest(EPOCH, head.snapshot_id, 0)) for head in heads]

    assert [type(answer) for answer in answers] == [Refused, SnapshotPart, SnapshotPart]


def test_a_part_that_does_not_exist_is_refused() -> None:
    kept = Kept()
    head, _ = kept.snapshot()

    assert isinstance(kept.ask(PartRequest(EPOCH, head.snapshot_id, head.parts)), Refused)
    assert isinstance(kept.ask(PartRequest(EPOCH, 99, 0)), Refused)
