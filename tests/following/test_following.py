"""Time and faults on the router's side: whose heartbeats are awaited how long, and what one rank can cost."""

from __future__ import annotations

import asyncio
import logging
import math

import pytest

from tests.cases.follower_helpers import (
    GOOD,
    HELD,
    LAYOUT,
    STRANGE,
    Followed,
    batch,
    entry_of,
    run_in_jumps,
    snapshot,
    source_of_worker,
)
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.following.due import Due
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.view import Attention, View, ViewOptions
from vswa_plugin.index import WindowIndex
from vswa_plugin.wire import control
from vswa_plugin.wire.events import Event, Rank, Source, Stored, layout_event
from vswa_plugin.wire.subjects import subject

LAYOUT_EVENT = layout_event(LAYOUT)


async def stays_scored(followed: Followed, rank: Rank, seconds: float) -> bool:
    await asyncio.sleep(seconds)
    return rank in followed.score()


def heard_once(heartbeat_s: float | None, *looks: float) -> list[bool]:
    """Whether a rank that says nothing after its layout is scored, after so many seconds each."""

    async def body() -> list[bool]:
        async with Followed() as followed:
            await asyncio.sleep(1.0)  # as in a router that has run for a while
            await followed.transport.hear(STRANGE, 0, layout_event(LAYOUT, heartbeat_s), HELD)
            passed, found = 0.0, []
            for look in looks:
                found.append(await stays_scored(followed, STRANGE, look - passed))
                passed = look
            return found

    return run_in_jumps(body())


@pytest.mark.parametrize("heartbeat_s", [0.2, 1.0, 5.0, 60.0])
def test_each_rank_is_silent_by_its_own_heartbeats_within_three(heartbeat_s: float) -> None:
    assert [True, False] == heard_once(heartbeat_s, 1.1 * heartbeat_s, 3 * heartbeat_s)


@pytest.mark.parametrize("said", [None, 0.0, -1.0, math.nan, math.inf, 1e9])
def test_heartbeats_that_are_not_said_or_cannot_be_are_those_of_the_options(said: float | None) -> None:
    assert [True, False] == heard_once(said, 2.4, 3.0)


def test_a_rank_whose_heartbeats_become_shorter_is_not_awaited_by_the_longer_ones() -> None:
    async def body() -> list[bool]:
        async with Followed() as followed:
            await asyncio.sleep(1.0)
            await followed.transport.hear(STRANGE, 0, layout_event(LAYOUT, 60.0), HELD)
            await followed.transport.hear(STRANGE, 0, layout_event(LAYOUT, 1.0), HELD, epoch=6)
            return [await stays_scored(followed, STRANGE, 2.0), await stays_scored(followed, STRANGE, 1.0)]

    assert [True, False] == run_in_jumps(body())


def test_the_clock_is_looked_at_as_often_as_the_shortest_heartbeats_need_it() -> None:
    async def body() -> bool:
        async with Followed() as followed:
            await followed.transport.hear(STRANGE, 0, layout_event(LAYOUT, 0.06), HELD)
            for _ in range(5):
                await asyncio.sleep(0.052)
                await followed.transport.hear(STRANGE, 2)
            return await stays_scored(followed, STRANGE, 0.18)  # all of it between two looks of the options

    assert not run_in_jumps(body())


def test_a_silent_rank_that_beats_again_is_scored_again_and_found_silent_again() -> None:
    async def body() -> list[bool]:
        async with Followed() as followed:
            found = []
            for _ in range(3):
                found.append(await stays_scored(followed, GOOD, 4.0))
                await followed.transport.hear(GOOD, 2)
                found.append(GOOD in followed.score())
            return found

    assert [False, True] * 3 == run_in_jumps(body())


