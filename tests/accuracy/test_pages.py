"""What README.md and docs/accuracy.md say of the recorded traces is what replay finds."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.accuracy_helpers import DATA
from vswa_plugin.accuracy.replay import replay_with
from vswa_plugin.accuracy.report import Report
from vswa_plugin.accuracy.trace import open_trace
from vswa_plugin.host.loading import load_host
from vswa_plugin.simulation.report import Comparison

ROOT = Path(__file__).parents[2]


def loaded(script: Path) -> Any:
    """A benchmark is a script, not part of a package."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench_route = loaded(ROOT / "benchmarks" / "bench_route.py")
#: How rows and columns of the pages are called -> trace, and scorer.
TRACES = {
    "TensorRT-LLM V2, Gemma 3 1b": "trtllm-v2-gemma3-1b",
    "TensorRT-LLM V2, Gemma 3 1b (512, global)": "trtllm-v2-gemma3-1b",
    "TensorRT-LLM V2, host tier": "trtllm-v2-host-tier",
    "TensorRT-LLM V2, with a host tier": "trtllm-v2-host-tier",
    "vLLM 0.33, gpt-oss (window 128)": "vllm-0.33-gptoss",
    "vLLM 0.33, gpt-oss (128, global)": "vllm-0.33-gptoss",
    "vLLM 0.33, Gemma 3 1b, dense retention": "vllm-0.33-gemma3-1b-dense",
}
SCORERS = {
    "exact (ours)": "exact",
    "projection for stock Dynamo": "boundary projection",
    "global only (Dynamo today)": "global only",
    "windows mixed": "mixed groups",
    "routing history": "approximate (TTL 100)",
    "approximate": "approximate (TTL 100)",
}


@cache
def replayed() -> Mapping[str, Report]:
    """With the scorers of all plugins."""
    with load_host(environ={}) as host:
        return {
            name: replay_with(host, open_trace(DATA / f"{name}.jsonl.gz")) for name in set(TRACES.values())
        }


def tables(page: Path) -> Iterator[tuple[str, str, str]]:
    """Row, column and cell of every table whose rows or columns are traces."""
    heading: list[str] = []
    for line in page.read_text("utf-8").splitlines():
        cells = [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            heading = []
        elif not heading:
            heading = cells
        elif cells[0] in TRACES or set(heading) & set(TRACES):
            yield from ((cells[0], column, cell) for column, cell in zip(heading, cells, strict=True))


def percent(share: float) -> str:
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def kept_share(report: Report, scorer: str) -> float:
    promised = sum(each.predicted[scorer] for each in report.outcomes)
    return 1 - report.score(scorer).over_tokens / promised


@pytest.mark.parametrize("page", ["README.md", "docs/accuracy.md"])
def test_a_page_says_what_replay_finds(page: str) -> None:
    checked = 0
    for row, column, cell in tables(ROOT / page):
        trace = TRACES.get(row) or TRACES.get(column)
        scorer = column if row in TRACES else row
        scorer = SCORERS.get(scorer, scorer)
        if trace is None or "%" not in cell:
            continue
        report = replayed()[trace]
        share, *kept = cell.split(", ")
        assert percent(report.score(scorer).exact_share) == share, (row, column)
        assert [percent(kept_share(report, scorer))] * len(kept) == kept, (row, column)
        checked += 1

    assert checked >= 4 * 5


def test_the_table_of_simulations_is_the_committed_results() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text("utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "route.json").read_text("utf-8"))

    assert f"{bench_route.BEGIN}\n{bench_route.table(result)}\n{bench_route.END}" in page


def test_what_the_page_says_of_twenty_seeds_is_the_committed_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "route_forks_27b.json").read_text("utf-8"))
    (report,) = result["reports"]
    (compared,) = report["exact_against_global_only"]

    assert 20 == len(report["seeds"]) == len(compared["computed"])
    said = Comparison("p", 1, tuple(compared["computed"]), tuple(compared["ttft_p90"])).sentence()
    assert "computed tokens -0.8% (-2.0% to +0.4%), time to first token p90 -0.1%" in said


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "p.md"
    page.write_text("text\n")
    with pytest.raises(SystemExit, match="expected the marks"):
        bench_route.rewrite(page, "table")
    page.write_text(f"before\n{bench_route.BEGIN}\nold\n{bench_route.END}\nafter\n")
    bench_route.rewrite(page, "table")

    assert f"before\n{bench_route.BEGIN}\ntable\n{bench_route.END}\nafter\n" == page.read_text()


def test_results_are_written_a_line_a_row() -> None:
    result: dict[str, Any] = {"rows": [{"a": 1, "b": [2]}, {"a": 2, "b": []}]}
    text = bench_route.encoded(result)

    assert result == json.loads(text)
    assert 2 == sum(line.strip().startswith('{ "a"') for line in text.splitlines())
