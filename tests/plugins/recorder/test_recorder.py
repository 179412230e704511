"""The recorder: what it writes of a worker, what it hides, and what it says when it is too slow."""

from __future__ import annotations

import gzip
import json
import stat
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vswa_plugins.gemma3_cpu.cache.spec import GroupSpec
from vswa_plugins.gemma3_cpu.simulate.requests import SimulatedWorker, Workload, manager_for
from vswa_plugins.recorder.recorder import Recorder, begin, header_of
from vswa_plugins.recorder.recording import Limits, Recording, _Size

from tests.accuracy_helpers import replayed
from vswa_plugin.accuracy.trace import (
    TraceEvent,
    TraceHole,
    TraceRequest,
    TraceResult,
    TraceWriter,
    open_trace,
)
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import RULES
from vswa_plugin.engine.contract import EngineInfo, EngineSettings
from vswa_plugin.engine.records import RequestRecord
from vswa_plugin.errors import ConfigError
from vswa_plugin.hookspecs import WorkerContext

SIZE = 16
LAYOUT = CacheLayout((CacheGroup(0, 64, SIZE), CacheGroup(1, None, SIZE)), "trtllm_v2", "m")
HEADER = header_of("trtllm", LAYOUT, "gemma3_cpu", "m")


def context(ranks: int = 1, event_format: str = "trtllm", rule: str = "trtllm_v2") -> WorkerContext:
    layout = CacheLayout(LAYOUT.groups, rule, "m")
    settings = EngineSettings("gemma3_cpu", "agg", "/model", "m", data_parallel_size=ranks)
    info = EngineInfo(layout, 4096, 8, 512, 40, data_parallel_size=ranks)
    return WorkerContext(None, 7, settings, info, RULES, event_format)


def record(request_id: str, cached_tokens: int = 0, **changes: Any) -> RequestRecord:
    done = RequestRecord(request_id, "m", 7, 0, 10, cached_tokens, 3, "stop", 0.0, 1.0)
    return msgspec.structs.replace(done, **changes)


def engine() -> SimulatedWorker:
    """A cache under pressure: windows lose blocks that the global group still has."""
    groups = [GroupSpec(0, 64, 24, 5), GroupSpec(1, None, 90, 1)]
    return SimulatedWorker(manager_for("trtllm_v2", groups, SIZE, 1024, max_chunk_tokens=64), SIZE, 64)


def serve(told: Recorder | Any, worker: SimulatedWorker, requests: int = 80, **routing: Any) -> None:
    """One request after the other, told as a worker tells them."""
    told.events(0, worker.take_events())
    for number, (prompt, output_len) in enumerate(islice(Workload(3, 120), requests)):
        told.arrived(f"r{number}", {"token_ids": list(prompt), "routing": routing})
        cached = worker.serve(prompt, output_len, routing.get("cache_salt"))
        told.events(0, worker.take_events())
        told.finished(record(f"r{number}", cached, first_token_s=1e-9, output_tokens=output_len))


def lines_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -- what is written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["plain", "hidden"])
def test_a_recorded_engine_is_predicted_exactly(tmp_path: Path, tokens: str) -> None:
    recorder = begin(context(), str(tmp_path / "new"), tokens)
    serve(recorder, engine())
    recorder.close()
    report = replayed(only_file(tmp_path / "new"))

    assert (80, 0, 0, 0) == (report.requests, len(report.mistakes), report.lagged, report.unfinished)
    assert report.score("global only").over > 5
    assert ("gemma3_cpu", "trtllm_v2", ("64", "global")) == (report.engine, report.rule, report.windows)


def test_salted_requests_stay_apart_when_hidden(tmp_path: Path) -> None:
    recorder = begin(context(), str(tmp_path), "hidden")
    worker = engine()
    serve(recorder, worker, 20)
    recorder.close()
    plain = replayed(only_file(tmp_path))
    other = tmp_path / "salted"
    recorder = begin(context(), str(other), "hidden")
    serve(recorder, engine(), 20, cache_salt="pepper")
    recorder.close()

    assert plain.cached_tokens == replayed(only_file(other)).cached_tokens
    assert [] == replayed(only_file(other)).mistakes
    assert "pepper" not in gzip.decompress(only_file(other).read_bytes()).decode()


def test_only_the_owner_can_read_it_and_no_file_is_written_over(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "t.jsonl.gz", HEADER)
    with pytest.raises(ConfigError, match="cannot write a trace"):
        Recording(tmp_path / "t.jsonl.gz", HEADER)
    recording.close()
    begin(context(), str(tmp_path / "made"), "plain").close()

    assert 0o600 == stat.S_IMODE((tmp_path / "t.jsonl.gz").stat().st_mode)
    assert 0o700 == stat.S_IMODE((tmp_path / "made").stat().st_mode)
    assert 0o600 == stat.S_IMODE(only_file(tmp_path / "made").stat().st_mode)


