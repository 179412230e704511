"""Results that come later: what replay makes of them, of lag and of holes; the trace of a real worker."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine
from vswa_plugins.recorder.recorder import Recorder, begin

from tests.accuracy_helpers import DATA, HEADER, replayed
from tests.gemma3_engine_helpers import OPTIONS, prompt_of, request_for, settings_for, small
from tests.vllm_events_helpers import SIZE, layout_of, removed, sequence_hash, stored, tokens_of
from vswa_plugin.accuracy.exceptions import LAG, PARTIAL_MATCH
from vswa_plugin.accuracy.report import Report
from vswa_plugin.accuracy.scorers import Exact
from vswa_plugin.accuracy.trace import (
    TraceEvent,
    TraceHole,
    TraceRequest,
    TraceResult,
    TraceWriter,
    open_trace,
)
from vswa_plugin.accuracy.waiting import Waiting
from vswa_plugin.blocks.reuse import RULES
from vswa_plugin.engine.contract import RawEvent
from vswa_plugin.engine.predicted import Prompt
from vswa_plugin.engine.records import RequestRecord
from vswa_plugin.errors import ConfigError
from vswa_plugin.hookspecs import WorkerContext
from vswa_plugin.wire.events import Stored, layout_event
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


# -- events that come late -----------------------------------------------------------------------------


def with_late_events(trace: str, path: Path, every: int) -> Path:
    """A recorded engine, served one request at a time, as if its events were fetched after so many."""
    held: list[Any] = []
    events = 0
    recorded = open_trace(DATA / f"{trace}.jsonl.gz")
    with TraceWriter(path, recorded.header) as writer:
        asked = 0
        for _, record in recorded.records():
            if not isinstance(record, TraceRequest):
                assert isinstance(record, TraceEvent)
                held.append(record.event)
                continue
            if asked % every == 0:
                events += len(held)
                for event in held:
                    writer.event(event)
                held.clear()
            asked += 1
            writer.request(TraceRequest(record.token_ids, id=asked))
            writer.result(TraceResult(asked, record.cached_tokens or 0, seen=events))
        for event in held:
            writer.event(event)
    return path


@pytest.mark.parametrize("every", [1, 2, 4])
def test_late_events_of_a_recorded_engine_are_lag(tmp_path: Path, every: int) -> None:
    report = replayed(with_late_events("trtllm-v2-gemma3-1b", tmp_path / "t.jsonl", every))

    assert (150, []) == (report.requests, report.mistakes)
    assert (every > 1) == (report.lagged > 0)
    assert report.lagged == round(150 * (1 - report.exact_share))


def test_the_wrong_rule_shows_in_spite_of_late_events(tmp_path: Path) -> None:
    path = with_late_events("vllm-0.33-gptoss", tmp_path / "t.jsonl", 4)
    wrong, right = (replayed(path, rule=rule) for rule in ("trtllm_v1_contiguous", "vllm"))

    assert len(wrong.mistakes) > 60
    assert len(right.mistakes) < 4 < right.lagged


def test_what_came_after_a_later_request_is_no_lag(tmp_path: Path) -> None:
    """Request 1 found nothing; what request 3 stored after both had ended does not explain it."""
    head = [asked("ab", 1), TraceResult(1, SIZE, 0), both("x")[1], asked("cd", 3), TraceResult(3, 0, 1)]
    a, later = [stored("a", group=group) for group in (0, 1)], stored("cd", group=1)
    late = write(tmp_path / "late.jsonl", *head, *a, later)
    after = write(tmp_path / "after.jsonl", *head, later, *a, stored("ab", 1))

    assert [(1, []), (0, [2])] == [
        (report.lagged, [each.line for each in report.mistakes]) for report in map(replayed, (late, after))
    ]


def test_a_block_that_is_asked_for_again_may_be_from_before(tmp_path: Path) -> None:
    """Requests 1 and 3 found block a, of which the events come after both."""
    head = [asked("ab", 1), TraceResult(1, SIZE, 0), both("x")[1], asked("ab", 3), TraceResult(3, SIZE, 1)]
    report = replayed(write(tmp_path / "t.jsonl", *head, *(stored("a", group=group) for group in (0, 1))))

    assert (2, []) == (report.lagged, report.mistakes)


def test_nothing_behind_a_hole_explains_what_was_before_it(tmp_path: Path) -> None:
    head = [asked("ab", 1), TraceResult(1, SIZE, 0), TraceHole(1, 0)]
    report = replayed(write(tmp_path / "t.jsonl", *head, *(stored("a", group=group) for group in (0, 1))))

    assert (0, 1) == (report.lagged, len(report.mistakes))


def test_a_cache_that_was_given_up_before_the_match_is_lag() -> None:
    layout, rule = layout_of(8, None), RULES["vllm"]
    prompt = Prompt((*tokens_of("ab"), 1), [sequence_hash("a"), sequence_hash("ab")])
    exact = Exact()
    exact.begin(layout)
    for group in (0, 1):
        exact.apply(Stored(group, 0, None, tuple(prompt.sequence_hashes), "device"))
    waiting = Waiting(1, prompt, {}, exact.explain(prompt))
    assert waiting.explained(rule, layout, 0, 9, math.inf) is None

    exact.begin(layout)
    waiting.follow(3, [layout_event(layout)], exact)
    assert LAG == waiting.explained(rule, layout, 0, 9, math.inf)
    assert waiting.explained(rule, layout, 0, 2, 3) is None


def test_what_came_after_its_own_first_block_is_no_lag(tmp_path: Path) -> None:
    """Block b was computed, so a was held before b was stored, or never."""
    head = [asked("ab", 1), TraceResult(1, SIZE, 0)]
    a, ab = [stored("a", group=group) for group in (0, 1)], [stored("ab", 1, group) for group in (0, 1)]
    before = write(tmp_path / "before.jsonl", *head, *a, *ab)
    after = write(tmp_path / "after.jsonl", *head, *both("ab"), removed("ab"), removed("ab", group=1))

    assert [(1, 0), (0, 1)] == [
        (report.lagged, len(report.mistakes)) for report in map(replayed, (before, after))
    ]


def test_a_part_of_a_block_that_was_held_at_a_later_moment_is_excepted(tmp_path: Path) -> None:
    """At arrival nothing is held; then the window of 8 holds block 2 alone: enough for 15 tokens, not 12."""
    request = TraceRequest((*tokens_of("abc"), 1, 2, 3, 4, 5), id=1)
    path = write(tmp_path / "t.jsonl", request, stored("abc", group=1), stored("abc", 2), TraceResult(1, 15))
    report = replayed(path, rule="trtllm_v2")

    assert [PARTIAL_MATCH] == [each.exception for each in report.outcomes]
    assert (0, 1) == (report.lagged, report.exceptions[PARTIAL_MATCH])


# -- a worker ----------------------------------------------------------------------------------------

FEW_BLOCKS = {**OPTIONS, "gemma3_cpu": {**OPTIONS["gemma3_cpu"], "kv_blocks": {"32": 24, "global": 60}}}


class Worker:
    """As much of one as the recorder sees: the hooks around a real engine."""

    def __init__(self, model: Path, traces: Path, *, polled: bool = False) -> None:
        self.untold: list[tuple[int, Sequence[RawEvent]]] = []
        settings = settings_for(model, FEW_BLOCKS)
        self.engine = Gemma3CpuEngine(settings)
        context = WorkerContext(None, 1, settings, self.engine.info, RULES, self.engine.event_format)
        self.recorder: Recorder = begin(context, str(traces), "hidden")
        self.handler = RequestHandler(self.engine, "small", 1, self._finished, arrived=self.recorder.arrived)
        self.engine.start(self._keep if polled else self.recorder.events)

    def _keep(self, dp_rank: int, events: Sequence[RawEvent]) -> None:
        self.untold.append((dp_rank, list(events)))

    def poll(self) -> None:
        """What an engine that is asked for its events now and then tells."""
        untold, self.untold = self.untold, []
        for dp_rank, events in untold:
            self.recorder.events(dp_rank, events)

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


def recorded(model: Path, traces: Path, at_once: int, poll_every: int = 0) -> Report:
    """40 requests, so many at a time; events as they come, or fetched after so many groups."""
    worker = Worker(model, traces, polled=poll_every > 0)

    async def body() -> None:
        asked = prompts(40)
        for at in range(0, len(asked), at_once):
            group = enumerate(asked[at : at + at_once], at)
            await asyncio.gather(*(worker.serve(number, prompt) for number, prompt in group))
            if poll_every and at // at_once % poll_every == poll_every - 1:
                worker.poll()

    try:
        asyncio.run(body())
    finally:
        worker.stop()
    (path,) = traces.iterdir()
    return replayed(path)


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_real_engine_behind_a_worker_is_predicted_but_for_lag(
    small: Path, tmp_path: Path, at_once: int
) -> None:
    report = recorded(small, tmp_path / "traces", at_once)

    assert (40, 0) == (report.requests, report.unfinished)
    assert [] == report.mistakes
    assert report.cached_tokens > 0
    assert (at_once > 1) == (report.lagged > 0)
    assert report.score("global only").over > 0


@pytest.mark.parametrize(("at_once", "poll_every"), [(1, 1), (1, 2), (1, 5), (4, 2)])
def test_events_that_are_fetched_now_and_then_make_lag_and_no_mistakes(
    small: Path, tmp_path: Path, at_once: int, poll_every: int
) -> None:
    report = recorded(small, tmp_path / "traces", at_once, poll_every)

    assert (40, 0, []) == (report.requests, report.unfinished, report.mistakes)
    assert (at_once * poll_every > 1) == (report.lagged > 0)
