"""The reader, case by case; the state machine beside it searches for what is not thought of here."""

from __future__ import annotations

from typing import Any

import pytest

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.following.reader import (
    Apply,
    Ask,
    BecameLive,
    BecameStale,
    Reader,
    ReaderOptions,
    Reset,
    Unreadable,
)
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
from vswa_plugin.wire.events import Batch, Layout, Removed, Stored, Unknown, encode

LAYOUT = Layout((CacheGroup(0, 512, 32),), "trtllm_v2", "h", "m")


def stored(value: int) -> Stored:
    return Stored(0, 0, None, (value,))


def batch(first: int, *events: Any, epoch: int = 5) -> Batch:
    return Batch(1, epoch, first, 0, events)


def live_reader(**options: Any) -> Reader:
    """A reader that has seen events 0 and 1 of epoch 5."""
    reader = Reader(ReaderOptions(**options))
    reader.on_batch(batch(0, LAYOUT, stored(1)), 0.0)
    return reader


def asked(effects: list[Any]) -> list[Any]:
    return [effect.request for effect in effects if isinstance(effect, Ask)]


def test_event_0_starts_from_empty_and_live() -> None:
    reader = Reader()

    assert reader.stale
    assert reader.on_batch(batch(0, LAYOUT, stored(1)), 0.0) == [
        Reset(),
        Apply((LAYOUT, stored(1))),
        BecameLive(),
    ]
    assert not reader.stale


def test_a_late_joiner_takes_a_snapshot_and_what_came_meanwhile() -> None:
    reader = Reader()
    effects = reader.on_batch(batch(7, stored(7)), 0.0)
    assert asked(effects) == [SnapshotRequest(5)]
    assert reader.on_batch(batch(8, stored(8)), 0.1) == []

    effects = reader.on_reply(SnapshotRequest(5), SnapshotHead(5, 3, 8, 2), 0.2)
    assert asked(effects) == [PartRequest(5, 3, 0)]
    effects = reader.on_reply(PartRequest(5, 3, 0), SnapshotPart(5, 3, 0, (LAYOUT, stored(1))), 0.3)
    assert asked(effects) == [PartRequest(5, 3, 1)]
    effects = reader.on_reply(PartRequest(5, 3, 1), SnapshotPart(5, 3, 1, (stored(7),)), 0.4)

    assert effects == [Reset(), Apply((LAYOUT, stored(1), stored(7))), Apply((stored(8),)), BecameLive()]
    assert reader.next_event_id == 9


def test_a_gap_makes_the_view_stale_at_once_and_a_replay_ends_it() -> None:
    reader = live_reader()
    effects = reader.on_batch(batch(4, stored(4)), 1.0)

    assert effects[0] == BecameStale("expected event 2, got 4")
    assert asked(effects) == [ReplayRequest(5, 2)]
    assert reader.stale
    missing = encode(batch(2, stored(2), stored(3)))
    assert reader.on_reply(ReplayRequest(5, 2), Replay(5, (missing,)), 1.1) == [
        Apply((stored(2), stored(3))),
        Apply((stored(4),)),
        BecameLive(),
    ]


def test_a_heartbeat_shows_what_was_lost_at_the_tail() -> None:
    reader = live_reader()

    assert asked(reader.on_batch(batch(3), 1.0)) == [ReplayRequest(5, 2)]
    assert live_reader().on_batch(batch(2), 1.0) == []


def test_a_repeat_is_ignored_and_counted() -> None:
    reader = live_reader()

    assert reader.on_batch(batch(0, LAYOUT, stored(1)), 1.0) == []
    assert reader.on_batch(batch(1, stored(1), stored(2)), 1.0) == [Apply((stored(2),))]
    assert reader.stats.duplicates == 1


