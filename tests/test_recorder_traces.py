"""Results that come later: what replay makes of them, of lag and of holes; the trace of a real worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.engine import Gemma3CpuEngine
from vswa_plugins.recorder.recorder import Recorder, begin

from tests.accuracy_helpers import HEADER, replayed
from tests.gemma3_engine_helpers import OPTIONS, prompt_of, request_for, settings_for, small
from tests.vllm_events_helpers import SIZE, removed, stored, tokens_of
from vswa_plugin.accuracy.exceptions import LAG
from vswa_plugin.accuracy.trace import TraceHole, TraceRequest, TraceResult, TraceWriter
from vswa_plugin.errors import ConfigError
from vswa_plugin.hookspecs import WorkerContext
from vswa_plugin.records import RequestRecord
from vswa_plugin.reuse import RULES
from vswa_plugin.worker.handler import RequestHandler

__all__ = ["small"]


def asked(path: str, number: int) -> TraceRequest:
    """A prompt of the blocks of ``path`` and one token more."""
    return TraceRequest((*tokens_of(path), 1), id=number)


def both(path: str, first: int = 0) -> list[Any]:
    return [stored(path, first, group) for group in (0, 1)]


def write(path: Path, *records: Any) -> Path:
    with TraceWriter(path, HEADER) as writer:
        for record in records:
            match record:
                case TraceRequest():
                    writer.request(record)
                case TraceResult():
                    writer.result(record)
                case TraceHole():
                    writer.hole(record)
                case _:
                    writer.event(record)
    return path


def test_a_result_belongs_to_its_request_and_to_the_moment_of_its_arrival(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        *both("abc"),
        asked("abc", 1),
        asked("ab", 2),
        removed("abc"),
        removed("abc", group=1),
        TraceResult(2, 2 * SIZE),
        TraceResult(1, 3 * SIZE, 5),
    )
    report = replayed(path)

    assert [5, 4] == [each.line for each in report.outcomes]
    assert (1.0, 2, 0, 0) == (report.exact_share, report.requests, report.lagged, report.unfinished)


@pytest.mark.parametrize(
    ("seen", "actual", "lagged"),
    [(2, 2, True), (3, 1, True), (4, 1, True), (2, 1, False), (None, 1, True)],
)
def test_what_changed_before_the_first_token_is_lag_and_no_mistake(
    tmp_path: Path, seen: int | None, actual: int, lagged: bool
) -> None:
    result = TraceResult(1, actual * SIZE, seen=seen)
    path = write(tmp_path / "t.jsonl", asked("ab", 1), *both("ab"), removed("ab"), *both("cd")[:1], result)
    report = replayed(path)
    (outcome,) = report.outcomes

    assert (0.0, int(lagged)) == (report.exact_share, report.lagged)
    assert (LAG if lagged else None) == outcome.exception
    assert (not lagged) == bool(report.mistakes)
    assert any("the cache changed between" in each for each in report.reasons()) == lagged


def test_requests_without_a_result_count_nowhere_and_are_told(tmp_path: Path) -> None:
    report = replayed(write(tmp_path / "t.jsonl", asked("a", 1), asked("b", 2), TraceResult(2, 0)))

    assert (1, 1) == (report.requests, report.unfinished)
    assert "1 requests have no result and are left out" in report.reasons()


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([asked("a", 1), asked("b", 1)], "line 3: expected a request with an id of its own, got 1 again"),
        ([TraceResult(4, 0)], "line 2: expected the result of a request before it, got id 4"),
        ([asked("a", 1), TraceResult(1, 900)], "line 3: expected cached_tokens of at most"),
    ],
)
def test_results_that_fit_no_request_are_refused(tmp_path: Path, records: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replayed(write(tmp_path / "t.jsonl", *records))


def test_after_a_hole_nothing_is_promised_until_blocks_are_stored_again(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        *both("ab"),
        TraceHole(2, 0),
        asked("ab", 1),
        TraceResult(1, SIZE),
        *both("ab"),
        asked("ab", 2),
        TraceResult(2, 2 * SIZE),
    )
    report = replayed(path)

    assert [0, 2 * SIZE] == [each.predicted["exact"] for each in report.outcomes]
    assert 1 == report.restarts


def test_copies_from_before_a_hole_are_not_counted_on(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        *both("ab"),
        TraceHole(4, 0),  # among them: all of it was removed
        *both("ab"),
        *(removed("a", "ab", group=group) for group in (0, 1)),
        asked("ab", 1),
        TraceResult(1, 0),
    )

    assert 1.0 == replayed(path).exact_share


def test_requests_alone_are_no_hole(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *both("ab"), TraceHole(0, 3), asked("ab", 1), TraceResult(1, 2 * SIZE))

    assert (1.0, 0) == (replayed(path).exact_share, replayed(path).restarts)


# -- a worker ----------------------------------------------------------------------------------------

FEW_BLOCKS = {**OPTIONS, "gemma3_cpu": {**OPTIONS["gemma3_cpu"], "kv_blocks": {"32": 24, "global": 60}}}


class Worker:
    """As much of one as the recorder sees: the hooks around a real engine."""

    def __init__(self, model: Path, traces: Path) -> None:
        settings = settings_for(model, FEW_BLOCKS)
        self.engine = Gemma3CpuEngine(settings)
        context = WorkerContext(None, 1, settings, self.engine.info, RULES, self.engine.event_format)
        self.recorder: Recorder = begin(context, str(traces), "hidden")
        self.handler = RequestHandler(self.engine, "small", 1, self._finished, arrived=self.recorder.arrived)
        self.engine.start(self.recorder.events)

    def _finished(self, record: RequestRecord) -> None:
        self.recorder.finished(record)

    async def serve(self, number: int, prompt: list[int]) -> None:
        never: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        request = request_for(prompt, 4)
        async for _ in self.handler.handle(request, f"r{number}", never):
            pass

    def stop(self) -> None:
        self.engine.stop()
        self.recorder.close()


def prompts(count: int) -> list[list[int]]:
    """Few beginnings, many ends: blocks come back after windows have lost them."""
    starts = [prompt_of(120, seed) for seed in range(5)]
    return [starts[n * n % 5][: 40 + 13 * n % 80] + prompt_of(30, 100 + n) for n in range(count)]


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_real_engine_behind_a_worker_is_predicted_but_for_lag(
    small: Path, tmp_path: Path, at_once: int
) -> None:
    worker = Worker(small, tmp_path / "traces")

    async def body() -> None:
        asked = prompts(40)
        for at in range(0, len(asked), at_once):
            group = enumerate(asked[at : at + at_once], at)
            await asyncio.gather(*(worker.serve(number, prompt) for number, prompt in group))

    try:
        asyncio.run(body())
    finally:
        worker.stop()
    (path,) = (tmp_path / "traces").iterdir()
    report = replayed(path)

    assert (40, 0) == (report.requests, report.unfinished)
    assert [] == report.mistakes
    assert report.cached_tokens > 0
    assert (at_once > 1) == (report.lagged > 0)
    assert report.score("global only").over > 0
