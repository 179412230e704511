"""The pure parts of benchmarks/gpu: the loads that every policy is sent alike, and the figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
WORKLOADS = sorted((FOLDER / "workloads").glob("*.json"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports one of the scripts as run.py does, which stand side by side."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
def test_a_workload_is_the_same_each_time_and_fits_the_engine(script: Any, path: Path) -> None:
    workload = script("workload")
    given = workload.load(path)
    first, again = workload.make(given), workload.make(given)

    assert first == again
    assert given["requests"] == len(first)
    assert all(request.after is None or request.after < number for number, request in enumerate(first))
    longest = 2_048 if path.stem.startswith("cpu-") else 8_192
    assert max(len(request.prompt) + request.max_tokens for request in first) < longest
    times = workload.arrivals(given)
    assert times == sorted(times) and len(times) == len(first)


def test_prompts_of_two_runs_share_nothing_and_those_of_one_run_share_what_they_shared(script: Any) -> None:
    workload = script("workload")
    requests = workload.make(workload.load(FOLDER / "workloads" / "moderate.json"))[:200]
    one, other = (
        [json.loads(body)["prompt"] for body in workload.bodies(requests, "m", run)] for run in (1, 2)
    )

    assert {prompt[0] for prompt in one}.isdisjoint({prompt[0] for prompt in other})
    assert [prompt[1:] for prompt in one] == [request.prompt[1:] for request in requests]
    assert 1 == len({prompt[0] for prompt in one})
    chat = next(number for number, request in enumerate(requests) if request.after is not None)
    before = requests[chat].after
    assert before is not None and one[chat][: len(one[before])] == one[before]


def test_figures_leave_out_what_failed_and_count_it(script: Any) -> None:
    client = script("client")
    rows = [
        client.Row(0, "chat", 100, first=0.01, total=0.02, cached=32, output=5, promised=2),
        client.Row(1, "chat", 100, first=0.03, total=0.04, cached=16, output=5, promised=3),
        client.Row(
            2, "fork", 100, first=9.0, total=9.0, cached=96, output=5, promised=6, error="HTTP 500: x"
        ),
    ]

    made = client.figures(rows, 2.0)
    said = client.said_promises(rows, 16)

    assert (3, 1, {"HTTP 500: x": 1}) == (made["requests"], made["errors"], made["error_kinds"])
    assert (200, 48, 152) == (made["prompt_tokens"], made["cached_tokens"], made["computed_prompt_tokens"])
    assert (1.0, 30.0) == (made["requests_per_s"], made["ttft_ms"]["p99"])
    assert {"exact": 1, "over": 1, "exact_share": 0.5, "promised_tokens": 80, "reported_tokens": 48} == said


def test_the_report_names_each_policy_and_pairs_the_runs_with_and_without_events(script: Any) -> None:
    client, report = script("client"), script("report")
    rows = [client.Row(0, "chat", 100, first=0.01, total=0.02, cached=32, output=5)]

    def run(step: str, front: str, repeat: int, seconds: float, **more: Any) -> dict[str, Any]:
        promises = {"exact_share": 0.97} if front == "exact" else {}
        given = {"step": step, "front": front, "repeat": repeat, "workload": "w", "cut": False, "engines": {}}
        return {**client.figures(rows, seconds), **given, "promises": promises, **more}

    runs = [run("policies", front, 0, 2.0, dynamo_events="global") for front in ("exact", "dynamo")]
    runs += [run("events", kind, n, s) for kind, n, s in (("on", 0, 2.2), ("off", 0, 2.0), ("on", 1, 2.0))]
    about = {"gpu": "a GPU", "machine": "m", "date": "d", "versions": {"vllm": "1"}}
    text = report.report([{**about, "runs": runs, "steps": {"disaggregated": {"skipped": "not yet"}}}])

    assert "| exact (our router) | 1 | 0 | 97.0 % | 32.0 % |" in text
    assert "| Dynamo's router, sent global blocks | 1 | 0 | - | 32.0 % |" in text
    assert "pair by pair: 1.100; median 1.100" in text
    assert "disaggregated: skipped (not yet)" in text
