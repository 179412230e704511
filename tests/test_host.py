from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswa_plugin.engine import EngineSettings
from vswa_plugin.errors import ConfigError, PluginError
from vswa_plugin.events import VERSION, Batch, Source
from vswa_plugin.hookspecs import NAME, hookimpl
from vswa_plugin.host import PluginHost, load_host
from vswa_plugin.layout import CacheGroup, CacheLayout

SOURCE = Source("dynamo", "backend", 1, 0)
BATCH = Batch(VERSION, 1, 0, 0, [])
LAYOUT = CacheLayout((CacheGroup(0, None, 32),), "trtllm_v2", "m")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def host(clock: Clock) -> Iterator[PluginHost]:
    with PluginHost(clock=clock) as host:
        yield host


def plugin(**hooks: Callable[..., Any]) -> object:
    """An object that implements each given hook."""
    return SimpleNamespace(**{name: hookimpl(function, specname=name) for name, function in hooks.items()})


def observer(seen: list[str], name: str) -> object:
    return plugin(vswa_kv_batch=lambda batch: seen.append(name))


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def settings(engine: str) -> EngineSettings:
    return EngineSettings(engine=engine, mode="agg", model_path="/m", served_model_name="m")


def engine(**missing: None) -> SimpleNamespace:
    parts = ("event_format", "info", "start", "stop", "generate", "stats", "failure")
    return SimpleNamespace(**{part: part for part in parts if part not in missing})


def state(host: PluginHost) -> object:
    """All that a registration could leave behind."""
    manager = host._manager
    relay = {
        name: [impl.function for impl in call.get_hookimpls()] for name, call in vars(manager.hook).items()
    }
    return (
        manager.list_name_plugin(),
        relay,
        dict(host._calls),
        host.plugins(),
        host.failures(),
        set(sys.modules),
    )


# -- refusals ----------------------------------------------------------------------------------------


async def coroutine(source: Source, batch: Batch) -> None: ...


async def async_generator(batch: Batch) -> Any:
    yield


def generator(batch: Batch) -> Any:
    yield


def positional(*args: object) -> None: ...


def keyword_only(source: Source, *, batch: Batch) -> None: ...


def with_default(source: Source, batch: Batch | None = None) -> None: ...


def unknown_argument(source: Source, batches: Batch) -> None: ...


class Raises:
    @hookimpl
    def vswa_kv_batch(self, batch: Batch) -> None: ...

    def __dir__(self) -> list[str]:
        raise RuntimeError("no listing")


class Callable_:
    def __call__(self, batch: Batch) -> None: ...


