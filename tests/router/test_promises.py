"""Predicted against actual: counters, histogram, and the line about a systematic error."""

from __future__ import annotations

import logging

import pytest

from vswa_plugin.router.promises import BOUNDS, Outcome, Promises
from vswa_plugin.wire.events import Rank

A, B = Rank(0xA), Rank(0xA, 1)


def outcome(predicted: int, actual: int, rank: Rank = A, *, live: bool = True, busy: bool = False) -> Outcome:
    return Outcome(rank, 32, predicted * 32, actual * 32, live, busy)


def test_counts_are_in_whole_blocks_and_tokens_are_kept_beside() -> None:
    promises = Promises()
    for predicted, actual in ((100, 96), (127, 96), (128, 96), (64, 96), (96, 100)):
        promises.record(Outcome(A, 32, predicted, actual))
    promises.unreported(B)

    counts = promises.ranks[A]
    assert (counts.exact, counts.over, counts.under) == (3, 1, 1)
    assert (counts.predicted_tokens, counts.actual_tokens) == (515, 484)
    assert promises.ranks[B].unreported == 1


@pytest.mark.parametrize(
    ("error", "direction", "bound"),
    [(1, "over", 1), (2, "over", 2), (3, "over", 4), (-1, "under", 1), (-5, "under", 8), (-70, "under", 128)],
)
def test_each_error_falls_into_the_bucket_of_the_next_bound(error: int, direction: str, bound: int) -> None:
    promises = Promises()
    promises.record(outcome(100 + error, 100))

    assert [("", direction)] == list(promises.errors)
    assert promises.errors["", direction].counts[BOUNDS.index(bound)] == 1


def test_errors_above_all_bounds_are_counted_too_and_right_ones_are_none() -> None:
    promises = Promises()
    promises.record(outcome(300, 100))
    promises.record(outcome(100, 100))

    assert (1, 200) == (promises.errors["", "over"].counts[-1], promises.errors["", "over"].sum)
    assert promises.errors["", "over"].count == 1


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (outcome(9, 3, busy=True), "eviction between choice and admission"),
        (outcome(9, 3), "rule mismatch: the worker was idle"),
        (outcome(3, 9), "unpublished blocks"),
        (outcome(9, 3, live=False, busy=True), "lag"),
    ],
)
def test_a_systematic_error_is_said_once_with_its_likely_cause(
    wrong: Outcome, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    promises = Promises()
    with caplog.at_level(logging.INFO):
        for number in range(40):
            promises.record(wrong if number % 3 == 0 else outcome(5, 5))

    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("worker 10: 8 of its last 22 predictions were wrong")
    assert cause in line
    assert promises.systematic(0xA)


def test_few_requests_and_few_errors_are_no_verdict(caplog: pytest.LogCaptureFixture) -> None:
    promises = Promises()
    for _ in range(19):
        promises.record(outcome(9, 3))
    for number in range(200):
        promises.record(outcome(9 if number % 5 == 4 else 3, 3, Rank(0xB)))

    assert not caplog.records


def test_what_others_were_computing_meanwhile_is_counted_and_not_judged() -> None:
    promises = Promises()
    for _ in range(40):
        promises.record(Outcome(A, 32, 0, 320, in_flight=True))

    assert promises.ranks[A].under == 40
    assert not promises.systematic(0xA)


def test_a_worker_that_is_right_again_is_said_so_and_can_be_told_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    promises = Promises()
    with caplog.at_level(logging.INFO):
        for turn in (outcome(9, 3), outcome(5, 5), outcome(9, 3)):
            for _ in range(100):
                promises.record(turn)

    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", "WARNING"]
    assert "right again" in caplog.records[1].getMessage()


def test_a_worker_that_has_gone_is_forgotten() -> None:
    promises = Promises()
    for _ in range(30):
        promises.record(outcome(9, 3))
        promises.record(outcome(9, 3, Rank(0xB)))
    promises.record(Outcome(A, 32, 64, 32, model="m"))
    promises.drop(0xA)

    assert list(promises.ranks) == [Rank(0xB)]
    assert (31, 30) == (promises.gone[""].over, promises.ranks[Rank(0xB)].over), "no count goes down"
    assert not promises.systematic(0xA)
    assert promises.systematic(0xB)
