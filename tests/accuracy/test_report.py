"""What a replay found, shown: JSON, table, page, plot; and ``vswa accuracy``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.accuracy_helpers import DATA, replayed, request, write
from tests.vllm_events_helpers import stored
from vswa_plugin.accuracy.report import Report, as_data, assert_exact, page, plot
from vswa_plugin.cli import accuracy
from vswa_plugin.errors import ConfigError

HEAD = str(DATA / "trtllm-v2-gemma3-1b-head.jsonl.gz")
Output = pytest.CaptureFixture[str]


def run(*said: str) -> int:
    """``vswa accuracy`` with these arguments."""
    parser = argparse.ArgumentParser()
    accuracy.configure(parser)
    args = parser.parse_args(said)
    args.plugin, args.no_plugin, args.plugin_options = [], [], None
    return accuracy.run(args)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """One request is exact, one is an exception, and one is wrong."""
    held = [stored("abc", group=1), stored("abc", 2)]
    asked = [request("x", 0), request("abc", 15, [1, 2, 3, 4, 5]), request("x<b>", 4)]
    return replayed(write(tmp_path / "<made>.jsonl", *held, *asked), rule="trtllm_v2")


# -- the report ------------------------------------------------------------------------------------


def test_an_inexact_report_fails_with_shares_reasons_and_requests(report: Report) -> None:
    assert_exact(report, at_least=1 / 3)
    with pytest.raises(AssertionError) as caught:
        assert_exact(report)

    said = str(caught.value)
    assert (
        "expected 100.00% of 3 requests to be exact in whole blocks by the rule trtllm_v2, got 33.33%" in said
    )
    assert "1 requests: the engine reused another block up to one token short of its edge" in said
    assert "1 requests differ and nothing above explains them (lines 6)" in said
    assert "line 5: 17 tokens, predicted 0, the engine reused 15 (partial match)" in said
    assert "line 6: 16 tokens, predicted 0, the engine reused 4" in said


def test_a_report_without_requests_proves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="expected requests to predict, got none"):
        assert_exact(replayed(write(tmp_path / "t.jsonl")))


def test_an_unknown_scorer_is_answered_with_the_known_ones(report: Report) -> None:
    with pytest.raises(ConfigError, match=r"unknown scorer 'dynamo'\. Known: exact, forecast, global only"):
        report.score("dynamo")


def test_json_has_the_shares(report: Report) -> None:
    (data,) = json.loads(json.dumps(as_data([report])))["reports"]

    assert (1 / 3, 1, 3) == (data["exact_share"], data["exceptions"]["partial match"], len(data["outcomes"]))
    assert ["exact", 1 / 3] == [data["scores"][0][key] for key in ("scorer", "exact_share")]
    assert report.reasons() == data["reasons"]


def test_the_page_names_every_scorer_and_escapes_what_it_is_given(report: Report) -> None:
    shown = page([report, report])

    assert 2 == shown.count("<h2>&lt;made&gt;:")
    assert all(shown.count(f"<td>{score.scorer}</td>") == 2 for score in report.scores)
    assert "<made>" not in shown and "width:33.3%" in shown


def test_a_plot_without_matplotlib_says_what_to_install(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(ConfigError, match=r"pip install 'vswa-plugin\[plot\]'"):
        plot([report], tmp_path / "p.png")


def test_a_plot_is_drawn_for_any_number_of_traces(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    for count in (1, 3):
        plot([report] * count, tmp_path / f"{count}.png")

    assert 0 < (tmp_path / "1.png").stat().st_size < (tmp_path / "3.png").stat().st_size
    with pytest.raises(ConfigError, match="--plot: cannot write"):
        plot([report], tmp_path / "p.nonsense")


# -- the command -----------------------------------------------------------------------------------


def test_a_replay_prints_what_each_scorer_keeps(capsys: Output) -> None:
    assert 0 == run("replay", HEAD)

    shown = capsys.readouterr().out
    assert "26 requests" in shown and "windows 512 global" in shown
    assert ["exact", "100.0%"] == next(
        line for line in shown.splitlines() if line.startswith("exact")
    ).split()[:2]
    assert "min of last boundaries" in shown and "approximate (TTL 100)" in shown


def test_a_replay_prints_json_and_nothing_else(capsys: Output) -> None:
    assert 0 == run("replay", "--json", "--ttl", "3", HEAD, HEAD)

    reports = json.loads(capsys.readouterr().out)["reports"]
    assert [1.0, 1.0] == [each["exact_share"] for each in reports]
    assert {"approximate (TTL 3)", "boundary projection"} <= {
        score["scorer"] for score in reports[0]["scores"]
    }


def test_falling_short_is_exit_code_1_and_names_the_trace(tmp_path: Path, capsys: Output) -> None:
    trace = ("replay", "--rule", "trtllm_v1_contiguous", str(DATA / "trtllm-v2-gemma3-1b.jsonl.gz"))
    share = run_json(capsys, *trace)["exact_share"]

    assert [0, 1] == [run(*trace, "--min-exact", str(each)) for each in (share, share + 0.01)]
    assert f"trtllm-v2-gemma3-1b: {share:.2%} of requests are exact" in capsys.readouterr().err
    assert 1 == run(*trace, HEAD, "--min-exact", "1"), "each trace must do"


def test_a_trace_without_requests_falls_short_of_any_share(tmp_path: Path, capsys: Output) -> None:
    trace = str(write(tmp_path / "t.jsonl", stored("a")))

    assert [0, 1, 1] == [
        run("replay", trace, *more) for more in ((), ("--min-exact", "0"), ("--min-exact", "1"))
    ]
    said = capsys.readouterr()
    assert "no requests: there was nothing to predict" in said.out
    assert "t: no requests are exact in whole blocks, expected at least 0.00%" in said.err


def run_json(capsys: Output, *said: str) -> Any:
    """The only report."""
    run(*said, "--json")
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    return report


def test_a_page_is_written(tmp_path: Path) -> None:
    path = tmp_path / "r.html"

    assert 0 == run("replay", HEAD, "--html", str(path))
    assert path.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (("--min-exact", "99"), "--min-exact: expected a share from 0 to 1, got 99"),
        (("--rule", "none"), "unknown reuse rule 'none'"),
        (("--plot", "/nowhere/r.png"), "--plot: cannot write /nowhere/r.png: there is no directory /nowhere"),
        (("--plot", "r.jpeg"), "--plot: expected a file that ends in .png, .svg, .pdf, got r.jpeg"),
        (("--html", "/nowhere/r.html"), "--html: cannot write /nowhere/r.html: No such file"),
        (("absent.jsonl",), "expected an engine trace at absent.jsonl"),
    ],
)
def test_what_the_user_can_correct_is_said(said: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run("replay", HEAD, *said)


def test_a_format_without_a_plugin_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"type":"header","format":"other","rule":"vllm","block_size":4,"groups":[{"kind":"full"}]}\n'
    )

    with pytest.raises(ConfigError, match="no plugin reads KV events of the format 'other'"):
        run("replay", str(path))
