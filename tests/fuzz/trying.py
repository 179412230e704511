"""One case after another: whether a decoder takes it or refuses it, and does nothing else."""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from tests.fuzz.mutations import spoilt
from tests.fuzz.targets import Target
from vswa_plugin.errors import VswaError

#: No message of some kilobytes takes that long on the slowest machine.
LONGEST_S = 10


@dataclass
class Tried:
    """:ivar failure: what the last case did that no decoder may do; None: all was well."""

    cases: int = 0
    refused: int = 0
    seed: int = 0
    payload: bytes = b""
    failure: str | None = None


class TookLong(Exception):
    """A decoder works on one message for ever, or nearly."""


def run_cases(target: Target, cases: int, seed: int = 0) -> Tried:
    """So many cases, each with the next seed; ends at the first that fails."""
    tried = Tried()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with _alarm():
            _run(tried, target, range(seed, seed + cases))
    finally:
        logging.disable(disabled)
    return tried


def _run(tried: Tried, target: Target, seeds: Iterable[int]) -> None:
    for number in seeds:
        payload = spoilt(random.Random(f"{target.name} {number}"), target.valid, target.codec)
        tried.cases, tried.seed, tried.payload = tried.cases + 1, number, payload
        outcome = outcome_of(target, payload)
        if outcome == "refused":
            tried.refused += 1
        elif outcome != "taken":
            tried.failure = outcome
            return


def outcome_of(target: Target, payload: bytes) -> str:
    """``taken``, ``refused``, or the error that it should not have raised."""
    signal.alarm(LONGEST_S)
    try:
        target.read(payload)
    except VswaError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)
    return "taken"


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TookLong(f"over {LONGEST_S} s for one message")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
