"""The fuzzing in short: some cases of each decoder, those that failed once, and faults that it must find."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from tests.fuzz import trying
from tests.fuzz.mutations import spoilt
from tests.fuzz.targets import BATCHES, PACKED, TARGETS, Target
from tests.fuzz.trying import outcome_of, run_cases
from vswa_plugin.errors import ProtocolError


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_decoder_takes_or_refuses_whatever_comes(target: Target) -> None:
    tried = run_cases(target, 400)

    assert (400, None) == (tried.cases, tried.failure), (tried.seed, tried.payload)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_decoder_takes_what_is_valid_and_what_failed_once_fails_no_more(target: Target) -> None:
    assert {"taken"} == {outcome_of(target, payload) for payload in target.valid}
    assert {"taken", "refused"} >= {outcome_of(target, payload) for payload in target.corpus()}


def _trusts(payload: bytes) -> Any:
    """A decoder that believes that an array of five is what it gets."""
    try:
        _, epoch, first, _, events = msgspec.msgpack.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ProtocolError(str(error)) from error
    return epoch + first + len(events)


def test_a_decoder_that_trusts_its_input_is_found_out() -> None:
    tried = run_cases(Target("trusts", _trusts, BATCHES, PACKED), 400)

    assert tried.failure is not None
    assert tried.failure.partition(":")[0] in ("ValueError", "TypeError")
    assert tried.failure == outcome_of(Target("trusts", _trusts, BATCHES), tried.payload)


def test_a_decoder_that_never_ends_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying, "LONGEST_S", 1)

    def never_ends(payload: bytes) -> None:
        while len(payload) >= 0:
            pass

    tried = run_cases(Target("never ends", never_ends, BATCHES), 5)

    assert (1, "TookLong: over 1 s for one message") == (tried.cases, tried.failure)


def test_a_seed_is_the_same_case_each_time_and_the_cases_differ() -> None:
    cases = [spoilt(random.Random(number), BATCHES, PACKED) for number in range(200)]

    assert cases == [spoilt(random.Random(number), BATCHES, PACKED) for number in range(200)]
    assert len(set(cases)) > 150
