"""The suites themselves: each planted fault fails the test that is there for it, and says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conformance import faulty_adapters, faulty_engines, faulty_phases
from tests.conformance.faulty_adapters import TestPlain as TestPlain

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
ENGINES = faulty_engines.all_faulty()
ADAPTERS = faulty_adapters.all_faulty()
PHASES = faulty_phases.all_faulty()


@pytest.mark.parametrize("fault", [*ENGINES, *ADAPTERS, *PHASES], ids=lambda each: each.__name__)
def test_a_faulty_engine_adapter_or_pair_fails_the_test_that_is_there_for_its_fault(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, fault: type[Any]
) -> None:
    test, reason = fault.caught_by
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.syspathinsert(ROOT)
    pytester.makepyfile(f"from {fault.__module__} import SUITES\nTestFaulty = SUITES[{fault.__name__!r}]\n")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rf", "--tb=short", "-k", test)

    lines = [line.split()[1] for line in result.outlines if line.startswith("FAILED ")]
    assert test in {line.rpartition("::")[2].partition("[")[0].removeprefix("test_") for line in lines}
    assert reason in result.stdout.str()


def test_every_test_of_the_suites_has_a_fault_that_it_catches() -> None:
    suites = (
        faulty_engines.EngineConformance,
        faulty_adapters.EventAdapterConformance,
        faulty_phases.PhasesConformance,
    )
    tests = {
        name.removeprefix("test_") for suite in suites for name in vars(suite) if name.startswith("test_")
    }

    assert tests == {fault.caught_by[0] for fault in (*ENGINES, *ADAPTERS, *PHASES)}


def test_a_suite_without_its_fixture_says_what_is_missing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(
        "from vswa_plugin.testing.conformance import EngineConformance as E\nclass TestMine(E): pass\n"
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")

    result.stdout.fnmatch_lines(["*expected the subclass to have a fixture `engine` that returns an Engine*"])
