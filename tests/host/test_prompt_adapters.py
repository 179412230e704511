"""Adapters of plugins that name blocks by prompts: the host guards each part of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.host.test_guards import BUG, LAYOUT, STORED, raising
from tests.host_helpers import clock as clock
from tests.host_helpers import host as host
from vswa_plugin.engine.contract import with_prompts
from vswa_plugin.errors import PluginFailed
from vswa_plugin.host.host import PluginHost
from vswa_plugin.testing.host import plugin


def prompted(**parts: Any) -> SimpleNamespace:
    """An adapter that names blocks by prompts, with ``parts`` of its own."""
    usual = {
        "feed": lambda raw: [],
        "wants_prompts": True,
        "prompt": lambda *_: None,
        "prepare": lambda: True,
        "settle": lambda: [STORED],
    }
    return SimpleNamespace(**{**usual, **parts})


def test_an_adapter_that_names_blocks_by_prompts_is_given_them(host: PluginHost) -> None:
    given: list[Any] = []
    theirs = prompted(prompt=lambda *prompt: given.append(prompt), prepare=lambda: False)
    host.register(plugin(vswa_event_adapter=lambda: theirs), "theirs")
    adapter = with_prompts(host.event_adapter("x", LAYOUT))
    adapter.prompt([1], "s", None)

    assert [([1], "s", None)] == given
    assert (True, False, [STORED]) == (adapter.wants_prompts, adapter.prepare(), adapter.settle())


def test_an_adapter_that_knows_of_no_prompts_wants_none(host: PluginHost) -> None:
    host.register(plugin(vswa_event_adapter=lambda: SimpleNamespace(feed=lambda raw: [])), "theirs")
    adapter = with_prompts(host.event_adapter("x", LAYOUT))
    adapter.prompt([1], None, None)

    assert (False, True, []) == (adapter.wants_prompts, adapter.prepare(), adapter.settle())


@pytest.mark.parametrize(
    "broken",
    [{"prompt": raising(BUG)}, {"prepare": raising(BUG)}, {"settle": raising(BUG)}, {"settle": lambda: [7]}],
    ids=["prompt", "prepare", "settle", "no events"],
)
def test_what_an_adapter_does_wrong_with_prompts_is_counted_and_named(
    host: PluginHost, broken: dict[str, Any]
) -> None:
    host.register(plugin(vswa_event_adapter=lambda: prompted(**broken)), "theirs")
    adapter = with_prompts(host.event_adapter("x", LAYOUT))
    with pytest.raises(PluginFailed, match="plugin 'theirs' failed in"):
        _ = adapter.prompt([1], None, None), adapter.prepare(), adapter.settle()  # type: ignore[func-returns-value]

    assert {("theirs", "vswa_event_adapter"): 1} == host.failures()
