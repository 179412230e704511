"""Recorded TensorRT-LLM V2 managers, from their raw events to a prediction: exact in whole blocks, each time.

The events go the whole way: adapter, residency with its node table, wire bytes, and a reader's view.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from vswa_plugin.blocks.hashing import block_hashes, sequence_hashes
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import resumable, rule_named
from vswa_plugin.index import WindowIndex
from vswa_plugin.publishing.residency import Residency, Restart
from vswa_plugin.wire.events import (
    VERSION,
    Batch,
    Event,
    Layout,
    Moved,
    Rank,
    Removed,
    Stored,
    Unknown,
    decode,
    encode,
    layout_event,
)

DATA = Path(__file__).parents[1] / "data"
RULE = "trtllm_v2"
RANK = Rank(7)


class Prediction(NamedTuple):
    """Of one request, in tokens."""

    actual: int
    predicted: int
    global_only: int


class Index(Protocol):
    """What is asked of an index here."""

    def join(self, rank: Rank, layout: CacheLayout) -> None: ...

    def apply(self, rank: Rank, event: Event) -> None: ...

    def score(self, sequence_hashes: Sequence[int], prompt_len: int) -> dict[Rank, int]: ...


class SetIndex:
    """The plainest index: a set per group of one rank."""

    def join(self, rank: Rank, layout: CacheLayout) -> None:
        self.layout = layout
        self.held: dict[int, set[int]] = {group.group_id: set() for group in layout.groups}

    def apply(self, rank: Rank, event: Event) -> None:
        match event:
            case Stored():
                assert not self.held[event.group_id].intersection(event.sequence_hashes), "stored twice"
                self.held[event.group_id].update(event.sequence_hashes)
            case Removed():
                assert self.held[event.group_id].issuperset(event.sequence_hashes), "removed, never stored"
                self.held[event.group_id].difference_update(event.sequence_hashes)
            case Moved():
                assert self.held[event.group_id].issuperset(event.sequence_hashes), "moved, never stored"
            case _:
                raise AssertionError(f"no manager clears its cache here: {event}")

    def score(self, sequence_hashes: Sequence[int], prompt_len: int) -> dict[Rank, int]:
        held = {group_id: [h in hashes for h in sequence_hashes] for group_id, hashes in self.held.items()}
        return {RANK: resumable(rule_named(self.layout.rule), self.layout, held, prompt_len)}


class Reader:
    """A router's side: bytes in, predictions out, by all groups and (as other routers do) the global one."""

    def __init__(self, index: Index) -> None:
        self.layout: CacheLayout | None = None
        self.tiers: set[str] = set()
        self._index = index
        self._global: set[int] = set()
        self._global_index: Index = SetIndex()

    def read(self, payload: bytes) -> None:
        for event in decode(payload).events:
            assert not isinstance(event, Unknown)
            if isinstance(event, Layout):
                self._join(CacheLayout(event.groups, event.rule, event.model, event.hash_scheme))
                continue
            if isinstance(event, Stored | Moved):
                self.tiers.add(event.tier)
            self._index.apply(RANK, event)
            if event.group_id in self._global:
                self._global_index.apply(RANK, event)

    def _join(self, layout: CacheLayout) -> None:
        self.layout = layout
        self._index.join(RANK, layout)
        groups = tuple(group for group in layout.groups if group.window_size is None)
        self._global = {group.group_id for group in groups}
        self._global_index.join(RANK, CacheLayout(groups, layout.rule, layout.model))

    def predict(self, record: dict[str, Any]) -> Prediction:
        assert self.layout is not None
        token_ids = record["token_ids"]
        hashes = sequence_hashes(block_hashes(token_ids, self.layout.block_size))
        by_all, by_global = (
            index.score(hashes, len(token_ids)).get(RANK, 0) for index in (self._index, self._global_index)
        )
        return Prediction(record["cached_tokens"], by_all, by_global)


class Worker:
    """The worker's side of the stream, without a broker: raw engine events in, bytes out."""

    def __init__(self, declared: CacheLayout) -> None:
        self._adapter = TrtllmEventAdapter(declared)
        self._residency = Residency(declared)
        self._next_id = 0
        self._epoch = 1

    def batches(self, raw: dict[str, Any]) -> Iterator[bytes]:
        for told in self._adapter.feed(raw):
            try:
                yield self._encoded(self._residency.apply(told))
            except Restart:
                self._epoch, self._next_id = self._epoch + 1, 0
                yield self.begin()

    def begin(self) -> bytes:
        return self._encoded([layout_event(self._residency.layout)])

    def _encoded(self, events: list[Event]) -> bytes:
        batch = Batch(VERSION, self._epoch, self._next_id, 0, tuple(events))
        self._next_id = batch.next_event_id
        return encode(batch)


def replay(
    trace: str, declared_windows: tuple[int | None, ...] = (512, None), index: Index | None = None
) -> tuple[list[Prediction], Reader]:
    """Each request is predicted from the events before it."""
    with gzip.open(DATA / f"trtllm-v2-{trace}.jsonl.gz", "rt") as lines:
        header, *records = map(json.loads, lines)
    size = header["tokens_per_block"]
    groups = tuple(CacheGroup(i, window, size) for i, window in enumerate(declared_windows))
    worker, reader = Worker(CacheLayout(groups, RULE, header["config"])), Reader(index or SetIndex())
    reader.read(worker.begin())
    predictions: list[Prediction] = []
    for record in records:
        if record["type"] == "event":
            for payload in worker.batches(record["event"]):
                reader.read(payload)
        else:
            predictions.append(reader.predict(record))
    return predictions, reader


@pytest.mark.parametrize(
    "make", [SetIndex, WindowIndex, partial(WindowIndex, kernel=False)], ids=["sets", "index", "pure index"]
)
@pytest.mark.parametrize(
    ("trace", "requests", "tiers"),
    [
        ("gemma3-1b", 150, {"device"}),
        ("host-tier", 100, {"device", "host"}),
    ],
)
def test_every_request_of_a_recorded_engine_is_predicted_in_whole_blocks(
    make: Callable[[], Index], trace: str, requests: int, tiers: set[str]
) -> None:
    predictions, reader = replay(trace, index=make())

    assert requests == len(predictions)
    assert [each.actual // 32 for each in predictions] == [each.predicted // 32 for each in predictions]
    assert tiers == reader.tiers


def test_the_groups_are_those_that_the_engine_created_whatever_was_declared() -> None:
    told, reader = replay("gemma3-1b-head", (1024, None))
    assert reader.layout is not None

    assert ((512, None), 26) == (tuple(group.window_size for group in reader.layout.groups), len(told))
    assert [each.actual // 32 for each in told] == [each.predicted // 32 for each in told]


@pytest.mark.parametrize(
    ("trace", "exact_tokens", "exact_global_only"),
    [
        ("gemma3-1b", 80, 98),
        ("host-tier", 48, 82),
    ],
)
def test_looking_at_global_blocks_alone_promises_what_the_engine_recomputes(
    trace: str, exact_tokens: int, exact_global_only: int
) -> None:
    predictions, _ = replay(trace)
    wrong = [each for each in predictions if each.global_only // 32 != each.actual // 32]

    assert exact_tokens == sum(each.predicted == each.actual for each in predictions)
    assert exact_global_only == len(predictions) - len(wrong)
    assert all(each.global_only > each.actual for each in wrong), "an upper bound"
    assert all(each.predicted <= each.actual for each in predictions), "never more than the engine reuses"
