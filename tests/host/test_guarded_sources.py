"""A plugin's source of events for the relay: what it raises is its own failure, and ends that source."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.host.test_guards import BUG, INFO, raising
from tests.host_helpers import clock as clock
from tests.host_helpers import host as host
from vswa_plugin.engine import EventSource, SourceSettings, SourceState
from vswa_plugin.errors import ConfigError, PluginError, PluginFailed
from vswa_plugin.host.host import PluginHost
from vswa_plugin.testing.host import plugin

SETTINGS = SourceSettings("mine", "agg", "/m", "m", "tcp://h:1")
PARTS: dict[str, Any] = {
    "event_format": "x",
    "caveats": ("one",),
    "info": INFO,
    "start": lambda on_events, on_change: on_change(),
    "state": lambda: SourceState(connected=True),
    "stats": lambda: {"events": 3},
    "stop": lambda: None,
}


def source(host: PluginHost, **parts: Any) -> EventSource:
    made = SimpleNamespace(**{**PARTS, **parts})
    host.register(plugin(vswa_event_source=lambda settings: made), "theirs")
    return host.event_source(SETTINGS)


def test_a_source_answers_as_it_does(host: PluginHost) -> None:
    changes: list[int] = []
    guarded = source(host)
    guarded.start(lambda rank, events: None, lambda: changes.append(1))
    guarded.stop()

    assert ("x", ("one",), INFO) == (guarded.event_format, guarded.caveats, guarded.info)
    assert (SourceState(connected=True), {"events": 3}, [1]) == (guarded.state(), guarded.stats(), changes)
    assert {} == host.failures()


@pytest.mark.parametrize("state", [raising(BUG), lambda: None, lambda: "ready"])
def test_one_that_does_not_say_how_far_it_is_has_ended(host: PluginHost, state: Any) -> None:
    ended = source(host, state=state).state().ended

    assert ended is not None and ended.startswith("plugin 'theirs' failed in")
    assert 1 == sum(host.failures().values())


@pytest.mark.parametrize("stats", [raising(BUG), lambda: 3, lambda: {"events": "many"}])
def test_counts_that_cannot_be_used_are_none(host: PluginHost, stats: Any) -> None:
    assert {} == source(host, stats=stats).stats()
    assert 1 == sum(host.failures().values())


def test_an_end_that_fails_is_an_end(host: PluginHost) -> None:
    source(host, stop=raising(BUG)).stop()

    assert 1 == sum(host.failures().values())


def test_a_start_that_fails_is_named(host: PluginHost) -> None:
    with pytest.raises(PluginFailed, match="plugin 'theirs' failed in"):
        source(host, start=raising(BUG)).start(lambda rank, events: None, lambda: None)


def test_an_info_that_is_none_is_named(host: PluginHost) -> None:
    guarded = source(host, info=3)

    with pytest.raises(PluginFailed, match="expected an EngineInfo, got int"):
        _ = guarded.info


def test_what_lacks_a_part_is_no_source(host: PluginHost) -> None:
    made = SimpleNamespace(**{key: value for key, value in PARTS.items() if key != "stop"})
    host.register(plugin(vswa_event_source=lambda settings: made), "theirs")

    with pytest.raises(PluginError, match=r"got 'mine': no plugin reads .* without stop"):
        host.event_source(SETTINGS)


def test_a_setting_that_a_plugin_refuses_is_shown_unchanged(host: PluginHost) -> None:
    host.register(
        plugin(vswa_event_source=lambda settings: raising(ConfigError("no such address"))()), "theirs"
    )

    with pytest.raises(ConfigError, match=r"^no such address$"):
        host.event_source(SETTINGS)
    assert {} == host.failures()
