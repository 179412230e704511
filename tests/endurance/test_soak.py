"""The soak in short: a few ranks for some seconds, and what it must call a fault."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.endurance.__main__ import faults_of
from tests.endurance.measuring import soak

GOOD: dict[str, Any] = {
    "lag_ms": {"p99": 100.0},
    "memory_mib": [100.0, 101.0],
    "descriptors": [20, 20],
    "stale": 0,
    "wrong": 0,
}


def test_views_of_some_ranks_under_load_end_as_what_the_publishers_hold() -> None:
    measured = asyncio.run(soak(10, 1_000, 20, 2.0))

    assert [] == measured.wrong
    assert min(measured.steps, measured.messages, measured.queries) > 10


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lag_ms": {"p99": 251.0}}, "lag p99"),
        ({"memory_mib": [100.0, 106.0]}, "memory"),
        ({"descriptors": [20, 21]}, "descriptors"),
        ({"stale": 1}, "not live"),
        ({"wrong": 1}, "wrong in the end"),
    ],
)
def test_what_is_over_its_limit_is_named(changes: dict[str, Any], named: str) -> None:
    assert [] == faults_of(GOOD)
    (wrong,) = faults_of({**GOOD, **changes})

    assert named in wrong
