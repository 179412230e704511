"""The conformance suite of reuse rules fails for a rule with a planted fault, in the check of that fault."""

from __future__ import annotations

from pathlib import Path

from tests.conformance.faulty import failures

NAMES = "test_layouts_name_the_rule_and_the_rule_says_where_it_is_from"
BOUNDARIES = "test_boundaries_grow_with_the_prompt_and_stay_within_its_whole_blocks"
TOKENS = "test_cached_tokens_are_within_the_blocks_before_the_boundary_and_leave_one_to_compute"
RISING = "test_cached_tokens_do_not_fall_with_a_deeper_boundary"
FIRST = "test_the_first_needed_block_is_before_the_boundary_or_at_it"
NEEDS = "test_needs_are_the_first_needed_blocks_as_numbers"
STATE = "test_a_rule_answers_the_same_in_any_order_and_from_any_thread"
INDEX = "test_the_index_scores_what_the_brute_force_over_all_boundaries_finds"
MORE = "test_more_blocks_held_never_promise_less"
MALFORMED = "test_layouts_that_do_not_pass_the_layout_check_are_refused"
REFUSED = "test_layouts_that_the_author_names_are_refused"
ANY = "test_any_layout_is_served_or_refused_with_a_config_error"
WALK = "test_the_rule_says_in_whole_blocks_what_the_engines_walk_reuses"


#: Class in faulty_rules.py -> the checks that fail for it.
FAULTS = {
    "TestOfAnotherName": {NAMES},
    "TestOfUnknownProvenance": {NAMES},
    "TestPastTheEnd": {BOUNDARIES, TOKENS},
    "TestFewerForLonger": {BOUNDARIES},
    "TestNothingLeftToCompute": {TOKENS},
    "TestFallingTokens": {RISING, MORE},
    "TestBeforeTheStart": {FIRST},
    "TestNumbersOfAnotherRule": {NEEDS, INDEX},
    "TestCounting": {STATE},
    "TestAcceptsAnything": {MALFORMED, REFUSED},
    "TestFailsOtherwise": {ANY},
    "TestOneBlockTooFew": {WALK},
}


def test_a_sound_rule_passes_and_each_planted_fault_fails_the_checks_that_are_about_it(
    tmp_path: Path,
) -> None:
    assert {"TestSound": set(), **FAULTS} == failures("faulty_rules.py", tmp_path, FAULTS)
