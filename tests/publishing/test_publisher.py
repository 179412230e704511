"""The publisher's core, without a broker: ids, epochs, limits, heartbeats, and what overflows do."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksStored, EngineBlock, EngineEvent, EventsLost, GroupCreated
from vswa_plugin.errors import ConnectError, ProtocolError
from vswa_plugin.publishing.healing import Claim
from vswa_plugin.publishing.publisher import REPORTS, Publisher, PublisherOptions, check_batch_bytes
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire import control
from vswa_plugin.wire.events import (
    Batch,
    Event,
    Layout,
    Removed,
    ReuseReport,
    Source,
    Stored,
    decode,
    encode,
)
from vswa_plugin.wire.numbering import Numbering, split

LAYOUT = CacheLayout((CacheGroup(0, 4, 2), CacheGroup(1, None, 2)), "trtllm_v2", "m")
SOURCE = Source("ns", "backend", 7)


class DirectAdapter:
    """Raw events that carry engine events as they are; or an error to raise."""

    def feed(self, raw: Mapping[str, Any]) -> list[EngineEvent]:
        if "error" in raw:
            raise ProtocolError(raw["error"])
        return [raw["event"]]


class Harness:
    """A publisher with a broker made of a list."""

    def __init__(self, options: PublisherOptions | None = None, adapter: DirectAdapter | None = None) -> None:
        self.sent: list[Batch] = []
        self.observed: list[Batch] = []
        self.broker_away = False
        self.publisher = Publisher(
            SOURCE,
            adapter or DirectAdapter(),
            Residency(LAYOUT),
            self.send,
            lambda _, batch: self.observed.append(batch),
            options or PublisherOptions(heartbeat_s=60),
        )

    async def send(self, payload: bytes) -> None:
        if self.broker_away:
            raise ConnectError("away")
        self.sent.append(decode(payload))

    def offer(self, *events: EngineEvent) -> None:
        self.publisher.offer([{"event": event} for event in events])

    def events(self) -> list[Event]:
        return [event for batch in self.sent for event in batch.events]

    async def during(self, body: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(self.publisher.run())
        await self.until(lambda: bool(self.sent) or self.broker_away)
        await body()
        self.publisher.close()
        await asyncio.wait_for(task, 5)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)


def block(number: int) -> BlocksStored:
    return BlocksStored(1, None, (EngineBlock(number, (number, number)),))


def ids_are_consecutive(batches: list[Batch]) -> bool:
    expected: dict[int, int] = {}
    for batch in batches:
        if batch.first_event_id != expected.get(batch.epoch, 0):
            return False
        expected[batch.epoch] = batch.next_event_id
    return True


def test_event_0_is_the_layout_as_the_engine_created_it() -> None:
    harness = Harness()
    harness.offer(GroupCreated(0, 8), GroupCreated(1, None), block(1))

    async def nothing() -> None:
        return None

    asyncio.run(harness.during(nothing))

    first = harness.events()[0]
    assert isinstance(first, Layout)
    assert [group.window_size for group in first.groups] == [8, None]
    assert isinstance(harness.events()[1], Stored)
    assert harness.sent[0].first_event_id == 0
    assert len({batch.epoch for batch in harness.sent}) == 1


def test_what_the_engine_hands_over_in_one_step_goes_out_in_one_batch() -> None:
    harness = Harness()

    async def one_step() -> None:
        harness.offer(*(block(number) for number in range(10)))
        await harness.until(lambda: len(harness.events()) == 11)

    asyncio.run(harness.during(one_step))

    assert [len(batch.events) for batch in harness.sent if batch.events] == [1, 10]
    assert ids_are_consecutive(harness.sent)
    assert harness.observed == [batch for batch in harness.sent if batch.events]


def test_events_offered_from_many_threads_all_arrive_in_order_of_their_ids() -> None:
    harness = Harness()

    async def many() -> None:
        def offer(start: int) -> None:
            for number in range(start, start + 200):
                harness.offer(block(number))

        threads = [threading.Thread(target=offer, args=(1_000 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        await harness.until(lambda: len(harness.events()) == 801)
        for thread in threads:
            thread.join()

    asyncio.run(harness.during(many))

    assert ids_are_consecutive(harness.sent)
    assert len(harness.publisher.ledger.residency.resident()[1]) == 800


def test_lost_engine_events_begin_a_new_epoch_with_nothing_resident() -> None:
    harness = Harness()

    async def lose() -> None:
        harness.offer(block(1))
        await harness.until(lambda: len(harness.events()) == 2)
        harness.offer(EventsLost(1, 5), block(2))
        await harness.until(lambda: len(harness.events()) == 4)

    asyncio.run(harness.during(lose))

    old, new = sorted({batch.epoch for batch in harness.sent})
    after = [event for batch in harness.sent if batch.epoch == new for event in batch.events]
    assert [type(event) for event in after] == [Layout, Stored]
    assert ids_are_consecutive(harness.sent)
    assert len(harness.publisher.ledger.residency.resident()[1]) == 1
    assert new > old


def test_a_second_loss_in_the_same_turn_leaves_the_layout_where_readers_expect_it() -> None:
    harness = Harness()

    async def lose_twice() -> None:
        harness.offer(block(1))
        await harness.until(lambda: len(harness.events()) == 2)
        harness.offer(EventsLost(1, 5), block(2), EventsLost(6, 9), block(3))
        await harness.until(lambda: len(harness.events()) == 4)

    asyncio.run(harness.during(lose_twice))

    assert [type(event) for event in harness.events()] == [Layout, Stored, Layout, Stored]
    assert ids_are_consecutive(harness.sent)
    assert harness.publisher.ledger.stats.restarts == 1
    assert len(harness.publisher.ledger.residency.resident()[1]) == 1


def test_an_epoch_known_from_before_is_exceeded() -> None:
    before = time.time_ns() + 10**15
    publisher = Publisher(
        SOURCE, DirectAdapter(), Residency(LAYOUT), Harness().send, lambda *_: None, last_epoch=before
    )

    assert publisher.ledger.epoch == before + 1


def test_after_lost_events_a_finished_request_proves_what_it_reused() -> None:
    harness = Harness()
    tokens = (1, 1, 9)

    async def heal() -> None:
        harness.offer(block(1))
        await harness.until(lambda: len(harness.events()) == 2)
        harness.publisher.claim(Claim(tokens, 2, mark=0))
        harness.offer(EventsLost(1, 5))
        await harness.until(lambda: len(harness.events()) == 3)
        harness.publisher.claim(Claim(tokens, 2, mark=harness.publisher.ledger.healing.events))
        await harness.until(lambda: len(harness.events()) == 5)

    asyncio.run(harness.during(heal))

    _, stored, layout, *healed = harness.events()
    assert isinstance(stored, Stored)
    assert isinstance(layout, Layout)
    assert healed == [msgspec.structs.replace(stored, group_id=group) for group in (0, 1)]


def test_an_engine_event_that_cannot_be_read_voids_the_epoch_since_it_may_have_been_a_removal() -> None:
    harness = Harness()

    async def malformed() -> None:
        harness.offer(block(1))
        await harness.until(lambda: len(harness.events()) == 2)
        harness.publisher.offer([{"error": "expected a type, got none"}])
        harness.offer(block(2))
        await harness.until(lambda: len(harness.events()) == 4)

    asyncio.run(harness.during(malformed))

    assert harness.publisher.ledger.stats.rejected_events == 1
    assert harness.publisher.ledger.stats.restarts == 1
    assert len(harness.publisher.ledger.residency.resident()[1]) == 1


def test_an_inbox_that_overflows_is_an_engine_that_lost_events() -> None:
    harness = Harness(PublisherOptions(heartbeat_s=60, inbox_events=10))

    async def overflow() -> None:
        harness.offer(block(1))
        await harness.until(lambda: len(harness.events()) == 2)
        harness.offer(*(block(number) for number in range(100, 150)))
        await harness.until(lambda: harness.publisher.ledger.stats.restarts == 1)
        harness.offer(block(3))
        await harness.until(lambda: isinstance(harness.events()[-1], Stored) and len(harness.events()) == 4)

    asyncio.run(harness.during(overflow))

    assert [type(event) for event in harness.events()] == [Layout, Stored, Layout, Stored]
    assert len(harness.publisher.ledger.residency.resident()[1]) == 1


def test_a_queue_that_overflows_shows_as_a_gap_and_never_holds_the_engine_up() -> None:
    harness = Harness(PublisherOptions(heartbeat_s=60, queue_batches=3))
    harness.broker_away = True

    async def away() -> None:
        for number in range(20):
            harness.offer(block(number))
            await harness.until(lambda n=number: harness.publisher.ledger.stats.events == n + 2)  # type: ignore[misc]
        harness.broker_away = False
        harness.offer(block(99))
        await harness.until(lambda: len(harness.sent) >= 3)

    asyncio.run(harness.during(away))

    assert harness.publisher.stats.dropped_batches > 0
    assert harness.sent[0].first_event_id > 0
    assert not ids_are_consecutive(harness.sent)
    assert harness.publisher.ledger.next_event_id == 22


def test_heartbeats_carry_the_next_id_and_use_up_none() -> None:
    harness = Harness(PublisherOptions(heartbeat_s=0.02))

    async def idle() -> None:
        harness.offer(block(1))
        await harness.until(lambda: harness.publisher.stats.heartbeats >= 5)

    asyncio.run(harness.during(idle))

    beats = [batch for batch in harness.sent if not batch.events]
    assert ids_are_consecutive(harness.sent)
    assert beats[-1].first_event_id == 2
    assert harness.observed == [batch for batch in harness.sent if batch.events]


def test_an_engine_that_computes_for_long_delays_no_heartbeat() -> None:
    harness = Harness(PublisherOptions(heartbeat_s=0.05))

    async def busy() -> None:
        thread = threading.Thread(target=_compute, args=(1.0,))
        thread.start()
        await harness.until(lambda: not thread.is_alive())

    asyncio.run(harness.during(busy))

    beats = [batch.published_at_ns for batch in harness.sent if not batch.events]
    # 20 are due; an engine that held the loop up would leave one or two.
    assert len(beats) >= 10


def _compute(seconds: float) -> None:
    """Pure Python, holding the interpreter as an engine's step does at its worst."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1_000))


