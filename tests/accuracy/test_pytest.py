"""The pytest plugin, in a pytest of its own."""

from __future__ import annotations

import shutil

import pytest

from tests.accuracy_helpers import DATA

pytest_plugins = ["pytester"]

HEAD = str(DATA / "trtllm-v2-gemma3-1b-head.jsonl.gz")
PLUGIN = ("-p", "vswa_plugin.accuracy.pytest_plugin", "-p", "no:cacheprovider")
TESTS = """
from vswa_plugin.accuracy.report import assert_exact

def test_exact(accuracy_report):
    assert_exact(accuracy_report)

def test_at_least(accuracy_report):
    assert_exact(accuracy_report, at_least=0.1)

def test_trace(engine_trace):
    assert engine_trace.header.format == "trtllm"

def test_something_else():
    pass
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """With this plugin and no other."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(TESTS)
    return pytester


def test_tests_run_once_for_each_trace(inner: pytest.Pytester) -> None:
    again = inner.path / "again.jsonl.gz"
    shutil.copy(HEAD, again)
    result = inner.runpytest(*PLUGIN, "-v", f"--vswa-trace={HEAD}", f"--vswa-trace={again}")

    result.assert_outcomes(passed=7)
    result.stdout.fnmatch_lines(
        ["*test_exact?trtllm-v2-gemma3-1b-head.jsonl.gz?*", "*test_exact?again.jsonl.gz?*"]
    )


def test_tests_of_traces_are_skipped_without_one(inner: pytest.Pytester) -> None:
    result = inner.runpytest(*PLUGIN, "-rs")

    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(["*needs an engine trace: pytest --vswa-trace=FILE*"])


def test_what_is_not_exact_fails_with_the_reason(inner: pytest.Pytester) -> None:
    trace = str(DATA / "trtllm-v2-gemma3-1b.jsonl.gz")
    result = inner.runpytest(*PLUGIN, f"--vswa-trace={trace}", "--vswa-rule", "trtllm_v1_contiguous")

    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*expected 100.00% of 150 requests to be exact in whole blocks by the rule trtllm_v1_contiguous*",
            "*is trtllm_v1_contiguous this engine's rule*",
        ]
    )


def test_a_trace_is_replayed_once_a_session(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    import vswa_plugin.accuracy.replay as module

    replay, traces = module.replay, []
    monkeypatch.setattr(
        module, "replay", lambda trace, *a, **k: traces.append(trace.name) or replay(trace, *a, **k)
    )
    inner.runpytest_inprocess(*PLUGIN, f"--vswa-trace={HEAD}").assert_outcomes(passed=4)

    assert ["trtllm-v2-gemma3-1b-head"] == traces


def test_a_trace_that_cannot_be_read_is_an_error_of_its_tests_only(inner: pytest.Pytester) -> None:
    result = inner.runpytest(*PLUGIN, "--vswa-trace=absent.jsonl")

    result.assert_outcomes(passed=1, errors=3)
    result.stdout.fnmatch_lines(
        ["*expected an engine trace at absent.jsonl: No such file or directory. The plugin recorder*"]
    )
