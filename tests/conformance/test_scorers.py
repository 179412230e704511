"""Every first-party scorer passes the conformance suite of scorers, and one with a planted fault fails it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from vswa_plugins.dynamo_events.scorer import BoundaryProjection

from tests.conformance.faulty import failures
from vswa_plugin.accuracy.scorers import built_in_scorers
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.reuse import RULES
from vswa_plugin.testing.scorers import NewScorer, ScorerConformance, scorer_layouts

OWN = "test_each_scorer_is_an_object_of_its_own_that_knows_nothing_of_others"
RANGE = "test_predictions_are_within_the_prompt_in_any_order_of_a_replay"
SHORT = "test_prompts_without_a_whole_block_are_predicted_as_well"
NOTHING = "test_nothing_is_promised_where_nothing_is_resident"
UNKNOWN = "test_removals_of_what_was_never_stored_change_nothing"
#: Class in faulty_scorers.py -> the checks that fail for it.
FAULTS = {
    "TestNamedAfterTheLayout": {"test_a_scorer_has_one_name_that_reports_can_show"},
    "TestShared": {OWN},
    "TestSharedMemory": {OWN},
    "TestPastThePrompt": {RANGE},
    "TestWholeBlocksOnly": {SHORT},
    "TestDeafToBegin": {NOTHING},
    "TestDeafToClear": {NOTHING},
    "TestOneGroupIsNotCleared": {NOTHING},
    "TestDeafToRemovals": {NOTHING},
    "TestKeepsItsLayout": {"test_an_engine_may_begin_again_with_another_layout"},
    "TestFailsAtUnknownRemovals": {UNKNOWN},
    "TestForgetsAtUnknownRemovals": {UNKNOWN},
    "TestFailsAtMoves": {RANGE},
    "TestFailsAtPartialBlocks": {RANGE},
}


@pytest.mark.parametrize("rule", ["trtllm_v2", "vllm"])
class TestBuiltInScorers(ScorerConformance):
    @pytest.fixture
    def layouts(self, rule: str) -> Sequence[CacheLayout]:
        return scorer_layouts(rule)

    @pytest.fixture(params=range(len(built_in_scorers())), ids=[each.name for each in built_in_scorers()])
    def new_scorer(self, request: pytest.FixtureRequest) -> NewScorer:
        return lambda layout: built_in_scorers()[request.param]


class TestBoundaryProjection(ScorerConformance):
    @pytest.fixture
    def new_scorer(self) -> NewScorer:
        return lambda layout: BoundaryProjection(layout, RULES)


def test_a_sound_scorer_passes_and_each_planted_fault_fails_the_checks_that_are_about_it(
    tmp_path: Path,
) -> None:
    assert {"TestSound": set(), **FAULTS} == failures("faulty_scorers.py", tmp_path, FAULTS)
