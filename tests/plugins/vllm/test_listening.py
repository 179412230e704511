"""Events by ZeroMQ, from a publisher as vLLM's: late, lost, repaired, in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.vllm import listening
from vswa_plugins.vllm.adapter import lost
from vswa_plugins.vllm.listening import EventListener
from vswa_plugins.vllm.sockets import Sockets, private_sockets

from tests.vllm_helpers import WAIT_S
from tests.vllm_publisher import KVEventsConfig, Publisher


class Heard:
    """What a listener has handed on."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Any]] = []
        self.failures: list[str] = []
        self._changed = threading.Condition()

    def take(self, rank: int, events: Sequence[Any]) -> None:
        with self._changed:
            self.events += [(rank, event) for event in events]
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        with self._changed:
            self.failures.append(reason)
            self._changed.notify_all()

    def wait(self, true: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(true, WAIT_S), (self.events, self.failures)

    def wait_for(self, *events: Any, rank: int = 0) -> None:
        """Just these events of one rank, and no others of it before or between them."""
        self.wait(lambda: len(self.of(rank)) >= len(events))
        assert list(events) == self.of(rank)

    def of(self, rank: int) -> list[Any]:
        return [event for each, event in self.events if each == rank]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "QUIET_S", 0.05)
    monkeypatch.setattr(listening, "ANSWER_S", 2.0)


@pytest.fixture
def sockets(tmp_path: Path) -> Sockets:
    made = private_sockets(str(tmp_path)[-60:] if len(str(tmp_path)) > 80 else str(tmp_path))
    assert made is not None
    return made


@contextmanager
def publisher(sockets: Sockets, rank: int = 0, kept: int = 100) -> Iterator[Publisher]:
    config = KVEventsConfig(True, "zmq", sockets.endpoint, sockets.replay_endpoint, kept, topic="kv")
    made = Publisher(config, rank)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def listener(
    sockets: Sockets, heard: Heard, ranks: int = 1, check: Callable[[object], str | None] = lambda _: None
) -> Iterator[EventListener]:
    made = EventListener([sockets.of_rank(rank) for rank in range(ranks)], heard.take, check, heard.fail)
    made.start()
    try:
        yield made
    finally:
        made.stop(look=True)


def test_what_was_published_before_anybody_listened_is_asked_for(sockets: Sockets) -> None:
    heard = Heard()
    with publisher(sockets) as engine:
        engine.publish(["a"])
        engine.publish(["b", "c"])
        with listener(sockets, heard) as made:
            made.published()
            heard.wait_for("a", "b", "c")

    assert (3, 2, 2, 0) == (made.events, made.batches, made.repaired_batches, made.lost_batches)


def test_nothing_is_asked_before_the_engine_publishes(sockets: Sockets) -> None:
    heard = Heard()
    with listener(sockets, heard) as made, publisher(sockets) as engine:
        engine.dropped = 1
        engine.publish(["a"])
        made.published()
        heard.wait_for("a")

    assert 1 == made.repaired_batches


def test_a_batch_that_was_dropped_is_asked_for_when_the_next_one_comes(sockets: Sockets) -> None:
    heard = Heard()
    with publisher(sockets) as engine, listener(sockets, heard) as made:
        made.published()
        engine.publish(["a"])
        heard.wait_for("a")
        engine.dropped = 2
        for event in "bcd":
            engine.publish([event])
        heard.wait_for(*"abcd")


def test_the_last_batch_is_asked_for_without_a_next_one(sockets: Sockets) -> None:
    heard = Heard()
    with publisher(sockets) as engine, listener(sockets, heard) as made:
        made.published()
        # The second one may come by subscription, so that the rank has become quiet before.
        for event in "ab":
            engine.publish([event])
            heard.wait(lambda event=event: event in heard.of(0))  # type: ignore[misc]
        engine.publish(["c"])
        heard.wait_for(*"abc")
        engine.dropped = 1
        engine.publish(["d"])
    heard.wait_for(*"abcd")


def test_what_the_engine_does_not_have_any_more_is_reported_at_its_place(sockets: Sockets) -> None:
    heard = Heard()
    with publisher(sockets, kept=2) as engine, listener(sockets, heard) as made:
        made.published()
        engine.publish(["a"])
        heard.wait_for("a")
        engine.dropped = 4
        for event in "bcdef":
            engine.publish([event])
        heard.wait_for("a", lost(1, 4), "e", "f")

    assert 3 == made.lost_batches


def test_an_engine_that_does_not_answer_has_lost_what_is_missing(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "ANSWER_S", 0.05)
    heard = Heard()
    with publisher(sockets) as engine, listener(sockets, heard) as made:
        made.published()
        engine.publish(["a"])
        heard.wait_for("a")
        engine.answers = False
        engine.dropped = 1
        engine.publish(["b"])
        engine.publish(["c"])
        heard.wait_for("a", lost(1, 2), "c")


def test_a_batch_that_cannot_be_read_is_lost(sockets: Sockets) -> None:
    heard = Heard()
    with publisher(sockets) as engine, listener(sockets, heard) as made:
        made.published()
        engine.publish(["a"])
        engine.publish([], payload=b"\xc1")
        engine.publish(["b"])
        heard.wait_for("a", lost(1, 2), "b")

    assert [] == heard.failures


def test_each_rank_has_sockets_of_its_own(sockets: Sockets) -> None:
    heard = Heard()
    with publisher(sockets) as first, publisher(sockets, 1) as second, listener(sockets, heard, 2) as made:
        made.published()
        first.publish(["a"])
        second.publish(["b"])
        second.publish(["c"])
        heard.wait_for("a", rank=0)
        heard.wait_for("b", "c", rank=1)


def test_what_has_not_come_when_it_stops_is_asked_for(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "QUIET_S", 3_600.0)
    heard = Heard()
    with publisher(sockets) as engine:
        # The only look before the end must meet it: the subscription may be later than that.
        engine.publish(["a"])
        with listener(sockets, heard) as made:
            made.published()
            heard.wait_for("a")
            engine.dropped = 1
            engine.publish(["b"])
        heard.wait_for("a", "b")


def test_a_contradiction_fails_the_engine_and_the_events_are_handed_on(sockets: Sockets) -> None:
    heard = Heard()
    with (
        publisher(sockets) as engine,
        listener(sockets, heard, check=lambda event: "wrong" if event == "b" else None) as made,
    ):
        made.published()
        engine.publish(["a", "b"])
        heard.wait_for("a", "b")

    assert ["wrong"] == heard.failures


def test_a_sink_that_raises_ends_the_engine_with_the_reason(sockets: Sockets) -> None:
    heard = Heard()

    def broken(rank: int, events: Sequence[Any]) -> None:
        raise KeyError("x")

    with publisher(sockets) as engine:
        made = EventListener([sockets.of_rank(0)], broken, lambda _: None, heard.fail)
        made.start()
        made.published()
        engine.publish(["a"])
        heard.wait(lambda: bool(heard.failures))
        made.stop(look=False)

    assert ["the thread that receives KV events has ended: KeyError: 'x'"] == heard.failures