def test_epochs_rise_even_when_the_clock_stands_still_or_goes_back() -> None:
    clock = iter([50, 50, 10, 70])
    numbering = Numbering(lambda: next(clock), last_epoch=60)
    epochs = [numbering.epoch]
    for _ in range(3):
        numbering.new_epoch()
        epochs.append(numbering.epoch)

    assert epochs == [61, 62, 63, 70]


HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=400).map(tuple)
EVENTS = st.one_of(
    st.builds(Stored, st.just(1), st.integers(0, 9), st.none() | st.integers(0, 9), HASHES),
    st.builds(Removed, st.just(1), HASHES),
)


@given(st.lists(EVENTS, max_size=5), st.sampled_from([600, 1_000, 4_000]))
def test_split_batches_fit_and_mean_the_same(events: list[Event], limit: int) -> None:
    parts = list(split(events, limit))

    for part in parts:
        assert len(encode(Batch(1, 2**63, 2**63, 2**63, tuple(part)))) <= limit + 64
    assert _flat(events) == _flat([event for part in parts for event in part])


def _flat(events: list[Event]) -> list[tuple[Any, ...]]:
    """One entry per block: kind, hash, and for stored ones position and parent."""
    flat: list[tuple[Any, ...]] = []
    for event in events:
        if isinstance(event, Removed):
            flat += [("removed", value) for value in event.sequence_hashes]
        elif isinstance(event, Stored):
            parent = event.parent_hash
            for offset, value in enumerate(event.sequence_hashes):
                flat.append(("stored", value, event.position + offset, parent))
                parent = value
    return flat


