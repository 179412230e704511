from __future__ import annotations

import pytest
import vswa_example_scorer as plugin

from vswa_plugin.blocks import RULES, CacheGroup, CacheLayout
from vswa_plugin.testing.host import plugin_host
from vswa_plugin.testing.scorers import NewScorer, ScorerConformance, ScorerReplay

LAYOUT = CacheLayout((CacheGroup(0, 8, 4), CacheGroup(1, None, 4)), "trtllm_v2", "m")


class TestTheScorer(ScorerConformance):
    """What every scorer promises, over random replays."""

    @pytest.fixture
    def new_scorer(self) -> NewScorer:
        return lambda layout: plugin.ExampleScorer()


def test_a_hole_in_the_narrowest_window_ends_the_promise() -> None:
    replay, prompt = ScorerReplay(plugin.ExampleScorer(), LAYOUT), list(range(17))
    replay.store(1, prompt)
    assert 0 == replay.predict(prompt)

    replay.store(0, prompt)
    replay.remove(0, 2)
    assert 8 == replay.predict(prompt)


def test_a_replay_gets_it_from_the_host() -> None:
    with plugin_host(plugin) as host:
        assert ["example"] == [scorer.name for scorer in host.accuracy_scorers(LAYOUT, RULES)]
