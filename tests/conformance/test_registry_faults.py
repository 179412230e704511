"""The conformance suites of registries fail for a registry with a planted fault, in the check about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.faulty import failures

LIFE = "test_an_entry_is_there_from_join_to_leave"
ORDER = "test_a_watch_tells_what_is_there_then_what_happens_in_order"
NO_CHANGE = "test_joining_again_with_the_same_entry_is_no_change"
UPDATES = "test_an_entry_can_only_be_updated_while_joined_and_keeps_its_key"
KILLED = "test_a_worker_that_is_killed_leaves"
LIVE = "test_a_live_worker_stays_for_longer_than_its_ttl"
DELETED = "test_an_entry_that_somebody_deleted_is_put_again"
OTHERS = "test_the_leaving_of_one_writer_leaves_the_entry_that_another_put_in_its_place"
MIX = "test_a_reader_of_all_changes_holds_the_content_after_any_mix_of_writers"
MANY = "test_many_entries_are_all_reported"
NAMESPACE = "test_a_namespace_is_watched_alone"
MALFORMED = "test_a_malformed_entry_is_left_out_and_logged_once"
ODD = "test_an_entry_that_no_worker_can_have_written_is_left_out"
AFTER_CLOSE = "test_nothing_runs_any_more_after_close"
CLOSING = "test_closing_a_watcher_ends_the_iteration_of_whoever_waits"
AGAIN = "test_a_registry_may_be_used_again_after_close"
AWAY = "test_while_the_registry_is_away_the_last_known_state_stands"
BEGUN_AWAY = "test_a_watch_may_begin_while_the_registry_is_away"
REASON = "test_disconnected_says_where_and_which_setting"
CLOSED_AWAY = "test_nothing_runs_any_more_after_a_close_during_an_outage"
#: Checks that fail do so after their patience, one after the other.
pytestmark = pytest.mark.timeout(180)
#: Class in faulty_registries.py -> the checks that fail for it.
FAULTS = {
    "TestJoinsOnce": {LIFE},
    "TestUpdatesAnything": {UPDATES},
    "TestEachJoinIsNews": {LIFE, NO_CHANGE},
    "TestConnectedBeforeTheContent": {ORDER},
    "TestTheDeadStay": {KILLED},
    "TestNoKeepalive": {LIVE, DELETED},
    "TestLeavesForOthers": {OTHERS},
    "TestLosesChanges": {f"{MIX}[1]", MANY},
    "TestAnyNamespaceThatBeginsSo": {NAMESPACE},
    "TestMalformedEntriesEndTheWatch": {f"{MALFORMED}[cut]"},
    "TestTakesOddEntries": {f"{MALFORMED}[no ranks]", f"{ODD}[component]"},
    "TestLogsEachLook": {f"{MALFORMED}[empty]"},
    "TestAnOutageEmptiesIt": {AWAY},
    "TestEndsWithAnOutage": {AWAY, BEGUN_AWAY},
    "TestSaysNotWhy": {REASON},
    "TestLeavesATask": {AFTER_CLOSE, CLOSED_AWAY},
    "TestBeginsAgainAfterAnOutage": {CLOSED_AWAY},
    "TestLeavesAThread": {AFTER_CLOSE, CLOSED_AWAY},
    "TestClosingEndsNoIteration": {CLOSING},
    "TestOnlyOnce": {AGAIN},
}


def test_a_sound_registry_passes_and_each_planted_fault_fails_the_checks_that_are_about_it(
    tmp_path: Path,
) -> None:
    assert {"TestSound": set(), **FAULTS} == failures("faulty_registries.py", tmp_path, FAULTS)
