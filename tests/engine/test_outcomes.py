from __future__ import annotations

import asyncio

import pytest

from vswa_plugin.dynamo.client import WorkerHttpError
from vswa_plugin.engine.outcomes import OUTCOMES, outcome_of, outcome_of_error
from vswa_plugin.errors import InvalidRequest, Overloaded, Unavailable
from vswa_plugin.selection import NoCandidate


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InvalidRequest("too long"), "refused"),
        (WorkerHttpError(404, "no such model"), "refused"),
        (Overloaded("full"), "unavailable"),
        (Unavailable("lost"), "unavailable"),
        (NoCandidate("nobody"), "unavailable"),
        (WorkerHttpError(503, "later"), "unavailable"),
        (WorkerHttpError(500, "broken"), "failed"),
        (RuntimeError("a bug"), "failed"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
    ],
    ids=repr,
)
def test_each_error_is_one_outcome(error: BaseException, outcome: str) -> None:
    assert outcome == outcome_of_error(error)
    assert outcome in OUTCOMES


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("stop", "completed"),
        ("eos", "completed"),
        ("length", "completed"),
        ("cancelled", "cancelled"),
        ("error", "failed"),
        ("error: request 4711 is gone", "failed"),
    ],
)
def test_a_finish_reason_is_an_outcome_whatever_message_follows(reason: str, outcome: str) -> None:
    assert outcome == outcome_of(reason)