def test_a_worker_that_drains_is_heard_of_until_it_is_silent_and_forgotten_later() -> None:
    async def body() -> tuple[list[bool], int, int]:
        async with Followed() as followed:
            subscriber = followed.subscriber
            subscriber.withdraw(GOOD)
            heard = []
            for _ in range(5):
                await asyncio.sleep(1.0)
                await followed.transport.hear(GOOD, 2)
                heard.append(not subscriber.silent(GOOD))
            await asyncio.sleep(4.0)
            heard.append(not subscriber.silent(GOOD))
            remembered = len(subscriber._departed) + len(subscriber._by_subject)
            await asyncio.sleep(70.0)
            return heard, remembered, len(subscriber._departed) + len(subscriber._by_subject)

    assert ([True] * 5 + [False], 2, 0) == run_in_jumps(body())


def test_a_worker_that_begins_a_new_epoch_while_it_drains_is_not_scored() -> None:
    async def body() -> tuple[dict[Rank, int], list[str]]:
        async with Followed() as followed:
            followed.subscriber.withdraw(GOOD)
            await followed.transport.hear(GOOD, 0, layout_event(LAYOUT), HELD, epoch=6)
            await followed.transport.hear(GOOD, 9, epoch=6)
            await followed.transport.deliver(subject(source_of_worker(GOOD.worker_id), "events"), b"odd")
            return followed.score(), followed.transport.asked

    assert ({}, []) == run_in_jumps(body())


def test_a_worker_that_left_while_something_of_it_was_missing_is_asked_no_more() -> None:
    async def body() -> tuple[int, int]:
        async with Followed() as followed:
            await followed.transport.hear(GOOD, 9)
            await asyncio.sleep(1.0)
            followed.subscriber.withdraw(GOOD)
            await asyncio.sleep(0.1)
            asked = len(followed.transport.asked)
            for _ in range(80):
                await asyncio.sleep(1.0)
                await followed.transport.hear(GOOD, 10)
            return asked, len(followed.transport.asked)

    before, after = run_in_jumps(body())

    assert 0 < before == after


def test_a_worker_that_drained_and_comes_back_is_followed_for_good() -> None:
    async def body() -> list[dict[Rank, int]]:
        async with Followed() as followed:
            subscriber = followed.subscriber
            subscriber.withdraw(GOOD)
            await followed.transport.hear(GOOD, 2)
            followed.transport.answer = snapshot(layout_event(LAYOUT), HELD, epoch=6)
            subscriber.announce(source_of_worker(GOOD.worker_id), 6)
            await asyncio.sleep(1.0)
            assert not subscriber._departed
            scores = [followed.score()]
            for _ in range(90):  # longer than what has left is remembered
                await asyncio.sleep(1.0)
                await followed.transport.hear(GOOD, 2, epoch=6)
            assert subscriber._tasks.ended is None
            return [*scores, followed.score()]

    assert [{GOOD: 32}, {GOOD: 32}] == run_in_jumps(body())


def test_the_registry_decides_whose_a_worker_id_is_where_somebody_else_spoke_first() -> None:
    other = Source("ns", "other", STRANGE.worker_id)

    async def body() -> list[dict[Rank, int]]:
        async with Followed() as followed:
            await followed.transport.deliver(subject(other, "events"), batch(0, layout_event(LAYOUT), HELD))
            scores = [followed.score()]
            followed.transport.answer = snapshot(layout_event(LAYOUT), HELD)
            followed.subscriber.announce(source_of_worker(STRANGE.worker_id), 5)
            scores.append(followed.score())
            await asyncio.sleep(1.0)
            cleared = batch(0, layout_event(LAYOUT), epoch=9)
            await followed.transport.deliver(subject(other, "events"), cleared)
            return [*scores, followed.score()]

    assert [{GOOD: 32, STRANGE: 32}, {GOOD: 32}, {GOOD: 32, STRANGE: 32}] == run_in_jumps(body())


