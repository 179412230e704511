"""A view is live only if it is current, and believes no epoch and no id that cannot be the publisher's."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from tests.cases.follower_helpers import (
    GOOD,
    HELD,
    LAYOUT,
    Followed,
    run_in_jumps,
    snapshot,
    source_of_worker,
)
from vswa_plugin.following.reader import Apply, Ask, BecameLive, BecameStale, Reader
from vswa_plugin.following.subscriber import SubscriberOptions
from vswa_plugin.following.view import ViewOptions
from vswa_plugin.wire.control import Replay, ReplayRequest, SnapshotHead, SnapshotRequest
from vswa_plugin.wire.events import Batch, Stored, encode, layout_event
from vswa_plugin.wire.subjects import subject

EVENTS = subject(source_of_worker(GOOD.worker_id), "events")
DAY_NS = 86_400 * 10**9


async def scored_after(followed: Followed, seconds: float) -> bool:
    await asyncio.sleep(seconds)
    return GOOD in followed.score()


def test_what_was_last_seen_is_not_scored_when_the_broker_was_away_for_longer_than_the_grace() -> None:
    async def body() -> list[bool]:
        async with Followed() as followed:
            await asyncio.sleep(1.0)
            followed.transport.connected = False
            found = [await scored_after(followed, seconds) for seconds in (9.0, 2.0)]
            followed.transport.connected = True
            found.append(await scored_after(followed, 1.0))
            await followed.transport.hear(GOOD, 2)
            return [*found, GOOD in followed.score()]

    assert [True, False, False, True] == run_in_jumps(body())


def test_a_rank_is_no_live_one_from_a_loss_of_contact_until_it_is_heard() -> None:
    async def body() -> list[bool]:
        async with Followed() as followed:
            await asyncio.sleep(1.0)
            live = [followed.subscriber.live(GOOD)]
            for connected in (False, True):
                followed.transport.connected = connected
                await asyncio.sleep(1.0)
                live.append(followed.subscriber.live(GOOD))
            await followed.transport.hear(GOOD, 2)
            return [*live, followed.subscriber.live(GOOD)]

    assert [True, False, False, True] == run_in_jumps(body())


@pytest.mark.parametrize(
    ("max_lag_s", "expected"), [(1.5, [True, True, False, True]), (math.inf, [True] * 4)]
)
def test_a_rank_whose_messages_come_later_than_the_bound_is_not_scored_until_they_are_in_time(
    max_lag_s: float, expected: list[bool]
) -> None:
    #: Seconds at which heartbeats were published, and at which they arrive.
    heartbeats = [(0.0, 0.0), (1.0, 1.0), (2.0, 4.0), (4.5, 5.0)]

    async def body() -> list[bool]:
        async with Followed(SubscriberOptions(view=ViewOptions(max_lag_s=max_lag_s))) as followed:
            began, found = time.time_ns(), []
            for published, seconds in heartbeats:
                passed = heartbeats[len(found) - 1][1] if found else 0.0
                await asyncio.sleep(seconds - passed)
                published_ns = began + DAY_NS + int(published * 1e9)
                await followed.transport.deliver(EVENTS, encode(Batch(1, 5, 2, published_ns)))
                found.append(GOOD in followed.score())
            return found

    assert expected == run_in_jumps(body())


# -- epochs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead_ns", "taken"),
    [(0, True), (DAY_NS // 2, True), (2 * DAY_NS, False), (2**62, False)],
)
def test_an_epoch_too_far_ahead_of_the_clock_is_ignored_and_counted(ahead_ns: int, taken: bool) -> None:
    async def body() -> tuple[bool, bool, int]:
        async with Followed() as followed:
            epoch = time.time_ns() + ahead_ns
            await followed.transport.hear(GOOD, 0, layout_event(LAYOUT), epoch=epoch)
            view = followed.subscriber.view(GOOD)
            assert view is not None
            still_scored = GOOD in followed.score()
            return view.reader.epoch == epoch, still_scored, followed.subscriber.stats.implausible_epochs

    assert (taken, not taken, int(not taken)) == run_in_jumps(body())


def test_an_epoch_that_the_registry_gives_is_believed_and_so_are_those_after_it() -> None:
    """The clock of that worker is wrong."""
    ahead = time.time_ns() + 100 * DAY_NS

    async def body() -> list[int]:
        async with Followed() as followed:
            followed.transport.answer = snapshot(layout_event(LAYOUT), HELD, epoch=ahead)
            followed.subscriber.announce(source_of_worker(GOOD.worker_id), ahead)
            view = followed.subscriber.view(GOOD)
            assert view is not None
            epochs = [view.reader.epoch]
            await followed.transport.hear(GOOD, 0, layout_event(LAYOUT), epoch=ahead + 1)
            return [*epochs, view.reader.epoch]

    assert [ahead, ahead + 1] == run_in_jumps(body())


def test_an_answer_of_an_epoch_too_far_ahead_is_a_failed_repair() -> None:
    async def body() -> tuple[int, int]:
        async with Followed() as followed:
            followed.transport.answer = snapshot(layout_event(LAYOUT), HELD, epoch=2**62)
            await followed.transport.hear(GOOD, 7)  # something is missing
            await asyncio.sleep(0.1)
            view = followed.subscriber.view(GOOD)
            assert view is not None
            return view.reader.epoch, view.reader.stats.failures

    assert (5, 1) == run_in_jumps(body())


# -- ids -------------------------------------------------------------------------------------------------

LAYOUT_EVENT = layout_event(LAYOUT)


def live_reader() -> Reader:
    reader = Reader()
    reader.on_batch(Batch(1, 5, 0, 0, (LAYOUT_EVENT, HELD)), 0.0)
    return reader


@pytest.mark.parametrize("events", [(), (Stored(0, 0, None, (99,)),)], ids=["a heartbeat", "events"])
def test_an_id_that_the_publisher_never_gave_ends_with_the_publishers_own_answer(
    events: tuple[Stored, ...],
) -> None:
    reader = live_reader()
    effects = reader.on_batch(Batch(1, 5, 2**62, 0, events), 1.0)
    assert [Ask(ReplayRequest(5, 2))] == [each for each in effects if isinstance(each, Ask)]

    assert [BecameLive()] == reader.on_reply(ReplayRequest(5, 2), Replay(5, (), 2), 1.0)
    assert 2 == reader.next_event_id


def test_a_batch_that_comes_while_a_request_is_out_is_awaited_whatever_the_answer_to_it_gives() -> None:
    reader = live_reader()
    reader.on_batch(Batch(1, 5, 3, 0), 1.0)
    fourth = Stored(0, 0, None, (4,))
    reader.on_batch(Batch(1, 5, 3, 0, (fourth,)), 1.1)
    third = encode(Batch(1, 5, 2, 0, (HELD,)))

    effects = reader.on_reply(ReplayRequest(5, 2), Replay(5, (third,), 3), 1.2)
    assert [Apply((HELD,)), Apply((fourth,)), BecameLive()] == effects


def test_what_came_since_a_request_that_may_still_be_answered_is_awaited() -> None:
    reader = live_reader()
    reader.on_batch(Batch(1, 5, 3, 0), 1.0)
    reader.on_batch(Batch(1, 5, 4, 0), 1.1)
    reader.on_failure(ReplayRequest(5, 2), "timed out", 3.0)
    assert [Ask(ReplayRequest(5, 2))] == reader.on_tick(9.0)

    reader.on_reply(ReplayRequest(5, 2), Replay(5, (encode(Batch(1, 5, 2, 0, (HELD,))),), 3), 9.1)
    assert reader.stale


def test_a_snapshots_end_corrects_what_nobody_promised() -> None:
    reader = Reader()
    effects = reader.on_batch(Batch(1, 5, 2**62, 0), 0.0)
    assert [Ask(SnapshotRequest(5))] == [each for each in effects if isinstance(each, Ask)]
    assert any(isinstance(each, BecameStale) for each in effects)

    reader.on_reply(SnapshotRequest(5), SnapshotHead(5, 1, 2, 1, 2), 0.1)
    assert 2 == reader._promised_id
