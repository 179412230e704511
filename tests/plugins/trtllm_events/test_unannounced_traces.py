"""Traces of manager V1's decision code, replayed: how many requests are exact, and which way the others miss.

The traces were made by running V1's decision code, transcribed from the sources statement by statement (see
``tests/data/README.md``). Each bound is what was measured; less is a step back.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from vswa_plugin.accuracy.replay import replay
from vswa_plugin.accuracy.report import Report
from vswa_plugin.accuracy.scorers import EXACT
from vswa_plugin.accuracy.trace import open_trace

DATA = Path(__file__).parents[2] / "data"
#: Requests that are exact in whole blocks, and those that are promised too much, by trace.
MEASURED = {
    "g1b-new-sync-c1": (260, 0),
    "g1b-long-new-sync-c1": (200, 0),
    "two-new-sync-c1": (259, 0),
    "w128-new-sync-c1": (260, 0),
    "g1b-host-new-sync-c1": (257, 3),
    "g1b-new-sync-c4": (257, 2),
    "w128-new-sync-c4": (250, 4),
    "g1b-old-sync-c1": (260, 0),
}
#: One fault of the engine's reports each, a few blocks long.
MINIMAL = ("exact-multiple", "longanswer", "orphan", "takeover", "host-self")


@cache
def replayed(name: str) -> Report:
    trace = open_trace(DATA / f"{name}.jsonl.xz")
    return replay(trace, lambda event_format, layout: TrtllmEventAdapter(layout), scorers=[])


def verdicts(report: Report) -> Counter[str]:
    """How many requests are ``exact`` in whole blocks, promised ``too much`` or ``too little``."""
    counts: Counter[str] = Counter()
    for outcome in report.outcomes:
        missing = outcome.actual // report.block_size - outcome.predicted[EXACT] // report.block_size
        counts["exact" if not missing else "too little" if missing > 0 else "too much"] += 1
    return counts


@pytest.mark.parametrize("name", MEASURED)
def test_a_trace_is_predicted_at_least_as_well_as_measured(name: str) -> None:
    exact, too_much = MEASURED[name]
    counts = verdicts(replayed(f"trtllm-v1-{name}"))

    assert exact <= counts["exact"], counts
    assert too_much >= counts["too much"], counts


@pytest.mark.parametrize("name", [name for name in MEASURED if "c1" in name and "host" not in name])
def test_one_request_at_a_time_at_most_one_in_a_hundred_is_promised_too_much(name: str) -> None:
    counts = verdicts(replayed(f"trtllm-v1-{name}"))

    assert counts.total() >= 100 * counts["too much"]


@pytest.mark.parametrize("case", MINIMAL)
def test_each_unannounced_change_alone_is_inferred(case: str) -> None:
    assert {"exact"} == set(verdicts(replayed(f"trtllm-v1-minimal/{case}-v1new")))


@pytest.mark.parametrize("case", ["exact-multiple", "longanswer", "orphan"])
def test_the_12_line_needs_no_inference_but_for_its_removals(case: str) -> None:
    assert {"exact"} == set(verdicts(replayed(f"trtllm-v1-minimal/{case}-v1old")))


@pytest.mark.parametrize("case", ["takeover", "host-self"])
def test_what_the_12_line_hides_is_a_known_exception(case: str) -> None:
    """One request of each is promised too much: its events show neither of the two."""
    assert {"exact": 2, "too much": 1} == dict(verdicts(replayed(f"trtllm-v1-minimal/{case}-v1old")))