def test_batches_stay_below_what_the_broker_takes() -> None:
    assert check_batch_bytes(PublisherOptions(), 1 << 20).batch_bytes == 256 << 10
    assert check_batch_bytes(PublisherOptions(), 4096).batch_bytes == 3072


@pytest.mark.parametrize("heartbeat_s", [0.01])
def test_close_publishes_what_is_still_in_the_inbox(heartbeat_s: float) -> None:
    harness = Harness(PublisherOptions(heartbeat_s=heartbeat_s))

    async def last_moment() -> None:
        harness.offer(*(block(number) for number in range(5_000)))

    asyncio.run(harness.during(last_moment))

    assert len(harness.publisher.ledger.residency.resident()[1]) == 5_000
    assert len(harness.events()) == 5_001


def test_a_report_goes_out_at_once_without_an_id_and_is_not_replayed() -> None:
    harness = Harness()
    reports = [ReuseReport(f"request {number}", 100, number) for number in range(REPORTS + 2)]

    async def body() -> None:
        harness.offer(block(1))
        for report in reports:
            harness.publisher.report(report)
        await harness.until(lambda: sum(len(batch.reports) for batch in harness.sent) == len(reports))
        harness.offer(block(2))

    asyncio.run(harness.during(body))

    assert reports == [report for batch in harness.sent for report in batch.reports]
    assert all(not batch.events for batch in harness.sent if batch.reports)
    assert ids_are_consecutive(harness.sent)
    assert 3 == harness.sent[-1].next_event_id
    replay = control.decode_reply(
        harness.publisher.answer(control.encode(control.ReplayRequest(harness.sent[-1].epoch, 0)))
    )
    assert isinstance(replay, control.Replay)
    assert not any(decode(payload).reports for payload in replay.payloads)
