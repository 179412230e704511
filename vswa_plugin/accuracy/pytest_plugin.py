"""pytest plugin: ``--vswa-trace=FILE`` runs a test over recorded engine traces.

A test that asks for ``engine_trace`` or ``accuracy_report`` runs once for each trace::

    from vswa_plugin.accuracy.report import assert_exact

    def test_promises_are_kept(accuracy_report):
        assert_exact(accuracy_report)

Without ``--vswa-trace`` such tests are skipped. Nothing of the package is imported until one runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vswa_plugin.accuracy.report import Report
    from vswa_plugin.accuracy.trace import Trace

_REPORTS = pytest.StashKey["dict[tuple[Path, str | None], Report]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vswa", "router accuracy on recorded engine traces (vswa-plugin)")
    group.addoption(
        "--vswa-trace",
        action="append",
        default=[],
        metavar="FILE",
        help="an engine trace for tests that use engine_trace or accuracy_report; may be repeated",
    )
    group.addoption("--vswa-rule", metavar="RULE", help="reuse rule of the engine (default: the trace's)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORTS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine_trace" not in metafunc.fixturenames:
        return
    paths: list[str] = metafunc.config.getoption("--vswa-trace")
    if paths:
        parameters = [pytest.param(path, id=Path(path).name) for path in paths]
    else:
        skip = pytest.mark.skip(reason="needs an engine trace: pytest --vswa-trace=FILE")
        parameters = [pytest.param(None, id="no trace", marks=skip)]
    metafunc.parametrize("engine_trace", parameters, indirect=True)


@pytest.fixture
def engine_trace(request: pytest.FixtureRequest) -> Trace:
    """The trace given with ``--vswa-trace``, its header read: an ``accuracy.trace.Trace``."""
    from vswa_plugin.accuracy.trace import open_trace

    return open_trace(request.param)


@pytest.fixture
def accuracy_report(engine_trace: Trace, request: pytest.FixtureRequest) -> Report:
    """That trace replayed with all installed plugins, once a session: an ``accuracy.report.Report``."""
    reports = request.config.stash[_REPORTS]
    key = (engine_trace.path.resolve(), request.config.getoption("--vswa-rule"))
    if key not in reports:
        reports[key] = _replay(engine_trace, key[1])
    return reports[key]


def _replay(trace: Trace, rule: str | None) -> Report:
    from vswa_plugin.accuracy.replay import replay_with
    from vswa_plugin.host.loading import load_host

    with load_host() as host:
        return replay_with(host, trace, rule=rule)
