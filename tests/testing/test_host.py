"""The host for tests: it has the plugins that it is given, and a failure not expected fails the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host_helpers import BATCH, SOURCE, failing
from vswa_plugin.engine import Section
from vswa_plugin.errors import ConfigError, PluginError
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.host.host import PluginHost
from vswa_plugin.testing import engine
from vswa_plugin.testing.host import plugin, plugin_host

EXAMPLE = Path(__file__).parents[2] / "plugins/examples/urgent_requests.py"


def names(host: PluginHost) -> list[str]:
    return [status.name for status in host.plugins()]


def test_modules_objects_files_and_functions_are_loaded_under_names_of_their_own() -> None:
    metrics = plugin(vswa_metrics=lambda: "")
    with plugin_host(engine, metrics, EXAMPLE, vswa_engine_names=lambda: ["mine"]) as host:
        assert ["engine", "functions", "plugin2", "urgent_requests"] == names(host)
        assert ["mine", "standin"] == host.engine_names()


def test_no_installed_plugin_is_there() -> None:
    with plugin_host() as host:
        assert [] == names(host)


def test_the_host_is_closed_at_the_end() -> None:
    with plugin_host(vswa_engine_names=lambda: ["mine"]) as host:
        pass

    assert [] == host.engine_names()


def test_a_dotted_name_is_loaded_as_plugin_does_it() -> None:
    with plugin_host("vswa_plugin.testing.engine") as host:
        assert ["standin"] == host.engine_names()


def test_a_plugin_that_breaks_a_hooks_contract_is_refused_at_once() -> None:
    with pytest.raises(PluginError, match="no hook"), plugin_host(vswa_metric=lambda: ""):
        pass


def test_a_call_that_failed_fails_the_test_with_the_plugin_and_the_hook() -> None:
    broken = plugin(vswa_kv_batch=failing(RuntimeError("broken")))
    reason = r"'plugin1' failed in vswa_kv_batch \(2 calls\)"
    with pytest.raises(AssertionError, match=reason), plugin_host(broken) as host:
        for _ in range(2):
            host.kv_batch(SOURCE, BATCH)


def test_a_failure_that_is_expected_passes() -> None:
    with plugin_host(vswa_metrics=failing(OSError()), expect_failures={"vswa_metrics"}) as host:
        assert 'vswa_plugin_failures_total{plugin="functions",hook="vswa_metrics"} 1' in host.metrics()


def test_another_failure_than_the_expected_one_fails_the_test() -> None:
    broken = plugin(vswa_metrics=failing(OSError()), vswa_kv_batch=failing(OSError()))
    with (
        pytest.raises(AssertionError, match="failed in vswa_kv_batch"),
        plugin_host(broken, expect_failures={"vswa_metrics"}) as host,
    ):
        host.metrics()
        host.kv_batch(SOURCE, BATCH)


def test_an_expected_failure_that_does_not_come_fails_the_test() -> None:
    with (
        pytest.raises(AssertionError, match="expected calls to fail in vswa_metrics, but all"),
        plugin_host(vswa_metrics=lambda: "", expect_failures={"vswa_metrics"}) as host,
    ):
        host.metrics()


def test_none_leaves_failures_to_the_test() -> None:
    with plugin_host(vswa_metrics=failing(OSError()), expect_failures=None) as host:
        host.metrics()

        assert {("functions", "vswa_metrics"): 1} == host.failures()


def test_the_error_of_the_test_itself_is_not_covered_up() -> None:
    with pytest.raises(KeyError), plugin_host(vswa_metrics=failing(OSError())) as host:
        host.metrics()
        raise KeyError


class Limited:
    """Takes one option, and without it has no metrics."""

    @hookimpl
    def vswa_options(self, options: Section) -> list[str] | None:
        options.check({"limit"})
        self.limit = options.integer("limit", None)
        return ["vswa_metrics"] if self.limit is None else None

    @hookimpl
    def vswa_metrics(self) -> str:
        return f"limit {self.limit}\n"


def test_options_are_given_before_any_other_hook_and_also_where_there_are_none() -> None:
    with plugin_host(Limited(), options={"plugin1": {"limit": 3}}) as host:
        assert "limit 3\n" in host.metrics()
    with plugin_host(Limited()) as host:
        assert "limit" not in host.metrics()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plugin1": {"limt": 3}}, r"unknown option 'plugin1.limt' .* did you mean 'plugin1.limit'"),
        ({"limited": {"limit": 3}}, r"options of limited: .* which are plugin1$"),
        ({"functions": {"limit": 3}}, r"options of functions: .* which are plugin1$"),
    ],
)
def test_options_that_a_program_would_refuse_are_refused(
    options: dict[str, dict[str, object]], message: str
) -> None:
    host = plugin_host(Limited(), options=options, vswa_metrics=lambda: "")
    with pytest.raises(ConfigError, match=message), host:
        pass
