"""The simulation in short: some schedules of each run, the same twice, and the bugs that it must find."""

from __future__ import annotations

import pytest

from tests.sim.planted import PLANTED, planted
from tests.sim.schedule import Action, Schedule, generate, shrink
from tests.sim.world import Outcome, run_schedule

#: Seeds that once showed a fault, or a gap in the simulation itself.
ONCE_WRONG = (72, 81, 193, 234, 489, 694, 1481, 2384, 101063)
#: The first seed that shows a planted bug; 0 where it is not given.
SHOWN_BY = {
    "any message is a sign of life": 48,
    "a gap is not noticed": 7,
    "a repair ends though ids are missing": 7,
    "epochs far ahead are believed": 1,
    "views stay live while the broker is away": 16,
    "nobody is ever silent": 5,
    "a failed repair is not tried again": 6,
    "the publisher's own end does not correct a promise": 49,
    "a silent rank stays at an epoch that is over": 2384,
}


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_whatever_happens_every_view_ends_right_and_claims_nothing_that_is_gone(first: int) -> None:
    wrong = {
        seed: found for seed in range(first, first + 10) if (found := run_schedule(generate(seed)).wrong)
    }

    assert {} == wrong


@pytest.mark.parametrize("seed", ONCE_WRONG)
def test_what_was_wrong_once_is_right(seed: int) -> None:
    assert () == run_schedule(generate(seed)).wrong


def test_a_seed_is_the_same_schedule_each_time() -> None:
    first, second = (run_schedule(generate(16)) for _ in range(2))

    assert first == second
    assert first.checks > 10


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str) -> None:
    with planted(bug):
        assert _outcome(generate(SHOWN_BY.get(bug, 0))).wrong


def test_a_failing_schedule_shrinks_to_what_matters() -> None:
    with planted("nobody is ever silent"):
        smallest = shrink(generate(5), lambda schedule: bool(_outcome(schedule).wrong))

    assert {"crash"} == {action.kind for action in smallest.actions}


def test_shrinking_leaves_nothing_that_can_go() -> None:
    actions = tuple(Action(float(at), "step", at, 0) for at in range(20))

    def fails(schedule: Schedule) -> bool:
        return {3, 17} <= {action.who for action in schedule.actions}

    assert [3, 17] == [action.who for action in shrink(Schedule(0, 1, 1, 20.0, actions), fails).actions]


def _outcome(schedule: Schedule) -> Outcome:
    """What it came to; an error of a planted bug counts as something wrong."""
    try:
        return run_schedule(schedule)
    except Exception as error:
        return Outcome((repr(error),), 0.0, 0)
