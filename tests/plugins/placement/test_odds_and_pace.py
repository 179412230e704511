"""What placement learns: how likely blocks are requested again, and how fast ranks serve."""

from __future__ import annotations

import pytest
from vswa_plugins.placement.odds import CLASSES, ReuseOdds, age_class
from vswa_plugins.placement.pace import Pace

from vswa_plugin.wire import Rank

A, B = Rank(1), Rank(2)


def test_ages_are_classed_by_two_for_each_doubling() -> None:
    assert [0, 0, 2, 3, 4, 5] == [age_class(age) for age in (0, 1, 2, 3, 4, 6)]
    assert CLASSES - 1 == age_class(1 << 60)


def test_what_comes_again_is_told_from_what_does_not() -> None:
    odds = ReuseOdds(10_000)
    for number in range(1_000):
        odds.seen([number % 4, 1_000 + number])  # four blocks come every fourth time, all others never

    assert odds.chance(2) > 0.4
    assert odds.chance(200) < 0.05


def test_the_chance_follows_what_comes_lately() -> None:
    odds = ReuseOdds(100)
    for number in range(1_000):
        odds.seen([number % 4])
    before = odds.chance(4)
    for number in range(20_000):
        odds.seen([1_000 + number])

    assert odds.chance(4) < 0.1 < before


def test_the_blocks_that_are_remembered_are_bounded() -> None:
    odds = ReuseOdds(50)
    for number in range(500):
        odds.seen([number])

    assert 50 == len(odds)


def served(pace: Pace, rank: Rank, tokens: int, took: float, at: float, key: int) -> float:
    """One request alone on its rank; returns when it is over."""
    pace.sent(key, rank, tokens, at)
    pace.first_token(key, at + took)
    pace.ended(key, at + took + 2.0)
    return at + took + 2.0


def test_the_time_of_a_prompt_and_of_a_token_are_told_apart() -> None:
    pace, now = Pace(), 0.0
    for key in range(60):
        tokens = 100 + 977 * key % 4_000
        now = served(pace, (A, B)[key % 2], tokens, 0.01 + 1e-4 * tokens, now, key)

    assert pytest.approx(0.01, rel=0.05) == pace.line[0]
    assert pytest.approx(1e-4, rel=0.05) == pace.line[1]
    assert pytest.approx(2.0) == pace.hold_s


def test_a_slow_rank_is_found_and_the_speed_of_the_others_is_not_taken_for_it() -> None:
    pace, now = Pace(), 0.0
    for key in range(400):
        tokens = 100 + 977 * key % 4_000
        slower = 3.0 if key % 4 == 0 else 1.0
        now = served(pace, Rank(key % 4), tokens, slower * (0.01 + 1e-4 * tokens), now, key)

    slow, others = pace.compute_s(Rank(0), 2_000), [pace.compute_s(Rank(n), 2_000) for n in (1, 2, 3)]
    assert 2.2 < slow / max(others) < 3.8
    assert pytest.approx(0.21, rel=0.25) == others[0]


def test_what_requests_wait_beyond_the_prompts_before_them_is_learnt() -> None:
    pace, now = Pace(), 0.0
    for key in range(20):
        now = served(pace, A, 1_000, 0.1, now, key)
    for key in range(100, 160, 2):
        pace.sent(key, A, 1_000, now)
        pace.sent(key + 1, A, 1_000, now)
        pace.first_token(key, now + 0.1)
        pace.first_token(key + 1, now + 1.2)  # one second longer than it takes
        pace.ended(key, now + 2)
        now += 2
        pace.ended(key + 1, now)

    assert 0.3 < pace.ranks[A].blocked_s < 0.7  # half of them wait so
    assert 0 == pace.ranks[A].waiting == pace.ranks[B].waiting


def test_a_cancelled_request_waits_no_more_and_nothing_is_learnt_of_it() -> None:
    pace = Pace()
    pace.sent(1, A, 1_000, 0.0)
    line = pace.line
    pace.ended(1, 50.0)
    pace.ended(1, 60.0)
    pace.first_token(1, 70.0)

    assert 0 == pace.ranks[A].waiting
    assert line == pace.line and 0.0 == pace.hold_s


def test_a_rank_that_has_gone_takes_its_requests_along() -> None:
    pace = Pace()
    pace.sent(1, A, 1_000, 0.0)
    pace.forget(A)
    pace.first_token(1, 1.0)

    assert 0 == pace.ranks[A].waiting