def test_what_was_written_can_be_read_while_the_worker_runs(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "t.jsonl.gz", HEADER, limits=Limits(write_every_s=0.001))

    def readable(lines: int) -> bool:
        try:
            return lines == len(lines_of(recording.path))
        except EOFError:  # in the middle of a write
            return False

    for number in range(3):
        until(partial(readable, number + 1))
        recording.events([{"event_id": number}])
    recording.close()

    assert [0, 1, 2] == [line["event"]["event_id"] for line in lines_of(recording.path)[1:]]


def test_a_request_stands_before_its_events_and_its_result_says_how_many_were_seen(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "t.jsonl.gz", HEADER)
    recording.events([{"event_id": 0}, {"event_id": 1}])
    recording.arrived("a", [1, 2], "salt", "lora")
    arrived = time.monotonic()
    until(lambda: time.monotonic() > arrived)
    recording.events([{"event_id": 2}])
    first_token = time.monotonic() - arrived + 1e-3
    until(lambda: time.monotonic() > arrived + first_token)
    recording.events([{"event_id": 3}])
    recording.finished(record("a", 1, first_token_s=first_token))
    recording.close()
    _, *records = [line for _, line in [(0, None), *open_trace(recording.path).records()]]

    assert [0, 1, "request", 2, 3, "result"] == [
        line.event["event_id"] if isinstance(line, TraceEvent) else type(line).__name__.lower()[5:]
        for line in records
    ]
    assert TraceRequest((1, 2), None, cache_salt="salt", lora_name="lora", id=1) == records[2]
    assert TraceResult(1, 1, 3, seen=3) == records[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"first_token_s": None},
        {"finish_reason": "cancelled"},
        {"finish_reason": "error: no"},
        {"transferred_tokens": 5},
    ],
)
def test_a_request_that_says_nothing_of_this_cache_gets_no_result(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    recorder = begin(context(), str(tmp_path), "plain")
    recorder.arrived("a", {"token_ids": [1] * SIZE})
    recorder.finished(record("a", 4, **changes))
    recorder.close()
    report = replayed(only_file(tmp_path))

    assert (0, 1) == (report.requests, report.unfinished)


def test_each_rank_has_its_file_and_only_requests_whose_rank_is_known(tmp_path: Path) -> None:
    recorder = begin(context(ranks=2), str(tmp_path), "plain")
    recorder.arrived("nobody's", {"token_ids": [1]})
    recorder.arrived("pinned", {"token_ids": [2], "routing": {"dp_rank": 1}})
    recorder.arrived("moved", {"token_ids": [3], "routing": {"dp_rank": 0}})
    recorder.arrived("image", {"token_ids": [4], "routing": {"dp_rank": 0}, "multi_modal_data": {"x": 1}})
    for name in ("nobody's", "pinned", "moved", "image"):
        recorder.finished(record(name, dp_rank=1))
    recorder.events(1, [{"event_id": 0}])
    recorder.close()
    first, second = sorted(tmp_path.iterdir())

    assert [("request", [3])] == [(line["type"], line.get("token_ids")) for line in lines_of(first)[1:]]
    assert ["request", "result", "event"] == [line["type"] for line in lines_of(second)[1:]]


def test_a_prompt_may_come_packed(tmp_path: Path) -> None:
    recorder = begin(context(), str(tmp_path), "plain")
    recorder.arrived("packed", {"token_ids": struct.pack("<3I", 1, 2, 70_000)})
    recorder.arrived("array", {"token_ids": bytearray(struct.pack("<I", 9))})
    recorder.close()
    requests = [line for line in lines_of(only_file(tmp_path)) if line["type"] == "request"]

    assert [[1, 2, 70_000], [9]] == [line["token_ids"] for line in requests]


@pytest.mark.parametrize(
    "request_",
    [
        {"token_ids": b"12345"},
        {"token_ids": "one"},
        {"token_ids": [1], "routing": [1]},
        {"token_ids": [1], "routing": {"dp_rank": "0"}},
        {"token_ids": [1], "routing": {"dp_rank": -1}},
        {"token_ids": [1], "routing": {"dp_rank": 1}},
        {"token_ids": [1], "routing": {"cache_salt": 7}},
    ],
)
def test_a_request_that_no_engine_serves_is_left_out(tmp_path: Path, request_: dict[str, Any]) -> None:
    recorder = begin(context(), str(tmp_path), "plain")
    recorder.arrived("a", request_)
    recorder.finished(record("a", 0))
    recorder.close()

    assert ["header"] == [line["type"] for line in lines_of(only_file(tmp_path))]


# -- too slow ----------------------------------------------------------------------------------------


class Stuck(Recording):
    """Its disk takes nothing until it is told to."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.disk = threading.Event()
        super().__init__(path, HEADER, limits=limits)

    def _write(self) -> None:
        assert self.disk.wait(10)
        super()._write()


def test_what_does_not_fit_is_left_out_and_the_file_says_so_where_it_happened(tmp_path: Path) -> None:
    recording = Stuck(tmp_path / "t.jsonl.gz", Limits(blocks=5, tokens=10, write_every_s=0.001))
    recording.events([{"event_id": 0}, {"event_id": 1}])
    recording.arrived("a", [1] * 8, None, None)
    recording.events([{"event_id": n} for n in range(2, 8)])
    recording.arrived("b", [1] * 8, None, None)
    recording.events([{"event_id": 8}] * 2)
    recording.events([{"event_id": 10}] * 2)
    recording.finished(record("b"))
    recording.finished(record("a"))
    recording.disk.set()
    recording.close()
    told = [line for _, line in open_trace(recording.path).records()]

    assert (8, 1) == (recording.lost_events, recording.lost_requests)
    kinds = [type(line).__name__.removeprefix("Trace") for line in told]
    assert ["Event", "Event", "Request", "Hole", "Event", "Event", "Hole", "Result"] == kinds
    assert [TraceHole(6, 1), TraceHole(2, 0)] == [line for line in told if isinstance(line, TraceHole)]


def test_a_hole_at_the_end_is_told_too_and_room_comes_back(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "t.jsonl.gz", HEADER, limits=Limits(blocks=3, write_every_s=0.001))
    for number in range(5):
        until(lambda: recording._has_room(_Size(blocks=3)))
        recording.events([{"event_id": number}] * 3)
    recording.events([{"event_id": 9}] * 4)
    recording.close()
    *events, hole = lines_of(recording.path)[1:]

    assert [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4] == [each["event"]["event_id"] for each in events]
    assert {"type": "hole", "events": 4, "requests": 0} == hole


def test_after_a_hole_nothing_is_promised_that_may_be_gone(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "whole.jsonl.gz", HEADER)

    class Whole:
        events = staticmethod(lambda rank, events: recording.events(events))
        arrived = staticmethod(
            lambda request_id, request: recording.arrived(request_id, request["token_ids"], None, None)
        )
        finished = staticmethod(recording.finished)

    serve(Whole(), engine())
    recording.close()
    records = [line for _, line in open_trace(recording.path).records()]
    events = [i for i, line in enumerate(records) if isinstance(line, TraceEvent)]
    first, end = events[len(events) // 3], events[len(events) // 2]
    holed = tmp_path / "holed.jsonl"
    with TraceWriter(holed, HEADER) as writer:
        for index, line in enumerate(records):
            if index == first:
                writer.hole(TraceHole(end - first, 0))
            if first <= index < end and isinstance(line, TraceEvent):
                continue
            put = {TraceEvent: lambda e: writer.event(e.event), TraceRequest: writer.request}
            put.get(type(line), writer.result)(line)  # type: ignore[call-overload]
    report = replayed(holed)

    assert report.restarts >= 1
    assert 0 == report.score().over
    assert report.score().under > 0


def test_a_full_disk_ends_the_recording_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recording = Recording(tmp_path / "t.jsonl.gz", HEADER, limits=Limits(write_every_s=0.001))

    def full(_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(recording._writer, "event", full)
    recording.events([{"event_id": 0}])
    recording._thread.join(10)
    recording.events([{"event_id": 1}])
    recording.arrived("a", [1], None, None)
    recording.finished(record("a"))
    recording.close()

    assert not recording._thread.is_alive()
    assert not recording._waiting
    assert ["header"] == [line["type"] for line in lines_of(recording.path)]
    assert "recording has ended, serving goes on" in caplog.text


def test_taking_events_never_waits_for_the_disk(tmp_path: Path) -> None:
    recording = Stuck(tmp_path / "t.jsonl.gz", Limits())
    began = time.monotonic()
    for number in range(2_000):
        recording.events([{"event_id": number}])
    took = time.monotonic() - began
    recording.disk.set()
    recording.close()

    assert took < 1
    assert 2_001 == len(lines_of(recording.path))


@pytest.mark.parametrize(("event_format", "rule"), [("other", "trtllm_v2"), ("trtllm", "trtllm_v1")])
def test_what_cannot_be_hidden_is_refused_and_says_how_to_go_on(
    tmp_path: Path, event_format: str, rule: str
) -> None:
    worker = context(event_format=event_format, rule=rule)
    with pytest.raises(ConfigError, match=r"tokens=plain \(VSWA_RECORD_TOKENS=plain\)"):
        begin(worker, str(tmp_path), "hidden")
    begin(worker, str(tmp_path), "plain").close()
