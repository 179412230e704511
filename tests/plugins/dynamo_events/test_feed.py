"""From the stream's batches to what Dynamo's publisher is given, also where it refuses."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from vswa_plugins.dynamo_events import feed as feed_module
from vswa_plugins.dynamo_events.feed import Feed, RankFeed
from vswa_plugins.dynamo_events.projection import Projection

from tests.dynamo_events_helpers import SIZE, Held, announced, layout_of, name, tokens_of
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.engine.contract import BlocksStored
from vswa_plugin.errors import ConfigError
from vswa_plugin.wire.events import VERSION, Batch, Source, Stored, layout_event

SOURCE = Source("dynamo", "backend", 7, 0)
LAYOUT = layout_of(2, None)


class Publisher:
    """As Dynamo's: takes a list whole or not at all, and counts how often each block was stored."""

    def __init__(self) -> None:
        self.told: list[list[dict[str, Any]]] = []
        self.stored: Counter[int] = Counter()
        self.refuses: Callable[[dict[str, Any]], bool] = lambda event: False
        self.error: Exception = ValueError("invalid KV event batch")

    def publish_batch(self, events: Sequence[dict[str, Any]]) -> None:
        if any(map(self.refuses, events)):
            raise self.error
        self.told.append(list(events))
        for event in events:
            step = 1 if event["type"] == "stored" else -1
            for block in event["block_hashes"]:
                self.stored[block] += step
                assert self.stored[block] in (0, 1), "each block once"


class Worker:
    """One rank's feed, given what a publisher of ours would show."""

    def __init__(self, layout: CacheLayout = LAYOUT, spare: int = 1024) -> None:
        self.publisher = Publisher()
        self.rank = RankFeed(Projection("boundary", layout, spare=spare), self.publisher)
        self.feed = Feed({0: self.rank})
        self.held = Held(layout)

    def store(self, path: str, *groups: int, first: int = 0) -> None:
        self.show([event for group in groups or (0, 1) for event in self.held.store(group, path, first)])

    def remove(self, *paths: str, group: int) -> None:
        self.show(self.held.remove(group, *paths))

    def show(self, shown: list[Any]) -> None:
        for event in shown:
            if isinstance(event, tuple):
                self.feed.stored(SOURCE, *event)
        batch = tuple(event for event in shown if not isinstance(event, tuple))
        self.feed.batch(SOURCE, Batch(VERSION, 1, 0, 0, batch))

    def published(self) -> set[int]:
        return {block for block, count in self.publisher.stored.items() if count}


def signed(path: str) -> int:
    number = name(path)
    return number - (1 << 64) if number >= 1 << 63 else number


def test_a_batch_becomes_one_list_for_dynamo_with_signed_hashes_and_the_tokens() -> None:
    worker = Worker()
    worker.store("abc")
    worker.show(worker.held.store(0, "abcd") + worker.held.store(1, "abcd") + worker.held.remove(0, "ab"))
    worker.remove("abcd", "abc", group=1)

    stored = {
        "type": "stored",
        "token_ids": tokens_of("abc"),
        "num_block_tokens": [SIZE] * 3,
        "block_hashes": [signed("a"), signed("ab"), signed("abc")],
        "parent_hash": None,
    }
    more = {
        "type": "stored",
        "token_ids": tokens_of("d"),
        "num_block_tokens": [SIZE],
        "block_hashes": [signed("abcd")],
        "parent_hash": signed("abc"),
    }
    gone = [signed("abcd"), signed("abc"), signed("ab")]
    assert [[stored], [more], [{"type": "removed", "block_hashes": gone}]] == worker.publisher.told
    assert any(block < 0 for block in gone) and any(block > 0 for block in gone)


def test_a_batch_that_changes_nothing_is_not_published() -> None:
    worker = Worker()
    worker.store("abc", 1)
    worker.show([])

    assert ([], 0) == (worker.publisher.told, worker.rank.batches)


def test_salt_and_lora_go_with_the_blocks() -> None:
    worker = Worker(layout_of(None))
    stored, nodes = announced("ab")
    salted = BlocksStored(0, None, stored.blocks, cache_salt="salt", lora_name="lora")
    worker.feed.stored(SOURCE, salted, nodes)
    hashes = tuple(node.sequence_hash for node in nodes)
    worker.feed.batch(SOURCE, Batch(VERSION, 1, 0, 0, (Stored(0, 0, None, hashes),)))

    [[event]] = worker.publisher.told
    assert ("salt", "lora") == (event["cache_salt"], event["lora_name"])


def test_long_runs_are_cut_into_events_that_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MAX_BLOCKS", 2)
    worker = Worker()
    worker.store("abcde")
    worker.remove("a", group=1)

    [stored, removed] = worker.publisher.told
    assert [(None, 2), (signed("ab"), 2), (signed("abcd"), 1)] == [
        (event["parent_hash"], len(event["block_hashes"])) for event in stored
    ]
    assert [2, 2, 1] == [len(event["block_hashes"]) for event in removed]
    assert set() == worker.published()


