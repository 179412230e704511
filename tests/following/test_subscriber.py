"""The subscriber's own part: effects carried out on the index, whatever the publisher answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from vswa_plugin.errors import ConnectError
from vswa_plugin.following.subscriber import Subscriber
from vswa_plugin.testing.streams import LAYOUT, NaiveIndex
from vswa_plugin.wire.events import (
    VERSION,
    Batch,
    Event,
    Rank,
    ReuseReport,
    Source,
    Stored,
    encode,
    layout_event,
)
from vswa_plugin.wire.subjects import subject

SOURCE = Source("ns", "backend", 7)
RANK = Rank(7)


class NobodyAnswers:
    """A transport whose publishers are deaf."""

    connected = True

    async def subscribe(self, *_: object) -> None:
        return None

    async def flush(self) -> None:
        return None

    async def request(self, *_: object) -> bytes:
        raise ConnectError("no process serves this subject")


def after(*messages: tuple[str, bytes], then: Callable[[Subscriber], Any] = lambda _: None) -> NaiveIndex:
    """The index after these messages."""
    index = NaiveIndex()

    async def body() -> None:
        subscriber = Subscriber(NobodyAnswers(), index)  # type: ignore[arg-type]
        await subscriber.start()
        on_message: Callable[[str, bytes], Awaitable[None]] = subscriber._on_message
        for event_subject, payload in messages:
            await on_message(event_subject, payload)
        then(subscriber)
        await subscriber.stop()

    asyncio.run(body())
    return index


def message(first: int, *events: Event, epoch: int = 5) -> tuple[str, bytes]:
    return subject(SOURCE, "events"), encode(Batch(1, epoch, first, 0, events))


def stored(value: int, group: int = 0) -> Stored:
    return Stored(group, 0, None, (value,))


def test_events_reach_the_index_and_the_rank_is_scored() -> None:
    index = after(message(0, layout_event(LAYOUT), stored(1), stored(2, group=2)))

    assert index.held == {RANK: {0: {1}, 1: set(), 2: {2}}}
    assert index.scored == {RANK: True}


def test_a_higher_epoch_clears_the_rank_at_once_though_nobody_answers() -> None:
    index = after(message(0, layout_event(LAYOUT), stored(1)), message(9, stored(3), epoch=6))

    assert index.held == {RANK: {0: set(), 1: set(), 2: set()}}


def test_an_event_that_does_not_fit_the_layout_costs_the_rank_its_score_until_the_next_epoch() -> None:
    class Strict(NaiveIndex):
        def apply(self, rank: Rank, event: Event) -> None:
            if isinstance(event, Stored) and event.group_id not in self.held[rank]:
                LAYOUT.group(event.group_id)  # raises ConfigError
            super().apply(rank, event)

    index = Strict()

    async def body() -> list[bool]:
        subscriber = Subscriber(NobodyAnswers(), index)  # type: ignore[arg-type]
        scored = []
        for each in (
            message(0, layout_event(LAYOUT)),
            message(1, stored(1, group=9)),
            message(0, layout_event(LAYOUT), epoch=6),
        ):
            await subscriber._on_message(*each)
            scored.append(index.scored.get(RANK, False))
        return scored

    assert asyncio.run(body()) == [True, False, True]


def test_foreign_subjects_and_garbage_are_counted_and_cost_nobody_else_anything() -> None:
    seen: list[Subscriber] = []
    index = after(
        ("vswa.v1.ns.backend.xyz.0.events", b"x"),
        message(0, layout_event(LAYOUT)),
        (subject(Source("ns", "backend", 8), "events"), b"\xc1"),
        then=seen.append,
    )
    (subscriber,) = seen

    assert index.scored == {RANK: True}
    assert (subscriber.stats.foreign_subjects, subscriber.stats.malformed) == (1, 1)


def test_a_rank_that_is_withdrawn_leaves_the_index() -> None:
    index = after(message(0, layout_event(LAYOUT)), then=lambda subscriber: subscriber.withdraw(RANK))

    assert index.held == {}


def test_reports_are_handed_on_with_their_rank_also_of_a_worker_that_drains() -> None:
    got: list[tuple[Rank, ReuseReport]] = []
    reports = [ReuseReport(name, 10, 4) for name in ("a", "b", "c")]

    def reported(number: int) -> tuple[str, bytes]:
        return subject(SOURCE, "events"), encode(Batch(VERSION, 5, 1, 0, (), (reports[number],)))

    async def body() -> None:
        subscriber = Subscriber(NobodyAnswers(), NaiveIndex())  # type: ignore[arg-type]
        await subscriber._on_message(*reported(0))  # nobody wants it
        subscriber.on_report = lambda rank, report: got.append((rank, report))
        await subscriber._on_message(*reported(1))
        subscriber.withdraw(SOURCE.rank)
        await subscriber._on_message(*reported(2))

    asyncio.run(body())

    assert [(SOURCE.rank, report) for report in reports[1:]] == got
