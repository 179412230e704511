"""A plugin that fails costs neither the others nor the caller; what tracing tells."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.host_helpers import BATCH, SOURCE, Clock, coroutine, failing, observer
from tests.host_helpers import clock as clock
from tests.host_helpers import host as host
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host
from vswa_plugin.program.life import Life
from vswa_plugin.publishing.publisher import PublisherOptions
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.testing.engine import StandinEngine
from vswa_plugin.testing.host import plugin
from vswa_plugin.worker.app import Worker
from vswa_plugin.worker.args import parse

# -- isolation ---------------------------------------------------------------------------------------


FAILURES = [
    ValueError("boom"),
    SystemExit(3),
    asyncio.CancelledError(),
    AssertionError(),
    RecursionError("deep"),
    GeneratorExit(),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failing_observer_costs_neither_the_others_nor_the_caller(
    host: PluginHost, error: BaseException
) -> None:
    seen: list[str] = []
    host.register(observer(seen, "a"), "a")
    host.register(plugin(vswa_kv_batch=failing(error)), "b")
    host.register(observer(seen, "c"), "c")
    host.kv_batch(SOURCE, BATCH)

    assert ["a", "c"] == seen
    assert {("b", "vswa_kv_batch"): 1} == host.failures()


def test_ctrl_c_in_a_plugin_stays_ctrl_c(host: PluginHost) -> None:
    host.register(plugin(vswa_kv_batch=failing(KeyboardInterrupt())), "x")
    with pytest.raises(KeyboardInterrupt):
        host.kv_batch(SOURCE, BATCH)


def test_a_coroutine_in_place_of_an_answer_is_a_failure(host: PluginHost) -> None:
    host.register(plugin(vswa_kv_batch=lambda: coroutine(SOURCE, BATCH)), "x")
    host.kv_batch(SOURCE, BATCH)

    assert {("x", "vswa_kv_batch"): 1} == host.failures()


def test_failures_are_all_counted_and_logged_once_per_minute(
    host: PluginHost, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    host.register(plugin(vswa_kv_batch=failing(ValueError("boom"))), "bad")
    for after in (0.0, 1.0, 59.9, 60.0, 61.0):
        clock.now = 1000.0 + after
        host.kv_batch(SOURCE, BATCH)
    lines = [each.getMessage() for each in caplog.records]

    assert {("bad", "vswa_kv_batch"): 5} == host.failures()
    assert 2 == len(lines)
    assert "plugin 'bad' failed in hook 'vswa_kv_batch'" in lines[0]
    assert "failures since the last such line: 3, in all: 4" in lines[1]
    assert caplog.records[0].exc_info is not None


def test_each_plugin_and_hook_has_its_own_line_in_the_log(
    host: PluginHost, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        both = plugin(vswa_kv_batch=failing(ValueError()), vswa_metrics=failing(ValueError()))
        host.register(both, name)
    for _ in range(3):
        host.kv_batch(SOURCE, BATCH)
        host.metrics()

    assert 4 == len(caplog.records)


def test_failures_from_many_threads_are_all_counted(host: PluginHost) -> None:
    host.register(plugin(vswa_kv_batch=failing(ValueError())), "x")

    def run() -> None:
        for _ in range(200):
            host.kv_batch(SOURCE, BATCH)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {("x", "vswa_kv_batch"): 800} == host.failures()


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_loading_never_shows(order: list[str]) -> None:
    seen: list[str] = []
    made = {
        "a": observer(seen, "a"),
        "b": SimpleNamespace(x=hookimpl(lambda: seen.append("b"), specname="vswa_kv_batch", trylast=True)),
        "c": observer(seen, "c"),
        "d": SimpleNamespace(x=hookimpl(lambda: seen.append("d"), specname="vswa_kv_batch", tryfirst=True)),
    }
    with PluginHost() as host:
        for name in order:
            host.register(made[name], name)
            host.register(plugin(vswa_metrics=lambda name=name: f"m_{name} 1\n"), f"m{name}")
        host.kv_batch(SOURCE, BATCH)

        assert ["d", "a", "c", "b"] == seen
        assert "m_a 1\nm_b 1\nm_c 1\nm_d 1\n" == host.metrics()


@pytest.mark.parametrize("hook", ["vswa_kv_stored", "vswa_request_arrived", "vswa_request_finished"])
def test_the_host_says_whether_anybody_implements_a_hook(host: PluginHost, hook: str) -> None:
    before = host.implements(hook)
    host.register(plugin(**{hook: lambda: None}), "x")
    during = host.implements(hook)
    host.close()

    assert [False, True, False] == [before, during, host.implements(hook)]


@pytest.mark.parametrize("hook", ["vswa_score", "vswa_select_worker"])
def test_either_hook_gives_a_say_in_the_choice_of_workers(host: PluginHost, hook: str) -> None:
    host.register(plugin(**{hook: lambda: None}), "x")

    assert host.selection_hooks() is host


@pytest.mark.parametrize(("mode", "told"), [("", False), ("off", False), ("boundary", True)])
def test_a_publisher_names_no_blocks_for_observers_that_are_not_there_or_off(
    tmp_path: Path, mode: str, told: bool
) -> None:
    args = parse(["--model-path", str(tmp_path), "--engine", "standin"])
    plugins = "trtllm_events,dynamo_events" if mode else "trtllm_events"
    with load_host(environ={"VSWA_PLUGINS": plugins, "VSWA_DYNAMO_EVENTS": mode}) as host:
        worker = Worker(args, host, StandinEngine(args.settings), FileRegistry(tmp_path), Life("test"))
        publisher = worker._publisher(1, 0, PublisherOptions(), 0)

        assert told is (publisher._observe_stored is not None)


# -- metrics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["what is this?\nno metric at all {", "a_metric 2\n", b"x 1\n", 7])
def test_metrics_that_would_spoil_the_page_are_left_out(host: PluginHost, text: object) -> None:
    host.register(plugin(vswa_metrics=lambda: "a_metric 1"), "a")
    host.register(plugin(vswa_metrics=lambda: text), "b")
    host.register(plugin(vswa_metrics=lambda: "c_metric 1\n"), "c")
    page = host.metrics()

    assert page.startswith("a_metric 1\nc_metric 1\n# HELP vswa_plugin_failures_total")
    assert 'vswa_plugin_failures_total{plugin="b",hook="vswa_metrics"} 1\n' in page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# TYPE x gauge\nx 1\n# TYPE y gauge\ny 1\n# TYPE x gauge\nx 2\n", "on the page already: x"),
        ('x{a="1"} 1\nx{a="1"} 2\n', "expected each series once"),
        ("own_requests_total 1\n", "own_requests_total"),
        ("# TYPE own_seconds summary\nown_seconds_count 1\n", "own_seconds"),
        ("own_seconds_bucket 1\n", "own_seconds_bucket"),
        ("vswa_plugin_failures_total 1\n", "vswa_plugin_failures_total"),
        ("x" * (1 << 20) + " 1\n", "expected at most 1048576 characters"),
    ],
    ids=["family again", "series again", "untyped", "type", "part", "failures", "long"],
)
def test_a_text_that_repeats_a_name_of_the_page_or_its_own_is_left_out(
    host: PluginHost, text: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    host.register(plugin(vswa_metrics=lambda: text), "b")
    host.register(plugin(vswa_metrics=lambda: "c_metric 1\n"), "c")
    page = host.metrics("# TYPE own_requests_total counter\n# TYPE own_seconds histogram\n")

    assert page.startswith("c_metric 1\n# HELP vswa_plugin_failures_total")
    assert {("b", "vswa_metrics"): 1} == host.failures()
    assert said in caplog.text


def test_samples_of_one_name_need_no_type_line(host: PluginHost) -> None:
    host.register(plugin(vswa_metrics=lambda: 'x{a="1"} 1\nx{a="2"} 2\n'), "b")

    assert 'x{a="1"} 1\nx{a="2"} 2\n' == host.metrics()


def test_on_a_page_failures_are_shown_from_0_on(host: PluginHost) -> None:
    host.register(plugin(vswa_metrics=lambda: None, vswa_kv_batch=lambda: None), "b")
    page = host.metrics("# TYPE own gauge\n")

    for hook in ("vswa_metrics", "vswa_kv_batch"):
        assert f'vswa_plugin_failures_total{{plugin="b",hook="{hook}"}} 0\n' in page
    assert "" == host.metrics()


def test_without_plugins_there_are_no_metrics(host: PluginHost) -> None:
    assert "" == host.metrics()


# -- tracing ----------------------------------------------------------------------------------------


def test_tracing_logs_each_call_but_no_arguments(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with PluginHost(trace=True, clock=clock) as host:
        host.register(plugin(vswa_kv_batch=lambda: None, vswa_metrics=lambda: "secret 1\n"), "x")
        host.register(plugin(vswa_metrics=failing(ValueError("boom"))), "y")
        host.kv_batch(SOURCE, BATCH)
        host.metrics()
    lines = [each.getMessage() for each in caplog.records if "trace:" in each.getMessage()]

    assert [
        "trace: plugin 'x' hook 'vswa_kv_batch' -> NoneType in 0.000 ms",
        "trace: plugin 'x' hook 'vswa_metrics' -> str in 0.000 ms",
        "trace: plugin 'y' hook 'vswa_metrics' -> failed in 0.000 ms",
    ] == lines


# -- the end -----------------------------------------------------------------------------------------


def test_all_plugins_end_though_one_fails_and_get_the_budget(host: PluginHost) -> None:
    seen: list[float] = []
    host.register(plugin(vswa_stopping=failing(SystemExit(3))), "a")
    host.register(plugin(vswa_stopping=lambda budget_s: seen.append(budget_s)), "c")
    host.stopping(30)

    assert [30] == seen
    assert {("a", "vswa_stopping"): 1} == host.failures()


def test_a_plugin_whose_end_hangs_is_named_and_waited_for_no_longer_than_the_budget_and_holds_up_no_other(
    host: PluginHost, caplog: pytest.LogCaptureFixture
) -> None:
    let_go, seen = threading.Event(), []
    host.register(plugin(vswa_stopping=lambda: let_go.wait(30)), "a_hangs")
    host.register(plugin(vswa_stopping=lambda: seen.append("ended")), "b")
    host.stopping(0.2)
    hanging = [thread for thread in threading.enumerate() if thread.name == "stopping a_hangs"]
    let_go.set()

    assert ["ended"] == seen
    assert {("a_hangs", "vswa_stopping"): 1} == host.failures()
    assert "expected an end within 0.2 s" in caplog.text
    assert [True] == [thread.daemon for thread in hanging], "it must not keep the process"


def test_plugins_end_at_the_same_time(host: PluginHost) -> None:
    together = threading.Barrier(2)
    for name in ("a", "b"):
        host.register(plugin(vswa_stopping=lambda: together.wait(10)), name)
    host.stopping(20)

    assert {} == host.failures()