def vswa_kv_batch(batch: Batch) -> None: ...


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "misspelt": (
        lambda: plugin(vswa_kv_bacth=lambda: None),
        "did you mean 'vswa_kv_batch'? Known: vswa_engine,",
    ),
    "unlike any": (
        lambda: plugin(zzz=lambda: None),
        "implements 'zzz', which is no hook: Known: vswa_engine,",
    ),
    "async": (lambda: plugin(vswa_kv_batch=coroutine), "got an async one; hooks are synchronous"),
    "async generator": (lambda: plugin(vswa_kv_batch=async_generator), "got an async one"),
    "generator": (lambda: plugin(vswa_kv_batch=generator), "got a generator"),
    "wrapper": (
        lambda: SimpleNamespace(vswa_kv_batch=hookimpl(generator, wrapper=True, specname="vswa_kv_batch")),
        "wrappers are not supported",
    ),
    "old wrapper": (
        lambda: SimpleNamespace(
            vswa_kv_batch=hookimpl(generator, hookwrapper=True, specname="vswa_kv_batch")
        ),
        "wrappers are not supported",
    ),
    "unknown argument": (
        lambda: plugin(vswa_kv_batch=unknown_argument),
        "expected arguments out of (source, batch), passed by name, got 'batches'; did you mean 'batch'?",
    ),
    "positional": (lambda: plugin(vswa_kv_batch=positional), "got *args"),
    "keyword only": (lambda: plugin(vswa_kv_batch=keyword_only), "got batch: 'Batch'"),
    "default": (
        lambda: plugin(vswa_kv_batch=with_default),
        "'batch' has a default and would never be passed",
    ),
    "forgotten mark": (lambda: SimpleNamespace(vswa_kv_batch=vswa_kv_batch), "write @hookimpl above it"),
    "no function": (
        lambda: SimpleNamespace(vswa_kv_batch=hookimpl(Callable_())),  # type: ignore[type-var]
        "expected a plain function, got Callable_",
    ),
    "no hook": (lambda: SimpleNamespace(x=1), "implements no hook"),
    "cannot be listed": (lambda: Raises(), "cannot be examined: RuntimeError: no listing"),
    "one good hook, one bad": (
        lambda: plugin(vswa_metrics=lambda: "", vswa_kv_batch=coroutine),
        "plugin 'bad', hook 'vswa_kv_batch'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_plugin_leaves_no_trace_and_the_message_helps(host: PluginHost, case: str) -> None:
    make, message = REFUSED[case]
    host.register(plugin(vswa_metrics=lambda: None), "good")
    before = state(host)
    with pytest.raises(PluginError) as caught:
        host.register(make(), "bad")

    assert message in str(caught.value)
    assert "'bad'" in str(caught.value)
    assert before == state(host)
    host.register(plugin(vswa_metrics=lambda: None), "bad")  # the name is free


@pytest.mark.parametrize("name", ["", "a,b", "a b", "-x", "a\n"])
def test_a_name_that_could_not_be_switched_off_is_refused(host: PluginHost, name: str) -> None:
    before = state(host)
    with pytest.raises(PluginError, match="expected a plugin name"):
        host.register(plugin(vswa_metrics=lambda: None), name)

    assert before == state(host)


def test_a_name_is_taken_once_and_both_sources_are_named(host: PluginHost) -> None:
    host.register(plugin(vswa_metrics=lambda: None), "x", source="first package")
    before = state(host)
    with pytest.raises(PluginError, match=r"named 'x': one from first package, one from second package"):
        host.register(plugin(vswa_metrics=lambda: None), "x", source="second package")

    assert before == state(host)


def test_one_object_is_registered_once(host: PluginHost) -> None:
    same = plugin(vswa_metrics=lambda: None)
    host.register(same, "x")
    before = state(host)
    with pytest.raises(PluginError, match="loaded already, under the name 'x'"):
        host.register(same, "y")

    assert before == state(host)


def test_an_optional_hook_that_the_host_does_not_know_is_accepted(host: PluginHost) -> None:
    both = plugin(vswa_metrics=lambda: None)
    both.later = hookimpl(lambda: None, specname="vswa_of_next_year", optionalhook=True)  # type: ignore[attr-defined]
    host.register(both, "x")

    assert ("vswa_metrics",) == host.plugins()[0].hooks


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
    assert "failures since this was last said: 3, in all: 4" in lines[1]
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


# -- engines and adapters ----------------------------------------------------------------------------


def test_the_first_plugin_that_knows_the_engine_answers(host: PluginHost) -> None:
    made = engine()
    host.register(plugin(vswa_engine=lambda settings: None), "a")
    host.register(plugin(vswa_engine=lambda settings: made if settings.engine == "mine" else None), "b")
    host.register(plugin(vswa_engine=failing(ValueError("never asked"))), "c")

    assert host.engine(settings("mine")) is made
    assert {} == host.failures()


def test_a_config_error_of_an_engine_is_the_users_answer(host: PluginHost) -> None:
    error = ConfigError("expected a tokenizer.json in /m")
    host.register(plugin(vswa_engine=failing(error)), "a")
    host.register(plugin(vswa_engine=lambda: engine()), "b")
    with pytest.raises(ConfigError) as caught:
        host.engine(settings("mine"))

    assert error is caught.value
    assert {} == host.failures()


def test_another_plugins_crash_does_not_cost_the_engine(host: PluginHost) -> None:
    made = engine()
    host.register(plugin(vswa_engine=failing(RuntimeError("boom"))), "a")
    host.register(plugin(vswa_engine=lambda: made), "b")

    assert host.engine(settings("mine")) is made
    assert {("a", "vswa_engine"): 1} == host.failures()


def test_a_crash_of_the_engines_own_plugin_is_named(host: PluginHost) -> None:
    crash = failing(RuntimeError("boom"))
    host.register(plugin(vswa_engine=crash, vswa_engine_names=lambda: ["mine"]), "a")
    with pytest.raises(
        PluginError, match=r"engine 'mine' cannot be used \(plugin 'a' failed: RuntimeError: boom\)"
    ):
        host.engine(settings("mine"))


def test_an_unknown_engine_lists_the_known_ones_and_the_absent_plugins() -> None:
    with PluginHost(disabled=["off"]) as host:
        host.register(plugin(vswa_engine_names=lambda: ["gemma3_cpu", "b"]), "x")
        host.register(plugin(vswa_engine_names=lambda: ["a"]), "y")
        host.register(plugin(vswa_engine_names=failing(ValueError())), "z")
        host.register(plugin(vswa_engine_names=lambda: "abc"), "w")
        host.register(plugin(vswa_engine_names=lambda: ["hidden"]), "off")
        with pytest.raises(ConfigError) as caught:
            host.engine(settings("gemma_cpu"))

    assert (
        "unknown engine 'gemma_cpu': did you mean 'gemma3_cpu'? Known: a, b, gemma3_cpu "
        "(plugin 'off' is disabled: switched off by name)"
    ) == str(caught.value)


def test_an_engine_of_the_wrong_shape_is_a_failure_that_says_what_lacks(host: PluginHost) -> None:
    host.register(plugin(vswa_engine=lambda: engine(stop=None, stats=None)), "x")
    with pytest.raises(ConfigError, match="got SimpleNamespace without stop, stats"):
        host.engine(settings("mine"))

    assert {("x", "vswa_engine"): 1} == host.failures()


def test_an_engine_that_takes_too_long_to_build_is_named(
    host: PluginHost, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def slow() -> object:
        clock.now += 2.5
        return engine()

    host.register(plugin(vswa_engine=slow), "x")
    host.engine(settings("mine"))

    assert "plugin 'x' took 2.5 s in vswa_engine" in caplog.text


def test_an_adapter_comes_from_the_plugin_that_reads_the_format(host: PluginHost) -> None:
    adapter = SimpleNamespace(feed=lambda raw: [])
    host.register(plugin(vswa_event_adapter=lambda event_format: None), "a")
    host.register(plugin(vswa_event_adapter=lambda event_format, layout: adapter), "b")

    assert host.event_adapter("trtllm", LAYOUT) is adapter


def test_a_format_that_nobody_reads_says_who_failed(host: PluginHost) -> None:
    host.register(plugin(vswa_event_adapter=lambda: 3), "a")
    host.register(plugin(vswa_event_adapter=failing(ConfigError("bad layout"))), "b")
    with pytest.raises(PluginError) as caught:
        host.event_adapter("x", LAYOUT)

    assert "no plugin reads KV events of the format 'x'" in str(caught.value)
    assert "plugin 'a' failed: TypeError: expected an object with the shape of" in str(caught.value)
    assert "plugin 'b' failed: ConfigError: bad layout" in str(caught.value)


# -- metrics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["what is this?\nno metric at all {", "a_metric 2\n", b"x 1\n", 7])
def test_metrics_that_would_spoil_the_page_are_left_out(host: PluginHost, text: object) -> None:
    host.register(plugin(vswa_metrics=lambda: "a_metric 1"), "a")
    host.register(plugin(vswa_metrics=lambda: text), "b")
    host.register(plugin(vswa_metrics=lambda: "c_metric 1\n"), "c")
    page = host.metrics()

    assert page.startswith("a_metric 1\nc_metric 1\n# HELP vswa_plugin_failures_total")
    assert 'vswa_plugin_failures_total{plugin="b",hook="vswa_metrics"} 1\n' in page


def test_without_plugins_there_are_no_metrics(host: PluginHost) -> None:
    assert "" == host.metrics()


# -- where plugins come from -------------------------------------------------------------------------

OBSERVER = (
    "from vswa_plugin.hookspecs import hookimpl\n@hookimpl\ndef vswa_metrics():\n    return 'from_{} 1'\n"
)
Install = Callable[..., None]
_serial = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package, as pip would leave it, with one module and an entry point."""
    before = set(sys.modules)

    def make(name: str, code: str, entry: str | None = None, entry_points: str | None = None) -> None:
        site = tmp_path / f"site{next(_serial)}"
        info = site / f"{name}_dist-1.5.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.5\n")
        listed = entry_points or f"[{NAME}]\n{name} = {entry or name}\n"
        (info / "entry_points.txt").write_text(listed)
        monkeypatch.syspath_prepend(str(site))

    yield make
    for module in set(sys.modules) - before:
        if module.startswith("third_party_"):
            del sys.modules[module]


def status_of(host: PluginHost, name: str) -> tuple[str, str]:
    return next((each.state, each.reason) for each in host.plugins() if each.name == name)


BROKEN = {
    "import error": ("import no_such_module", None, "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax error": ("def (", None, "SyntaxError"),
    "raises": ("raise ValueError('boom')", None, "ValueError: boom"),
    "exits": ("raise SystemExit(0)", None, "SystemExit: 0"),
    "no module": ("", "third_party_nowhere", "ModuleNotFoundError"),
    "no attribute": ("", "third_party_bad:plugin", "AttributeError"),
    "malformed": ("", "!!", "cannot import !!"),
    "misspelt hook": (OBSERVER.replace("vswa_metrics", "vswa_metric"), None, "did you mean 'vswa_metrics'?"),
    "none": ("plugin = None", "third_party_bad:plugin", "implements no hook"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_listed_with_its_reason_and_costs_no_other(
    install: Install, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    code, entry, reason = BROKEN[case]
    install("third_party_bad", code, entry)
    install("third_party_good", OBSERVER.format("good"))
    with load_host(environ={}) as host:
        assert ("loaded", "") == status_of(host, "third_party_good")
        assert "from_good 1\n" in host.metrics()
        state, said = status_of(host, "third_party_bad")

    assert "failed" == state
    assert reason in said
    assert "plugin 'third_party_bad' from third_party_bad-dist" in caplog.text


def test_a_package_with_an_unreadable_list_costs_no_other(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("third_party_bad", "", entry_points=f"[{NAME}]\nneither name nor value\n")
    for _ in range(2):  # found twice on sys.path, as with a working copy and an installed one
        install("third_party_good", OBSERVER.format("good"))
    with load_host(environ={}) as host:
        names = [each.name for each in host.plugins()]

        assert ("loaded", "") == status_of(host, "third_party_good")
        assert "prometheus" in names
        assert sorted(set(names)) == names
    assert "third_party_bad_dist-1.5.dist-info: unreadable entry points" in caplog.text


def test_the_second_of_two_packages_with_one_name_is_refused(install: Install) -> None:
    for name in ("third_party_one", "third_party_two"):
        install(name, OBSERVER.format(name), entry_points=f"[{NAME}]\nshared = {name}\n")
    with load_host(environ={}) as host:
        both = [each for each in host.plugins() if each.name == "shared"]

    assert [
        ("third_party_one-dist (third_party_one)", "loaded"),
        ("third_party_two-dist (third_party_two)", "failed"),
    ] == [(each.source, each.state) for each in both]
    assert "two plugins are named 'shared'" in both[1].reason


def test_the_list_says_name_version_hooks_and_where_from(install: Install) -> None:
    install("third_party_good", OBSERVER.format("good"))
    with load_host(environ={}) as host:
        line = next(each for each in host.plugins() if each.name == "third_party_good")

    assert ("1.5", ("vswa_metrics",), "third_party_good-dist (third_party_good)", "loaded") == (
        line.version,
        line.hooks,
        line.source,
        line.state,
    )


def test_a_plugin_that_is_switched_off_is_not_even_imported(install: Install) -> None:
    install("third_party_bad", "raise ValueError('imported')")
    for off in (
        {"no_plugin": ["third_party_bad"]},
        {"environ": {"VSWA_PLUGINS_DISABLED": " third_party_bad ,"}},
    ):
        with load_host(**({"environ": {}} | off)) as host:  # type: ignore[arg-type]
            assert ("disabled", "switched off by name") == status_of(host, "third_party_bad")
    assert "third_party_bad" not in sys.modules


def test_only_the_plugins_that_were_chosen_are_loaded(install: Install) -> None:
    install("third_party_good", OBSERVER.format("good"))
    install("third_party_other", OBSERVER.format("other"))
    with load_host(environ={"VSWA_PLUGINS": "third_party_good"}) as host:
        loaded = [each.name for each in host.plugins() if each.state == "loaded"]

        assert ["third_party_good"] == loaded
        assert ("disabled", "not named in VSWA_PLUGINS") == status_of(host, "third_party_other")
    with load_host(environ={"VSWA_PLUGINS": ""}) as host:
        assert {"disabled"} == {each.state for each in host.plugins()}


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("--no-plugin", {"no_plugin": ["prometheos"]}),
        ("VSWA_PLUGINS_DISABLED", {"environ": {"VSWA_PLUGINS_DISABLED": "prometheos"}}),
        ("VSWA_PLUGINS", {"environ": {"VSWA_PLUGINS": "gemma3_cpu,prometheos"}}),
    ],
)
def test_an_unknown_name_lists_the_known_ones(where: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_host(**({"environ": {}} | arguments))

    assert (
        f"{where}: unknown plugin 'prometheos': did you mean 'prometheus'? Known: gemma3_cpu, prometheus"
        in str(caught.value)
    )


def local_file(tmp_path: Path, code: str, name: str = "mine.py") -> str:
    path = tmp_path / name
    path.write_text(code)
    return str(path)


def test_a_local_file_is_loaded_even_where_only_some_packages_are(tmp_path: Path) -> None:
    where = local_file(tmp_path, OBSERVER.format("file"))
    with load_host([where], environ={"VSWA_PLUGINS": ""}) as host:
        assert ("loaded", "") == status_of(host, "mine")
        assert "from_file 1\n" == host.metrics()


def test_a_local_file_can_be_switched_off_by_its_name(tmp_path: Path) -> None:
    where = local_file(tmp_path, "raise ValueError('imported')")
    with load_host([where], ["mine"], environ={"VSWA_PLUGINS": ""}) as host:
        assert "disabled" == status_of(host, "mine")[0]


def test_a_dotted_module_is_loaded(install: Install) -> None:
    install("third_party_module", OBSERVER.format("module"), entry_points="[other]\nx = y\n")
    with load_host(["third_party_module"], environ={"VSWA_PLUGINS": ""}) as host:
        assert "from_module 1\n" == host.metrics()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", "cannot import this file: ModuleNotFoundError"),
        ("def (", "cannot import this file: SyntaxError"),
        ("raise SystemExit(1)", "cannot import this file: SystemExit: 1"),
        ("x = 1", "plugin 'mine' implements no hook"),
    ],
)
def test_a_local_file_that_cannot_be_used_is_an_error_and_leaves_no_trace(
    host: PluginHost, tmp_path: Path, code: str, message: str
) -> None:
    where = local_file(tmp_path, code)
    before = state(host)
    with pytest.raises(PluginError, match=message):
        host.load_local(where)

    assert before == state(host)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("./nowhere.py", "expected a Python file, found none at"),
        ("no.such.module", "for a file give its path, ending in .py"),
        ("..", "cannot import this module"),
        ("", "cannot import this module"),
    ],
)
def test_a_local_plugin_that_is_not_there_says_what_was_looked_for(
    host: PluginHost, where: str, message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        host.load_local(where)


def test_after_close_no_plugin_is_called_and_no_file_stays_imported(tmp_path: Path) -> None:
    before = set(sys.modules)
    host = PluginHost()
    host.load_local(local_file(tmp_path, OBSERVER.format("file")))
    host.close()
    host.close()

    assert "" == host.metrics()
    assert [] == host.plugins()
    assert {name for name in set(sys.modules) - before if "local" in name} == set()


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