def test_a_lower_epoch_is_dropped_and_counted_and_a_higher_one_taken_at_once() -> None:
    reader = live_reader()

    assert reader.on_batch(batch(2, stored(9), epoch=4), 1.0) == []
    assert reader.stats.foreign_epochs == 1
    assert reader.on_batch(batch(0, LAYOUT, epoch=6), 1.0) == [Reset(), Apply((LAYOUT,)), BecameLive()]


def test_a_heartbeat_of_another_epoch_confirms_nothing_though_its_next_id_is_ours() -> None:
    reader = live_reader()

    assert [] == reader.on_batch(batch(2, epoch=4), 1.0)
    assert (1, 5) == (reader.stats.foreign_epochs, reader.epoch)
    assert [SnapshotRequest(6)] == asked(reader.on_batch(batch(2, epoch=6), 2.0))
    assert reader.stale


def test_a_replay_that_is_too_old_becomes_a_snapshot() -> None:
    reader = live_reader()
    reader.on_batch(batch(4), 1.0)

    assert asked(reader.on_reply(ReplayRequest(5, 2), TooOld(5, 3), 1.0)) == [SnapshotRequest(5)]


def test_an_answer_of_a_higher_epoch_begins_that_epoch() -> None:
    reader = live_reader()
    reader.on_batch(batch(4), 1.0)
    effects = reader.on_reply(ReplayRequest(5, 2), Refused(9, "expected epoch 9"), 1.0)

    assert effects[0] == Reset()
    assert asked(effects) == [SnapshotRequest(9)]
    assert reader.epoch == 9


def test_a_snapshot_older_than_the_view_takes_the_view_back_and_replays_from_there() -> None:
    reader = live_reader()
    reader.on_batch(batch(2, Removed(0, (1,)), stored(3)), 0.5)
    reader.on_batch(batch(6), 1.0)
    reader.on_reply(ReplayRequest(5, 4), TooOld(5, 5), 1.0)
    reader.on_reply(SnapshotRequest(5), SnapshotHead(5, 1, 2, 1), 1.0)
    effects = reader.on_reply(PartRequest(5, 1, 0), SnapshotPart(5, 1, 0, (LAYOUT, stored(1))), 1.0)

    assert effects == [Reset(), Apply((LAYOUT, stored(1))), Ask(ReplayRequest(5, 2))]
    assert reader.next_event_id == 2
    assert reader.stale


def test_a_replay_that_fails_twice_becomes_a_snapshot_with_pauses_that_double_up_to_the_limit() -> None:
    reader = live_reader(first_backoff_s=1.0, max_backoff_s=3.0)
    reader.on_batch(batch(4), 0.0)
    request: Any = ReplayRequest(5, 2)
    now, kinds, pauses = 0.0, [], []
    for _ in range(6):
        assert reader.on_failure(request, "timed out", now) == []
        began = now
        while not (effects := reader.on_tick(now)):
            now += 0.125
        (request,) = asked(effects)
        kinds.append(type(request).__name__)
        pauses.append(now - began)

    assert kinds == ["ReplayRequest"] + ["SnapshotRequest"] * 5
    assert pauses == [0.5, 1.0, 1.5, 1.5, 1.5, 1.5], "without jitter, half of 1, 2, 3, 3..."


def test_a_shared_snapshot_is_not_live_before_what_was_published_since() -> None:
    reader = Reader()
    reader.on_announced(5)
    reader.on_reply(SnapshotRequest(5), SnapshotHead(5, 3, 2, 1, end_event_id=4), 0.2)
    part = PartRequest(5, 3, 0)

    effects = reader.on_reply(part, SnapshotPart(5, 3, 0, (LAYOUT, stored(1))), 0.3)
    assert effects == [Reset(), Apply((LAYOUT, stored(1))), Ask(ReplayRequest(5, 2))]
    missing = encode(batch(2, stored(2), stored(3)))
    effects = reader.on_reply(ReplayRequest(5, 2), Replay(5, (missing,), end_event_id=4), 0.4)
    assert effects == [Apply((stored(2), stored(3))), BecameLive()]


