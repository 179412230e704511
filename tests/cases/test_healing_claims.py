"""A request that was under way when engine events were lost proves nothing of what the engine holds now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from tests.e2e_helpers import eventually
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksRemoved, BlocksStored, EngineBlock, EngineEvent, EventsLost
from vswa_plugin.errors import ConfigError
from vswa_plugin.publishing.healing import Claim
from vswa_plugin.publishing.publisher import Publisher, PublisherOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire.events import Batch, Cleared, Layout, Removed, Source, Stored, decode

#: A window of two blocks of two tokens, and global attention.
LAYOUT = CacheLayout((CacheGroup(0, 4, 2), CacheGroup(1, None, 2)), "trtllm_v2", "m")
INBOX_EVENTS = 8
PROMPT = (1, 2, 3, 4, 5)
REUSED = 4
BLOCKS = (EngineBlock("a", (1, 2)), EngineBlock("b", (3, 4)))
#: The engine evicts both blocks of the sliding group, and this is what the worker never reads.
EVICTION = BlocksRemoved(0, ("a", "b"))
#: Blocks per group, as counts: what the wire names by hashes.
Held = dict[int, int]


class Adapter:
    """Hands engine events on as they are; one that is None cannot be read."""

    def feed(self, raw: Mapping[str, Any]) -> list[EngineEvent]:
        if raw["event"] is None:
            raise ConfigError("expected an event, got nothing")
        return [raw["event"]]


class Worker:
    """A real publisher, and what a reader of its batches believes that it holds."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self._resident: dict[int, set[int]] = {}
        self.publisher = Publisher(
            Source("n", "c", 1),
            Adapter(),
            Residency(LAYOUT),
            self._read,
            lambda *_: None,
            PublisherOptions(inbox_events=INBOX_EVENTS),
        )

    def offer(self, *events: EngineEvent | None) -> None:
        self.publisher.offer([{"event": event} for event in events])

    def resident(self) -> Held:
        return {group: len(blocks) for group, blocks in self._resident.items()}

    async def _read(self, payload: bytes) -> None:
        batch: Batch = decode(payload)
        if batch.epoch not in self.epochs:
            self.epochs.append(batch.epoch)
        for event in batch.events:
            match event:
                case Layout():
                    self._resident = {group.group_id: set() for group in event.groups}
                case Stored():
                    self._resident[event.group_id].update(event.sequence_hashes)
                case Removed():
                    self._resident[event.group_id].difference_update(event.sequence_hashes)
                case Cleared():
                    for group in self._resident if event.group_id is None else [event.group_id]:
                        self._resident[group].clear()


def lost_by_the_engine(worker: Worker) -> None:
    """Its event buffer ran over."""
    worker.offer(EventsLost(7, 9))


def lost_by_the_worker(worker: Worker) -> None:
    """Its inbox ran over, since the event loop was held up."""
    worker.offer(*[EVICTION] * (INBOX_EVENTS + 1))


def lost_as_unreadable(worker: Worker) -> None:
    worker.offer(None)


LOSSES = [lost_by_the_engine, lost_by_the_worker, lost_as_unreadable]


def resident_after(
    arrives_before_the_loss: bool, lose: Callable[[Worker], None], then: Sequence[EngineEvent] = ()
) -> Held:
    """What is published as resident after one request, the loss, and the request's end.

    :param then: engine events that come after the loss and before the request ends.
    """

    async def body() -> Held:
        worker = Worker()
        running = asyncio.create_task(worker.publisher.run())
        worker.offer(BlocksStored(0, None, BLOCKS), BlocksStored(1, None, BLOCKS))
        await eventually(lambda: worker.resident() == {0: 2, 1: 2}, "both groups are published")
        before = worker.publisher.engine_events
        lose(worker)
        await eventually(lambda: len(worker.epochs) == 2, "a new epoch has begun")
        mark = before if arrives_before_the_loss else worker.publisher.engine_events
        worker.offer(*then)
        worker.publisher.claim(Claim(PROMPT, REUSED, mark))
        worker.publisher.close()
        await running
        return worker.resident()

    return asyncio.run(body())


@pytest.mark.parametrize("lose", LOSSES)
def test_a_request_that_came_before_events_were_lost_brings_no_evicted_block_back(
    lose: Callable[[Worker], None],
) -> None:
    assert 0 == resident_after(True, lose)[0], "the engine holds neither block of the sliding group"


@pytest.mark.parametrize("lose", LOSSES)
def test_a_request_that_came_after_events_were_lost_brings_back_what_it_reused(
    lose: Callable[[Worker], None],
) -> None:
    assert {0: 2, 1: 2} == resident_after(False, lose)


@pytest.mark.parametrize("before", [True, False])
def test_a_removal_that_was_seen_after_the_loss_keeps_a_block_out(before: bool) -> None:
    resident = resident_after(before, lost_by_the_engine, [EVICTION])

    assert 0 == resident[0]
