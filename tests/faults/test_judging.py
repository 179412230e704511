"""What counts as a right answer, and which figures break a limit. The faults themselves: ``make faults``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.faults.__main__ import FAULTS, Fault, judged
from tests.faults.load import Answer, _read


class Streamed:
    """An HTTP answer of these lines."""

    def __init__(self, *lines: bytes) -> None:
        self._lines = lines

    @property
    def content(self) -> AsyncIterator[bytes]:
        return self._each()

    async def _each(self) -> AsyncIterator[bytes]:
        for line in self._lines:
            yield line


def chunk(text: str, reason: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": reason}]}).encode()


END = b"data: [DONE]"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([chunk("a"), b"", chunk("b", "length"), END], ("whole", "ab")),
        ([chunk("a"), END], ("cut", "")),
        ([chunk("a")], ("cut", "")),
        ([chunk("a"), b"event: error", b"data: gone"], ("error in the stream", "")),
        ([chunk("a"), b'data: {"error": {"code": 503}}'], ("error in the stream", "")),
        ([], ("cut", "")),
    ],
)
def test_a_stream_is_whole_only_with_a_reason_to_end_and_without_an_error(
    lines: list[bytes], expected: tuple[str, str]
) -> None:
    assert expected == asyncio.run(_read(Streamed(*lines)))  # type: ignore[arg-type]


def right(*ends: float) -> list[Answer]:
    return [Answer(end - 0.1, end, "right") for end in ends]


def judge(answers: list[Answer], spared: bool = False) -> dict[str, Any]:
    return judged(Fault("f", lambda _: (), 0.0, 2.0, spared), answers, 10.0, 14.0)


def test_the_longest_time_without_a_right_answer_is_what_a_limit_is_about() -> None:
    assert (2.5, False) == (judge(right(10.5, 13.0, 14.0))["gap_s"], judge(right(10.5, 13.0, 14.0))["held"])
    assert judge(right(11.0, 12.5, 13.5))["held"]
    assert not judge([])["held"]


@pytest.mark.parametrize("outcome", ["wrong", "hung", "status 500", "status 404"])
def test_a_wrong_or_hung_answer_breaks_any_limit(outcome: str) -> None:
    assert not judge([*right(11.0, 12.0, 13.0), Answer(11.0, 12.0, outcome)])["held"]


@pytest.mark.parametrize(("spared", "held"), [(True, False), (False, True)])
def test_where_a_fault_must_cost_no_request_an_error_breaks_its_limit(spared: bool, held: bool) -> None:
    assert held == judge([*right(11.0, 12.0, 13.0), Answer(11.0, 12.0, "status 503")], spared)["held"]


def test_each_fault_has_a_name_of_its_own() -> None:
    assert len(FAULTS) == len({fault.name for fault in FAULTS})
