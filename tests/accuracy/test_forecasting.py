"""The forecast as a scorer: on a recorded engine in overload, and that it reads nothing that comes later."""

from __future__ import annotations

import lzma
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.accuracy_helpers import DATA, HEADER, adapter_for, replayed, request, write
from tests.vllm_events_helpers import tokens_of
from vswa_plugin.accuracy.forecasting import FORECAST, Forecasting
from vswa_plugin.accuracy.headers import TraceHeader
from vswa_plugin.accuracy.replay import replay
from vswa_plugin.accuracy.report import Report
from vswa_plugin.accuracy.scorers import AlwaysZero
from vswa_plugin.accuracy.trace import TraceRequest, TraceResult, TraceWriter, open_trace

TRACE = DATA / "h200-v33-oss-preempt-conc-arrival.jsonl.xz"
#: Lines of it that the short tests read.
HEAD = 2_500


def forecasts(path: Path) -> Report:
    trace = open_trace(path)
    scorers = [Forecasting(blocks=trace.header.blocks), AlwaysZero()]
    return replay(trace, adapter_for, scorers=scorers)


def error(report: Report, scorer: str) -> int:
    score = report.score(scorer)
    return score.over_tokens + score.under_tokens


def test_in_overload_it_beats_the_cache_now_and_promising_nothing_and_halves_the_error() -> None:
    report = forecasts(TRACE)
    exact = {score.scorer: score.exact_blocks for score in report.scores}

    assert exact[FORECAST] > max(exact["exact"], exact["always 0"])
    assert error(report, FORECAST) <= error(report, "exact") // 2
    assert {"exact": 268, "always 0": 272} == {name: exact[name] for name in ("exact", "always 0")}


@pytest.mark.parametrize("seed", range(2))
def test_lines_after_a_request_change_nothing_in_its_promise(seed: int, tmp_path: Path) -> None:
    with lzma.open(TRACE, "rt") as file:
        lines = [next(file) for _ in range(HEAD)]
    decoded: list[dict[str, Any]] = [msgspec.json.decode(line) for line in lines]
    requests = [n for n, each in enumerate(decoded) if each["type"] == "request"]
    last = requests[len(requests) // 2]
    later = [n for n in range(last + 1, HEAD) if decoded[n]["type"] != "result"]
    random.Random(seed).shuffle(later)
    results = [n for n in range(last + 1, HEAD) if decoded[n]["type"] == "result"]
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(lines[n] for n in (*range(last + 1), *later, *results)))
    as_it_was = tmp_path / "as-it-was.jsonl"
    as_it_was.write_text("".join(lines))

    def promises(path: Path) -> dict[int, int]:
        outcomes = forecasts(path).outcomes
        return {each.line: each.predicted[FORECAST] for each in outcomes if each.line <= last + 1}

    kept = promises(as_it_was)

    assert len(kept) > 5 and any(kept.values())
    assert kept == promises(shuffled)


def test_what_those_before_it_will_have_stored_is_promised(tmp_path: Path) -> None:
    """Two equal prompts at once: the engine computes the first, and finds the second cached."""
    prompt = (*tokens_of("abc"), 1)
    path = tmp_path / "twins.jsonl"
    with TraceWriter(path, HEADER) as trace:
        for number in range(2):
            trace.request(TraceRequest(prompt, id=number))
        for number, cached in enumerate((0, len(prompt) - 1)):
            trace.result(TraceResult(number, cached))

    first, second = forecasts(path).outcomes

    assert (0, 0) == (first.predicted[FORECAST], second.predicted["exact"])
    assert len(prompt) - 1 == second.predicted[FORECAST]


def test_a_request_that_stands_where_it_was_matched_is_promised_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "admission.jsonl", request("abc", 0), request("abc", 0))

    assert [0, 0] == [each.predicted[FORECAST] for each in replayed(path).outcomes]


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        ('{"name": "x", "blocks": 400}', 400),
        ({"blocks": 400}, 400),
        ("gptoss-default", None),
        ('{"blocks": "many"}', None),
        ('{"blocks": true}', None),
        ("[400]", None),
        ("", None),
    ],
)
def test_the_size_of_the_cache_is_read_from_the_header(config: Any, blocks: int | None) -> None:
    assert blocks == TraceHeader("vllm", config=config).blocks
