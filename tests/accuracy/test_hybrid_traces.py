"""Recorded traces of vLLM's hybrid cache manager (tests/data/README.md), through the real path."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from vswa_plugins.vllm_events import digests

from tests.accuracy_helpers import DATA, adapter_for
from vswa_plugin.accuracy.pipeline import EventPipeline
from vswa_plugin.accuracy.replay import replay
from vswa_plugin.accuracy.report import Report
from vswa_plugin.accuracy.scorers import Exact, built_in_scorers
from vswa_plugin.accuracy.trace import open_trace
from vswa_plugin.blocks.layout import FULL

TRACES = sorted((DATA / "hybrid").glob("*.jsonl.xz"))
#: Requests that a chain of events alone must predict; the least share that was measured is 27.8 %.
LEAST_SHARE = 0.25

each_trace = pytest.mark.parametrize("trace", TRACES, ids=lambda path: path.name.split(".")[0][12:])


def replayed(path: Path) -> Report:
    return replay(open_trace(path), adapter_for, scorers=[Exact()])


def names_all(path: Path) -> bool:
    """Whether a full group has the finest blocks, so that its events name all prefixes."""
    layout = open_trace(path).layout()
    return any(group.kind == FULL and group.block_size == layout.hash_block_size for group in layout.groups)


def test_there_are_traces_of_all_kinds() -> None:
    layouts = [open_trace(path).layout() for path in TRACES]

    assert 29 == len(TRACES)
    assert {"full", "sliding", "chunked", "recurrent"} == {g.kind for each in layouts for g in each.groups}
    assert {True, False} == {names_all(path) for path in TRACES}
    assert {0, 1, 3} == {each.lookahead for each in layouts}
    assert any(each.resumption is not None and each.resumption.partial for each in layouts)
    assert {True, False} == {each.resumption.spare_last for each in layouts if each.resumption is not None}
    assert {True, False} == {g.drops_last for each in layouts for g in each.groups}
    assert {"vllm", "vllm_hybrid"} == {each.rule for each in layouts}


@each_trace
def test_every_request_is_predicted(trace: Path) -> None:
    report = replayed(trace)

    assert 90 == report.requests
    assert sum(each.actual > 0 for each in report.outcomes) >= 40, "many reuse something"
    assert [] == [(e.line, e.predicted["exact"], e.actual) for e in report.mistakes]
    assert (0, 0) == (report.unattributed, report.restarts)


@each_trace
def test_where_names_cannot_be_computed_events_alone_promise_less_and_never_more(
    trace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under another PYTHONHASHSEED the root of all hashes is another one."""
    monkeypatch.setattr(digests, "ROOT", bytes(32))
    with caplog.at_level(logging.WARNING):
        report = replayed(trace)

    score = report.score("exact")
    assert 0 == score.over
    said = [each for each in caplog.messages if "block hashes are not those of sha256" in each]
    if names_all(trace):
        assert 0 == score.under
        assert len(said) <= 1
    else:
        assert LEAST_SHARE <= report.exact_share < 1
        assert 1 == len(said)


@each_trace
def test_without_prompts_events_promise_no_more(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventPipeline, "prompt", lambda *_: None)
    report = replayed(trace)

    assert 0 == report.score("exact").over
    assert 0.8 <= report.exact_share


@pytest.mark.parametrize("name", ["dsv4-256-64-4-8", "qwen35-match16-b64", "mamba-only-b64", "swa7-b16"])
def test_other_scorers_take_such_layouts_too(name: str) -> None:
    (trace,) = (DATA / "hybrid").glob(f"vllm-hybrid-{name}.*")
    report = replay(open_trace(trace), adapter_for, scorers=built_in_scorers())

    assert 1 == report.exact_share
    assert all(score.exact_share > 0 for score in report.scores)