# -- refused ---------------------------------------------------------------------------------------


def test_a_run_that_dynamo_refuses_is_left_out_with_its_subtree_and_the_rest_goes_on() -> None:
    worker = Worker()
    worker.publisher.refuses = lambda event: signed("xy") in event["block_hashes"]
    shown = [event for path in ("abc", "xyz", "def") for g in (0, 1) for event in worker.held.store(g, path)]
    worker.show(shown)
    worker.store("xyzw")

    published = {signed(path) for path in ("a", "ab", "abc", "d", "de", "def")}
    assert published == worker.published()
    assert (6, 2) == (worker.rank.projection.published, worker.rank.refused)
    worker.rank.projection.check()


def test_what_hangs_below_a_refused_run_is_not_offered_on_its_own() -> None:
    worker = Worker()
    worker.publisher.refuses = lambda event: signed("ab") in event["block_hashes"]
    paths = ("abc", "aby", "abz")
    worker.show([event for path in paths for group in (0, 1) for event in worker.held.store(group, path)])

    assert set() == worker.published()
    assert [] == worker.publisher.told


def test_what_was_refused_is_offered_again_when_the_engine_announces_it_again() -> None:
    worker = Worker()
    worker.publisher.refuses = lambda event: True
    worker.store("abc")
    worker.publisher.refuses = lambda event: False
    worker.store("d")
    assert {signed("d")} == worker.published()

    worker.feed.stored(SOURCE, *announced("abc"))
    worker.show([])
    assert {signed(path) for path in ("a", "ab", "abc", "d")} == worker.published()


def test_a_publisher_that_takes_nothing_for_a_while_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()
    worker.store("abc")
    worker.publisher.refuses, worker.publisher.error = lambda event: True, Exception("channel closed")
    with caplog.at_level(logging.ERROR):
        worker.remove("abc", group=1)
        worker.store("abx")
    assert [True] == ["channel closed" in record.getMessage() for record in caplog.records]
    assert {signed(path) for path in ("a", "ab", "abc")} == worker.published()

    worker.publisher.refuses = lambda event: False
    worker.show([])
    assert {signed(path) for path in ("a", "ab", "abx")} == worker.published()
    assert (2, 2) == (worker.rank.batches, worker.rank.refused)


def test_what_dynamo_still_has_to_be_told_of_is_not_forgotten() -> None:
    worker = Worker(spare=-1_000)
    worker.store("abc")
    worker.publisher.refuses, worker.publisher.error = lambda event: True, Exception("channel closed")
    for group in (0, 1):
        worker.remove("abc", "ab", "a", group=group)
    worker.show([])
    worker.publisher.refuses = lambda event: False
    worker.store("ab")

    assert {signed("a"), signed("ab")} == worker.published()


def test_removals_are_told_although_a_run_of_the_same_batch_is_refused() -> None:
    worker = Worker()
    worker.store("abc")
    worker.publisher.refuses = lambda event: event["type"] == "stored"
    worker.show([*worker.held.remove(1, "ab"), *worker.held.store(0, "xy"), *worker.held.store(1, "xy")])

    assert {signed("a")} == worker.published()


def test_a_new_layout_that_cannot_be_projected_removes_what_was_published() -> None:
    worker = Worker()
    worker.store("abc")
    with pytest.raises(ConfigError, match="unknown reuse rule"):
        worker.show([layout_event(layout_of(2, None, rule="no such rule"))])

    assert (set(), 0) == (worker.published(), worker.rank.projection.published)


# -- metrics ---------------------------------------------------------------------------------------


def test_the_gauges_follow() -> None:
    worker = Worker()
    worker.store("abc")
    worker.store("xyz", 1)

    lines = worker.feed.text().splitlines()
    assert 'vswa_dynamo_events_nodes{dp_rank="0"} 6.0' in lines
    assert 'vswa_dynamo_events_published_blocks{dp_rank="0"} 3.0' in lines
    assert 'vswa_dynamo_events_batches_total{dp_rank="0"} 1.0' in lines
    assert 'vswa_dynamo_events_refused_batches_total{dp_rank="0"} 0.0' in lines


def test_ranks_are_kept_apart() -> None:
    publishers = [Publisher(), Publisher()]
    feed = Feed({n: RankFeed(Projection("boundary", LAYOUT), each) for n, each in enumerate(publishers)})
    held = Held(LAYOUT)
    shown = held.store(0, "ab") + held.store(1, "ab")
    source = Source("dynamo", "backend", 7, 1)
    for event in shown:
        if isinstance(event, tuple):
            feed.stored(source, *event)
    feed.batch(source, Batch(VERSION, 1, 0, 0, tuple(e for e in shown if not isinstance(e, tuple))))

    assert [0, 1] == [len(each.told) for each in publishers]