def test_what_follows_a_refused_layout_in_its_batch_is_not_said_to_be_wrong_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def body() -> None:
        async with Followed() as followed:
            odd = CacheLayout(LAYOUT.groups, "a_rule_of_nobody", "m")
            await followed.transport.hear(STRANGE, 0, layout_event(odd), HELD, HELD, HELD)
            await followed.transport.hear(STRANGE, 4, HELD)

    with caplog.at_level(logging.ERROR):
        run_in_jumps(body())

    assert 1 == len(caplog.records)


def test_a_repaired_rank_is_looked_at_no_more_than_others() -> None:
    async def body() -> tuple[int, int]:
        async with Followed() as followed:
            followed.transport.answer = snapshot(layout_event(LAYOUT), HELD, next_event_id=9)
            await followed.transport.hear(GOOD, 9)
            repairing = len(followed.subscriber._repairing)
            await asyncio.sleep(60.0)
            return repairing, len(followed.subscriber._repairing)

    assert (1, 0) == run_in_jumps(body())


def test_an_answer_that_comes_when_its_view_was_forgotten_and_followed_anew_changes_nothing_for_good() -> (
    None
):
    """A request was out while the rank fell silent; the registry then gave a lower epoch, of a new life."""

    async def body() -> list[dict[Rank, int]]:
        async with Followed() as followed:
            answers: list[asyncio.Future[bytes]] = []

            async def late(to_subject: str, payload: bytes, timeout: float) -> bytes:
                answers.append(asyncio.get_running_loop().create_future())
                return await answers[-1]

            followed.transport.request = late  # type: ignore[method-assign]
            await followed.transport.hear(GOOD, 7)  # something is missing: it is asked for
            await asyncio.sleep(5.0)
            followed.subscriber.announce(source_of_worker(GOOD.worker_id), 4)
            await followed.transport.hear(GOOD, 0, layout_event(LAYOUT), HELD, epoch=4)
            for snapshot_part in (
                control.SnapshotHead(4, 1, 2, 1, 2),
                control.SnapshotPart(4, 1, 0, (LAYOUT_EVENT, HELD)),
            ):
                await asyncio.sleep(0)
                answers[-1].set_result(control.encode(snapshot_part))
                await asyncio.sleep(0.1)
            answers[0].set_result(control.encode(control.Replay(5, (), 2)))
            found = []
            for _ in range(5):
                await followed.transport.hear(GOOD, 2, epoch=4)
                await asyncio.sleep(1.0)
                found.append(followed.score())
            return found

    assert [{GOOD: 32}] * 5 == run_in_jumps(body())


def test_a_rank_that_nobody_ever_spoke_of_is_silent() -> None:
    async def body() -> bool:
        async with Followed() as followed:
            return followed.subscriber.silent(Rank(99))

    assert run_in_jumps(body())


class Faulty(WindowIndex):
    """An index with a bug that one rank brings out."""

    at = ""

    def apply(self, rank: Rank, event: Event) -> None:
        if rank == STRANGE and self.at == "apply":
            raise RuntimeError("a bug")
        super().apply(rank, event)

    def set_scored(self, rank: Rank, scored: bool) -> None:
        if rank == STRANGE and self.at == "set_scored":
            raise RuntimeError("a bug")
        super().set_scored(rank, scored)