def test_a_replay_that_ends_before_what_was_published_is_continued() -> None:
    reader = live_reader()
    reader.on_malformed(1.0)

    cut = Replay(5, (encode(batch(2, stored(2))),), end_event_id=4)
    assert reader.on_reply(ReplayRequest(5, 2), cut, 1.1) == [Apply((stored(2),)), Ask(ReplayRequest(5, 3))]
    rest = Replay(5, (encode(batch(3, stored(3))),), end_event_id=4)
    assert reader.on_reply(ReplayRequest(5, 3), rest, 1.2) == [Apply((stored(3),)), BecameLive()]


def test_an_answer_that_is_not_awaited_any_more_changes_nothing() -> None:
    reader = live_reader()
    reader.on_batch(batch(4), 0.0)
    reader.on_failure(ReplayRequest(5, 2), "timed out", 0.0)
    late = Replay(5, (encode(batch(2, stored(2), stored(3))),))

    assert reader.on_reply(ReplayRequest(5, 2), late, 0.1) == []
    assert reader.on_reply(SnapshotRequest(5), SnapshotHead(5, 1, 9, 1), 0.1) == []
    assert reader.next_event_id == 2


def test_while_a_request_is_out_ticks_and_further_batches_ask_nothing_more() -> None:
    reader = live_reader()
    reader.on_batch(batch(4), 0.0)

    assert asked([*reader.on_batch(batch(9), 0.0), *reader.on_tick(99.0), *reader.on_malformed(99.0)]) == []


def test_an_event_of_a_later_version_is_consumed_and_said_once_an_epoch() -> None:
    reader = live_reader()

    assert reader.on_batch(batch(2, Unknown("grown"), stored(3)), 1.0) == [
        Apply((stored(3),)),
        Unreadable("grown"),
    ]
    assert reader.on_batch(batch(4, Unknown("grown")), 1.0) == []
    assert (reader.next_event_id, reader.unreadable, reader.stale) == (5, True, False)
    reader.on_batch(batch(0, LAYOUT, epoch=6), 1.0)
    assert not reader.unreadable


def test_a_message_that_cannot_be_read_starts_a_repair() -> None:
    reader = live_reader()

    assert asked(reader.on_malformed(1.0)) == [ReplayRequest(5, 2)]
    assert reader.on_reply(ReplayRequest(5, 2), Replay(5, ()), 1.0) == [BecameLive()]


def test_an_announced_epoch_is_fetched_once() -> None:
    reader = live_reader()

    assert reader.on_announced(5) == []
    assert asked(reader.on_announced(6)) == [SnapshotRequest(6)]
    assert reader.on_announced(6) == []


def test_more_than_the_buffer_holds_is_dropped_and_asked_for_again() -> None:
    reader = live_reader(buffer_events=2)
    reader.on_batch(batch(4, stored(4)), 0.0)
    reader.on_batch(batch(5, stored(5), stored(6)), 0.0)
    replay = Replay(5, (encode(batch(2, stored(2), stored(3))),))
    effects = reader.on_reply(ReplayRequest(5, 2), replay, 0.0)

    assert asked(effects) == [ReplayRequest(5, 4)]
    assert reader.stale


@pytest.mark.parametrize(
    "part", [SnapshotPart(5, 1, 1, (LAYOUT,)), SnapshotPart(5, 2, 0, (LAYOUT,)), SnapshotPart(5, 1, 0, ())]
)
def test_a_part_that_does_not_fit_fails_the_repair(part: SnapshotPart) -> None:
    reader = Reader()
    reader.on_batch(batch(7), 0.0)
    reader.on_reply(SnapshotRequest(5), SnapshotHead(5, 1, 7, 1), 0.0)

    assert reader.on_reply(PartRequest(5, 1, 0), part, 0.0) == []
    assert reader.stats.failures == 1
    assert asked(reader.on_tick(60.0)) == [SnapshotRequest(5)]
