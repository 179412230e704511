from __future__ import annotations

from collections.abc import Sequence

import pytest
import vswa_example_rule as plugin

from vswa_plugin.blocks import CacheGroup, CacheLayout, ReuseRule
from vswa_plugin.testing.host import plugin_host
from vswa_plugin.testing.rules import ReuseRuleConformance


def layout(window: int, block_size: int = 4) -> CacheLayout:
    return CacheLayout((CacheGroup(0, window, block_size), CacheGroup(1, None, block_size)), plugin.NAME, "m")


class TestTheRule(ReuseRuleConformance):
    """What every rule promises, and that the index scores by it."""

    @pytest.fixture
    def rule(self) -> ReuseRule:
        return plugin.ExampleRule()

    @pytest.fixture
    def layouts(self) -> Sequence[CacheLayout]:
        return [layout(8), layout(512, 32)]


def test_a_window_of_two_blocks_needs_the_two_blocks_before_the_boundary() -> None:
    sliding, whole = layout(8).groups

    assert (4, 0) == tuple(plugin.ExampleRule().first_needed(group, 6, 30) for group in (sliding, whole))


def test_the_host_knows_it_by_its_name() -> None:
    with plugin_host(plugin) as host:
        assert plugin.NAME in host.reuse_rules()
