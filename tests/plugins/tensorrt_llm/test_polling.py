"""How a TensorRT-LLM worker fetches its engine's events and sees that the engine lives; over stand-ins."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm import health, polling
from vswa_plugins.tensorrt_llm.health import HealthWatch, problem
from vswa_plugins.tensorrt_llm.polling import EventPoller

from tests import tensorrt_llm_package
from tests.tensorrt_llm_executors import QueueExecutor, QueueLLM
from tests.tensorrt_llm_helpers import Installer, Started, asked
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin


@pytest.fixture
def started(standin: None, model: Path) -> Iterator[Started]:
    made = Started(model)
    yield made
    made.engine.stop()


def poller_of(started: Started) -> EventPoller:
    assert started.engine._running is not None
    return started.engine._running.poller


# -- fetching --------------------------------------------------------------------------------------


def test_events_that_cannot_be_fetched_for_long_are_the_end_of_the_engine(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "MAX_FAILURES", 2)
    started.llm.event_error = OSError("gone")
    poller = poller_of(started)
    poller._poll()
    poller._poll()

    assert "KV events cannot be fetched: OSError: gone" == started.engine.failure()


def test_a_queue_that_cannot_be_made_here_is_waited_for(started: Started) -> None:
    started.llm.event_error = AssertionError("KV Event IterationResult is not properly instantiated.")

    assert not any(poller_of(started)._poll() for _ in range(polling.MAX_FAILURES + 1))
    assert started.engine.failure() is None


def test_releases_that_fall_asleep_after_an_empty_answer_are_woken() -> None:
    class Results:
        undone = 0

        def mark_undone(self) -> None:
            self.undone += 1

    results = Results()
    llm = SimpleNamespace(
        _executor=SimpleNamespace(_iter_kv_events_result=results), get_kv_cache_events=lambda timeout: []
    )
    polling.EventPoller(llm, lambda rank, events: None, 1, dict, print)._poll()

    assert 1 == results.undone


def test_events_of_a_rank_that_was_not_declared_are_dropped_and_said(
    started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    started.settled()
    before = {rank: len(events) for rank, events in started.events.items()}
    llm = SimpleNamespace(get_kv_cache_events=lambda timeout: [{"event_id": 0, "attention_dp_rank": 3}])
    poller = polling.EventPoller(llm, started._take, 1, dict, print)
    poller._poll()
    poller._poll()

    assert before == {rank: len(events) for rank, events in started.events.items()}
    assert ["rank 3"] == ["rank 3" for record in caplog.records if "rank 3" in record.getMessage()]


@pytest.fixture
def with_queue(install_standin: Installer, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """An engine of the 1.2 line."""
    install_standin("1.2.1")
    monkeypatch.setattr(QueueLLM, "kind", "v1_contiguous")
    monkeypatch.setattr(tensorrt_llm_package.LLM, "kind", "v1_contiguous")
    monkeypatch.setattr(tensorrt_llm_package, "LLM", QueueLLM)
    made = Started(model)
    yield made
    made.engine.stop()


def test_releases_with_a_queue_give_all_events_from_the_first_request_on(with_queue: Started) -> None:
    """The queue is made before a request makes one that only a coroutine can read."""
    for first in (0, 100, 0):
        with_queue.ask(asked(list(range(first, first + 24)), 3))
    (events,) = with_queue.settled().values()

    assert list(range(len(events))) == [event["event_id"] for event in events]
    assert {"created", "stored"} <= {event["data"]["type"] for event in events}
    assert with_queue.engine.failure() is None


def test_a_queue_that_only_a_coroutine_can_read_is_the_end_of_the_engine(
    with_queue: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "MAX_FAILURES", 2)
    llm: Any = with_queue.llm
    llm._executor = QueueExecutor()
    with_queue.ask(asked([1, 2, 3]))
    poller_of(with_queue)._poll()
    poller_of(with_queue)._poll()

    assert "KV events cannot be fetched: TypeError" in str(with_queue.engine.failure())


# -- health ----------------------------------------------------------------------------------------


class Watched:
    """A watch over ``llm``; what it told."""

    def __init__(self, llm: Any, also: Callable[[], str | None] = lambda: None) -> None:
        self._told = threading.Event()
        self.reasons: list[str] = []
        self.watch = HealthWatch(llm, also, self._fail)
        self.watch.start()

    def _fail(self, reason: str) -> None:
        self.reasons.append(reason)
        self._told.set()

    def told(self) -> list[str]:
        assert self._told.wait(10)
        self.watch.stop()
        return self.reasons


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "INTERVAL_S", 0.001)


def executor(**more: Any) -> SimpleNamespace:
    parts = {"is_shutdown": lambda: False, "mpi_futures": [ended(False)], "_error_queue": queue.Queue()}
    return SimpleNamespace(_executor=SimpleNamespace(**(parts | more)))


def ended(done: bool) -> SimpleNamespace:
    return SimpleNamespace(done=lambda: done)


def filled() -> queue.Queue[object]:
    errors: queue.Queue[object] = queue.Queue()
    errors.put(OSError())
    return errors


@pytest.mark.parametrize(
    ("llm", "wrong"),
    [
        (SimpleNamespace(_check_health=lambda: True), None),
        (SimpleNamespace(_check_health=lambda: False), "not healthy"),
        (executor(check_health=lambda: False), "not healthy"),
        (executor(check_health=lambda: True, is_shutdown=lambda: True), None),
        (executor(), None),
        (SimpleNamespace(_executor=SimpleNamespace(is_shutdown=lambda: False)), None),
        (SimpleNamespace(), None),
        (executor(is_shutdown=lambda: True), "shut itself down"),
        (executor(mpi_futures=[ended(False), ended(True)]), "a process of .* has ended"),
        (executor(_error_queue=filled()), "an error in the background"),
    ],
)
def test_an_engine_is_asked_or_else_looked_at(llm: Any, wrong: str | None) -> None:
    told = problem(llm)

    assert (wrong is None) == (told is None)
    assert re.search(wrong or "", told or "")


def test_an_executor_that_is_not_healthy_is_told_once() -> None:
    assert ["TensorRT-LLM says that its executor is not healthy"] == Watched(
        SimpleNamespace(_check_health=lambda: False)
    ).told()


def test_the_watch_ends_with_what_it_has_told() -> None:
    watched = Watched(SimpleNamespace(_check_health=lambda: False))
    watched.watch._thread.join(10)

    assert not watched.watch._thread.is_alive()
    assert 1 == len(watched.reasons)


def test_nobody_looks_while_the_engine_is_ended(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    assert started.engine._running is not None
    watch = started.engine._running.health
    looking: list[bool] = []
    monkeypatch.setattr(started.llm, "shutdown", lambda: looking.append(watch._thread.is_alive()))
    started.engine.stop()

    assert [False] == looking
    assert started.engine.failure() is None


def test_an_answer_is_overdue_only_while_it_is_waited_for(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "MAX_WAIT_S", 0.0)
    within: list[str | None] = []
    llm = SimpleNamespace(get_kv_cache_events=lambda timeout: within.append(poller.overdue()) or [])
    poller = EventPoller(llm, lambda rank, events: None, 1, dict, print)
    before = poller.overdue()
    poller._poll()

    assert ["TensorRT-LLM has not answered for 0 s when asked for KV events"] == within
    assert (None, None) == (before, poller.overdue())


def test_health_that_cannot_be_asked_for_counts_as_none() -> None:
    def gone() -> bool:
        raise ConnectionError("no such process")

    assert ["TensorRT-LLM's health cannot be checked: ConnectionError: no such process"] == Watched(
        SimpleNamespace(_check_health=gone)
    ).told()


def test_an_engine_that_answers_nothing_any_more_is_found_out_and_left_behind(
    started: Started, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(polling, "MAX_WAIT_S", 0.01)
    monkeypatch.setattr(polling, "JOIN_S", 0.01)
    forever = threading.Event()
    monkeypatch.setattr(started.llm, "get_kv_cache_events", lambda timeout: forever.wait() and [])
    watched = Watched(started.llm, poller_of(started).overdue)

    assert ["TensorRT-LLM has not answered for 0 s when asked for KV events"] == watched.told()
    started.engine.stop()
    assert started.llm.closed, "its processes are ended all the same"
    assert "the last KV events have not come within 0 s" in caplog.text
    forever.set()
