"""Reuse rules that plugins add: how the host takes them, and the example for chunked attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import RULES, ReuseRule, TrtllmV2, resumable, rule_named
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.host.host import PluginHost

EXAMPLE = Path(__file__).parents[2] / "plugins/examples/chunked_rule.py"
CHUNKED = CacheLayout((CacheGroup(0, 16, 4), CacheGroup(1, None, 4)), "chunked", "m")


@pytest.fixture
def host() -> Iterator[PluginHost]:
    with PluginHost() as host:
        yield host


@pytest.fixture(scope="module")
def chunked() -> Iterator[ReuseRule]:
    with PluginHost() as host:
        host.load_local(str(EXAMPLE))
        yield rule_named("chunked", host.reuse_rules())


def rules_plugin(give: Callable[[], Any]) -> object:
    return SimpleNamespace(vswa_reuse_rules=hookimpl(give, specname="vswa_reuse_rules"))


class Mine(TrtllmV2):
    def __init__(self, name: str) -> None:
        self.name = name


# -- the hook --------------------------------------------------------------------------------------


def test_without_plugins_the_rules_are_the_built_in_ones(host: PluginHost) -> None:
    host.register(rules_plugin(lambda: None), "abstains")

    assert dict(RULES) == host.reuse_rules()


def test_rules_of_all_plugins_are_added_to_the_built_in_ones(host: PluginHost) -> None:
    mine, yours = Mine("mine"), Mine("yours")
    host.register(rules_plugin(lambda: {"yours": yours}), "b")
    host.register(rules_plugin(lambda: {"mine": mine}), "a")

    rules = host.reuse_rules()
    assert dict(RULES) == {name: rules[name] for name in RULES}
    assert {"mine", "yours"} == set(rules) - set(RULES)
    assert ["mine", "yours"] == [rules["mine"].name, rules["yours"].name]
    assert {} == host.failures()
    assert "mine" not in RULES


@pytest.mark.parametrize(("name", "owner"), [("vllm", "vswa-plugin"), ("mine", "a")])
def test_a_name_that_is_taken_costs_that_plugin_its_rules_and_both_owners_are_named(
    host: PluginHost, caplog: pytest.LogCaptureFixture, name: str, owner: str
) -> None:
    first = Mine("mine")
    host.register(rules_plugin(lambda: {"mine": first}), "a")
    host.register(rules_plugin(lambda: {"other": Mine("other"), name: Mine(name)}), "b")
    host.register(rules_plugin(lambda: {"third": Mine("third")}), "c")
    rules = host.reuse_rules()

    assert {*RULES, "mine", "third"} == set(rules)
    assert RULES["vllm"] is rules["vllm"]
    layout = CacheLayout((CacheGroup(0, None, 32),), "mine", "m")
    assert first.boundaries(layout, 100) == rules["mine"].boundaries(layout, 100)
    assert {("b", "vswa_reuse_rules"): 1} == host.failures()
    assert "plugin 'b' failed in hook 'vswa_reuse_rules'" in caplog.text
    assert f"reuse rule {name!r} is there already, from {owner}; choose another name" in caplog.text


def fail() -> None:
    raise RuntimeError("no rules today")


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (fail, "no rules today"),
        (lambda: [Mine("x")], "expected a mapping from names to reuse rules, got list"),
        (lambda: {"x": SimpleNamespace(name="x")}, "got SimpleNamespace without provenance, boundaries"),
        (lambda: {"x": Mine("y")}, "expected a reuse rule under its own name 'y', got it under 'x'"),
        (lambda: {7: Mine("y")}, "got it under 7"),
    ],
)
def test_a_plugin_that_fails_or_gives_no_rules_costs_its_own_only(
    host: PluginHost, caplog: pytest.LogCaptureFixture, give: Callable[[], Any], message: str
) -> None:
    host.register(rules_plugin(give), "a")
    host.register(rules_plugin(lambda: {"mine": Mine("mine")}), "b")

    assert {*RULES, "mine"} == set(host.reuse_rules())
    assert {("a", "vswa_reuse_rules"): 1} == host.failures()
    assert message in caplog.text


# -- the example -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boundary", "first"), [(0, 0), (1, 0), (3, 0), (4, 4), (5, 4), (7, 4), (8, 8), (9, 8)]
)
def test_a_chunk_is_needed_from_its_first_block(chunked: ReuseRule, boundary: int, first: int) -> None:
    """Chunks of 16 tokens, blocks of 4."""
    assert [first, 0] == [chunked.first_needed(group, boundary, 100) for group in CHUNKED.groups]
    assert chunked.needs(CHUNKED, 100) is None


def test_where_no_group_needs_a_block_nothing_is_promised(chunked: ReuseRule) -> None:
    """With chunked layers only, nothing shows at a chunk's edge that the engine knows the prefix."""
    layout = CacheLayout(CHUNKED.groups[:1], "chunked", "m")

    assert 0 == resumable(chunked, layout, {0: []}, 100)
    assert 20 == resumable(chunked, layout, {0: [False] * 4 + [True]}, 100)
