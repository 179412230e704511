"""Which plugin's engine or event adapter is taken, and what is said where none is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.host_helpers import LAYOUT, Clock, engine, failing, settings
from tests.host_helpers import clock as clock
from tests.host_helpers import host as host
from vswa_plugin.engine.contract import EngineSettings, EventsLost
from vswa_plugin.errors import ConfigError, PluginError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.testing.host import plugin


def test_the_first_plugin_that_knows_the_engine_answers(host: PluginHost) -> None:
    made = engine()
    host.register(plugin(vswa_engine=lambda settings: None), "a")
    host.register(plugin(vswa_engine=lambda settings: made if settings.engine == "mine" else None), "b")
    host.register(plugin(vswa_engine=failing(ValueError("never asked"))), "c")

    assert host.engine(settings("mine")).info is made.info
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

    assert host.engine(settings("mine")).info is made.info
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


def test_where_nobody_names_an_engine_and_no_plugin_has_a_default_the_known_ones_are_said(
    host: PluginHost,
) -> None:
    def named(settings: EngineSettings) -> object | None:
        return engine() if settings.engine == "mine" else None

    host.register(plugin(vswa_engine=named, vswa_engine_names=lambda: ["mine"]), "a")
    with pytest.raises(
        ConfigError, match=r"^--engine: expected the name of an engine, got none.*known: mine$"
    ):
        host.engine(settings(""))


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
    event = EventsLost(7, 9)
    adapter = SimpleNamespace(feed=lambda raw: [event])
    host.register(plugin(vswa_event_adapter=lambda event_format: None), "a")
    host.register(plugin(vswa_event_adapter=lambda event_format, layout: adapter), "b")

    assert [event] == host.event_adapter("trtllm", LAYOUT).feed({})


def test_a_format_that_nobody_reads_says_who_failed(host: PluginHost) -> None:
    host.register(plugin(vswa_event_adapter=lambda: 3), "a")
    host.register(plugin(vswa_event_adapter=failing(ConfigError("bad layout"))), "b")
    with pytest.raises(PluginError) as caught:
        host.event_adapter("x", LAYOUT)

    assert "no plugin reads KV events of the format 'x'" in str(caught.value)
    assert "plugin 'a' failed: TypeError: expected an object with the shape of" in str(caught.value)
    assert "plugin 'b' failed: ConfigError: bad layout" in str(caught.value)
