"""What one rank says costs the router no more than that rank: its layout, subject, drain, and size."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tests.cases.follower_helpers import (
    GOOD,
    GROUPS,
    HELD,
    LAYOUT,
    STRANGE,
    UNKNOWN_RULE,
    Followed,
    HandedIn,
    Steps,
    run_in_jumps,
    snapshot,
    source_of_worker,
)
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.subscriber import Subscriber
from vswa_plugin.index import WindowIndex
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.router.http.dump import DumpQuery, dump
from vswa_plugin.wire.events import Layout, Rank, Stored, layout_event
from vswa_plugin.wire.transport import Transport

#: Longer than any silence that is allowed, shorter than what is forgotten.
LONG_S = 20.0

NO_SUCH_RULE = layout_event(CacheLayout(GROUPS, UNKNOWN_RULE, "m"))
TWO_SIZES = layout_event(CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 16)), "vllm", "m"))
ONE_ID_TWICE = layout_event(CacheLayout((CacheGroup(0, None, 32), CacheGroup(0, 64, 32)), "trtllm_v2", "m"))

REFUSED = [
    pytest.param(NO_SUCH_RULE, id="unknown rule"),
    pytest.param(TWO_SIZES, id="two block sizes"),
    pytest.param(ONE_ID_TWICE, id="one group id twice"),
]


# -- a layout that the index refuses -----------------------------------------------------------------


@pytest.mark.parametrize("refused", REFUSED)
def test_a_rank_that_dies_is_found_silent_though_the_layout_of_another_one_is_refused(
    refused: Layout,
) -> None:
    async def body() -> tuple[object, ...]:
        async with Followed() as followed:
            before = followed.score()
            await followed.transport.hear(STRANGE, 0, refused)
            await asyncio.sleep(LONG_S)
            return before, followed.silent(GOOD), followed.score()

    assert ({GOOD: 32}, True, {}) == run_in_jumps(body())


@pytest.mark.parametrize("refused", REFUSED)
def test_a_layout_that_is_refused_is_logged_once_and_is_no_error_of_the_message_handler(
    refused: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> list[str]:
        async with Followed() as followed:
            caplog.clear()
            await followed.transport.hear(STRANGE, 0, refused)
            for _ in range(5):
                await followed.transport.hear(STRANGE, 1)
                await asyncio.sleep(1)
            return followed.transport.raised

    raised = run_in_jumps(body())
    said = [each for each in caplog.messages if str(source_of_worker(STRANGE.worker_id)) in each]

    assert ([], 1) == (raised, len(said))


def test_the_line_about_a_layout_with_an_unknown_rule_names_the_rule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def body() -> None:
        async with Followed() as followed:
            await followed.transport.hear(STRANGE, 0, NO_SUCH_RULE)

    run_in_jumps(body())

    assert [True] == [UNKNOWN_RULE in each for each in caplog.messages if "backend" in each]


@pytest.mark.parametrize("refused", REFUSED)
def test_a_rank_whose_layout_was_refused_is_scored_when_it_sends_one_that_is_fine(refused: Layout) -> None:
    async def body() -> dict[Rank, int]:
        async with Followed() as followed:
            await followed.transport.hear(STRANGE, 0, refused, HELD)
            await followed.transport.hear(STRANGE, 0, layout_event(LAYOUT), HELD, epoch=6)
            return followed.score()

    assert {GOOD: 32, STRANGE: 32} == run_in_jumps(body())


def test_a_rank_whose_layout_was_refused_is_scored_after_a_snapshot_that_is_fine() -> None:
    async def body() -> dict[Rank, int]:
        async with Followed() as followed:
            await followed.transport.hear(STRANGE, 0, NO_SUCH_RULE)
            followed.transport.answer = snapshot(layout_event(LAYOUT), HELD, epoch=6)
            await followed.transport.hear(STRANGE, 2, epoch=6)
            await asyncio.sleep(1)
            return followed.score()

    assert {GOOD: 32, STRANGE: 32} == run_in_jumps(body())


def test_a_rank_whose_later_layout_is_refused_is_not_scored_by_its_former_one() -> None:
    async def body() -> tuple[dict[Rank, int], dict[Rank, int]]:
        async with Followed() as followed:
            await followed.transport.hear(STRANGE, 0, layout_event(LAYOUT), HELD)
            before = followed.score()
            await followed.transport.hear(STRANGE, 0, NO_SUCH_RULE, HELD, epoch=6)
            return before, followed.score()

    assert ({GOOD: 32, STRANGE: 32}, {GOOD: 32}) == run_in_jumps(body())


# -- a subject that nobody could have ----------------------------------------------------------------

ODD_SUBJECTS = [
    pytest.param("vswa.v1.team@x.backend.7.0.events", id="namespace"),
    pytest.param("vswa.v1.ns.my@component.7.0.events", id="component"),
    pytest.param("vswa.v1.ns.backend.xyz.0.events", id="worker id"),
    pytest.param("vswa.v1.ns.backend.7.x.events", id="dp rank"),
]


@pytest.mark.parametrize("odd", ODD_SUBJECTS)
def test_a_message_on_an_odd_subject_makes_no_rank(odd: str) -> None:
    async def body() -> tuple[list[Rank], list[str]]:
        async with Followed() as followed:
            await followed.transport.deliver(odd, b"")
            ranks = [view.source.rank for view in followed.subscriber.views()]
            return ranks, followed.transport.raised

    assert ([GOOD], []) == run_in_jumps(body())


@pytest.mark.parametrize("odd", ODD_SUBJECTS)
def test_a_rank_that_dies_is_found_silent_long_after_a_message_on_an_odd_subject(odd: str) -> None:
    async def body() -> tuple[bool, dict[Rank, int]]:
        async with Followed() as followed:
            await followed.transport.deliver(odd, b"")
            for _ in range(90):
                await asyncio.sleep(1)
                await followed.transport.hear(GOOD, 2)
            await asyncio.sleep(LONG_S)
            return followed.silent(GOOD), followed.score()

    assert (True, {}) == run_in_jumps(body())


# -- a worker that drains ----------------------------------------------------------------------------


def test_a_worker_that_left_the_registry_and_still_beats_is_neither_asked_nor_scored() -> None:
    async def body() -> tuple[list[str], dict[Rank, int]]:
        async with Followed() as followed:
            followed.transport.answer = snapshot(layout_event(LAYOUT), HELD)
            followed.subscriber.withdraw(GOOD)
            for next_event_id in (2, 7, 7):  # it also publishes on, which is missed here
                await followed.transport.hear(GOOD, next_event_id)
                await asyncio.sleep(1)
            return followed.transport.asked, followed.score()

    assert ([], {}) == run_in_jumps(body())


@pytest.mark.parametrize("epoch", [5, 6])
def test_a_worker_that_left_the_registry_and_came_back_is_followed_again(epoch: int) -> None:
    async def body() -> dict[Rank, int]:
        async with Followed() as followed:
            followed.transport.answer = snapshot(layout_event(LAYOUT), HELD, epoch=epoch)
            followed.subscriber.withdraw(GOOD)
            followed.subscriber.announce(source_of_worker(GOOD.worker_id), epoch)
            await followed.transport.hear(GOOD, 2, epoch=epoch)
            await asyncio.sleep(1)
            return followed.score()

    assert {GOOD: 32} == run_in_jumps(body())


# -- many ranks --------------------------------------------------------------------------------------

FEW, MANY = 25, 200


@pytest.mark.parametrize("scored", [True, False], ids=["as before", "changed"])
def test_saying_whether_a_rank_is_scored_costs_the_same_among_few_ranks_and_many(scored: bool) -> None:
    def steps(ranks: int) -> int:
        index = WindowIndex()
        for worker_id in range(ranks):
            index.join(Rank(worker_id), LAYOUT)
        with Steps() as taken:
            index.set_scored(Rank(3), scored)
        return taken.count

    assert steps(MANY) <= 2 * steps(FEW)


def test_a_rank_that_is_not_scored_is_the_only_one_that_scores_nothing() -> None:
    index = WindowIndex()
    for worker_id in range(5):
        index.join(Rank(worker_id), LAYOUT)
        index.apply(Rank(worker_id), HELD)
    for worker_id, scored in ((1, False), (2, False), (1, True), (3, True)):
        index.set_scored(Rank(worker_id), scored)
    index.drop(Rank(4))

    assert {Rank(0): 32, Rank(1): 32, Rank(3): 32} == index.score([11, 12], 65)


async def _subscribed(ranks: int) -> tuple[HandedIn, Subscriber]:
    transport = HandedIn()
    subscriber = Subscriber(transport, WindowIndex())  # type: ignore[arg-type]
    await subscriber.start()
    for worker_id in range(ranks):
        await transport.hear(Rank(worker_id), 0, layout_event(LAYOUT))
    return transport, subscriber


def test_a_second_of_ticks_costs_each_rank_the_same_among_few_and_many() -> None:
    async def steps(ranks: int) -> float:
        _, subscriber = await _subscribed(ranks)
        with Steps() as taken:
            await asyncio.sleep(1.01)
        await subscriber.stop()
        return taken.count / ranks

    assert run_in_jumps(steps(MANY)) <= 2 * run_in_jumps(steps(FEW))


def test_a_heartbeat_costs_the_same_among_few_ranks_and_many() -> None:
    async def steps(ranks: int) -> int:
        transport, subscriber = await _subscribed(ranks)
        with Steps() as taken:
            await transport.hear(Rank(3), 1)
        await subscriber.stop()
        return taken.count

    assert run_in_jumps(steps(MANY)) <= 2 * run_in_jumps(steps(FEW))


# -- a dump of a large rank --------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [None, False], ids=["default", "pure Python"])
def test_a_dump_holds_the_event_loop_no_longer_for_a_rank_with_more_blocks(kernel: bool | None) -> None:
    async def most_steps_at_once(blocks: int) -> int:
        index = WindowIndex(kernel=kernel)
        index.join(GOOD, LAYOUT)
        hashes = tuple(number * 0x9E3779B97F4A7C15 % 2**64 for number in range(blocks))
        index.apply(GOOD, Stored(0, 0, None, hashes))
        fleet = Fleet(Transport(), FileRegistry("/nonexistent"), index=index)
        turns: list[int] = []

        async def routing(taken: Steps) -> None:
            while True:
                turns.append(taken.count)
                await asyncio.sleep(0)

        with Steps() as taken:
            other = asyncio.create_task(routing(taken))
            await asyncio.sleep(0)
            size = sum([len(piece) async for piece in dump(fleet, DumpQuery())])
            other.cancel()
        assert size > 15 * blocks
        return max(after - before for before, after in itertools.pairwise(turns))

    assert asyncio.run(most_steps_at_once(160_000)) <= 2 * asyncio.run(most_steps_at_once(40_000))