@pytest.mark.parametrize("at", ["apply", "set_scored"])
def test_something_unforeseen_with_one_rank_costs_that_rank_alone_until_its_next_epoch(
    at: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> tuple[list[str], list[dict[Rank, int]], list[bool], int]:
        followed = Followed()
        followed.index = index = Faulty()
        followed.subscriber._index = index
        async with followed:
            await asyncio.sleep(1.0)  # as in a router that has run for a while
            await followed.transport.hear(GOOD, 2)
            index.at = at
            await followed.transport.hear(STRANGE, 0, layout_event(LAYOUT), HELD)
            await followed.transport.hear(STRANGE, 2, Stored(0, 1, 11, (12,)))
            scores = [followed.score()]
            index.at = ""
            await followed.transport.hear(STRANGE, 0, layout_event(LAYOUT), HELD, epoch=6)
            scores.append(followed.score())
            silent = [await stays_scored(followed, rank, 3.0) for rank in (GOOD, STRANGE)]
            return followed.transport.raised, scores, silent, followed.subscriber.stats.errors

    with caplog.at_level(logging.ERROR):
        raised, scores, silent, errors = run_in_jumps(body())

    assert [] == raised
    assert [{GOOD: 32}, {GOOD: 32, STRANGE: 32}] == scores
    assert [False, False] == silent, "time goes on for both"
    assert 1 <= errors <= 2
    assert 1 == caplog.text.count("Traceback"), "it is said once"


def test_a_refused_rank_does_not_hold_up_those_who_wait_for_all() -> None:
    async def body() -> tuple[str, float]:
        async with Followed() as followed:
            odd = CacheLayout(LAYOUT.groups, "a_rule_of_nobody", "m")
            await followed.transport.hear(STRANGE, 0, layout_event(odd))
            view = followed.subscriber.view(STRANGE)
            assert view is not None
            assert followed.subscriber.live(GOOD)
            assert not followed.subscriber.live(STRANGE)
            return view.state, float(followed.subscriber.changed.is_set())

    assert ("unreadable", 1.0) == run_in_jumps(body())


def test_waiting_for_all_ends_when_those_that_are_missing_cannot_become_live() -> None:
    async def body() -> tuple[bool, float]:
        async with Followed() as followed:
            fleet = Fleet(followed.transport, None)  # type: ignore[arg-type]
            fleet.subscriber = followed.subscriber
            fleet.entries = {str(n): entry_of(n) for n in (GOOD.worker_id, STRANGE.worker_id)}
            odd = CacheLayout(LAYOUT.groups, "a_rule_of_nobody", "m")
            loop = asyncio.get_running_loop()
            began = loop.time()
            waiting = asyncio.create_task(fleet.settled(60.0))
            await asyncio.sleep(1.0)
            await followed.transport.hear(STRANGE, 0, layout_event(odd))
            return await waiting, loop.time() - began

    exact, took = run_in_jumps(body())

    assert not exact
    assert took < 2.0


# -- whose turn it is ------------------------------------------------------------------------------


def views(attention: Attention, *heartbeats: float) -> list[View]:
    found = []
    for number, heartbeat_s in enumerate(heartbeats):
        view = View(Source("n", "c", number), ViewOptions(), attention=attention)
        view.heartbeat_s = heartbeat_s
        found.append(view)
    return found


def test_views_come_when_their_moment_has_passed_and_only_then() -> None:
    attention, due = Attention(math.inf), Due()
    attention.tick(0.0, True)
    short, long = views(attention, 1.0, 4.0)
    for view in (short, long):
        due.add(view)
    came = []
    for now in (2.5, 2.6, 10.0, 10.1):
        attention.tick(now, True)
        came.append(list(due.take(attention.now)))

    assert [[], [short], [], [long]] == came, "neither is added again"


def test_a_view_that_is_added_again_comes_once() -> None:
    attention, due = Attention(math.inf), Due()
    attention.tick(0.0, True)
    (view,) = views(attention, 1.0)
    for _ in range(5):
        due.add(view)
    attention.tick(3.0, True)

    assert [view] == list(due.take(attention.now))
    due.add(view)
    due.discard(view)
    attention.tick(100.0, True)
    assert [] == list(due.take(attention.now))


def test_a_silent_rank_that_is_registered_does_not_come_again() -> None:
    attention, due = Attention(math.inf), Due()
    attention.tick(0.0, True)
    (view,) = views(attention, 1.0)
    due.add(view)
    view.registered = True
    attention.tick(3.0, True)
    due.add(view)
    attention.tick(500.0, True)

    assert math.inf == view.due
    assert [] == list(due.take(attention.now))
