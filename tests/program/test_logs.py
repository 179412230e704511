"""The lines of the log: readable or JSON, with the ids of their request."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from vswa_plugin.program.logs import JsonFormatter, TextFormatter, formatter
from vswa_plugin.tracing import REQUEST, RequestIds

IDS = RequestIds("r-1", "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", None)


@pytest.fixture
def in_request() -> Iterator[None]:
    token = REQUEST.set(IDS)
    yield
    REQUEST.reset(token)


def record(
    message: str, *arguments: object, level: int = logging.WARNING, error: bool = False
) -> logging.LogRecord:
    info = None
    if error:
        try:
            raise ValueError("wrong")
        except ValueError:
            info = sys.exc_info()
    return logging.LogRecord("vswa_plugin.x", level, "/x.py", 7, message, arguments, info)


def test_a_line_outside_of_requests_has_no_ids() -> None:
    assert TextFormatter().format(record("%d workers", 2)).endswith(" W vswa_plugin.x: 2 workers")


def test_a_line_about_a_request_has_its_ids(in_request: None) -> None:
    line = TextFormatter().format(record("slow"))

    assert line.endswith(f"slow [request_id=r-1 trace_id={IDS.trace_id}]")


def test_an_id_that_the_line_has_is_not_repeated(in_request: None) -> None:
    line = TextFormatter().format(record("request r-1 refused"))

    assert line.endswith(f"request r-1 refused [trace_id={IDS.trace_id}]")


def test_a_request_without_a_trace_has_its_own_id_alone() -> None:
    token = REQUEST.set(RequestIds("r-2"))
    text, parsed = TextFormatter().format(record("slow")), json.loads(JsonFormatter().format(record("slow")))
    REQUEST.reset(token)

    assert text.endswith("slow [request_id=r-2]")
    assert ("r-2", False) == (parsed["request_id"], "trace_id" in parsed)


def test_json_has_the_keys_of_dynamos_lines(in_request: None) -> None:
    line = json.loads(JsonFormatter().format(record("slow: %s", "é", error=True)))

    assert ("WARN", "vswa_plugin.x", "slow: é", "/x.py", 7) == tuple(
        line[key] for key in ("level", "target", "message", "file", "line")
    )
    assert ("r-1", IDS.trace_id, IDS.span_id) == tuple(
        line[key] for key in ("request_id", "trace_id", "span_id")
    )
    assert "ValueError: wrong" in line["exception"]
    assert 27 == len(line["time"]) and line["time"].endswith("Z")


def test_any_text_can_be_written() -> None:
    JsonFormatter().format(record("%s", "\udcff")).encode()


def test_a_message_of_several_lines_stays_one_line_of_json() -> None:
    assert "\n" not in JsonFormatter().format(record("a\nb", error=True))


@pytest.mark.parametrize(
    ("value", "kind"),
    [("", TextFormatter), ("0", TextFormatter), ("1", JsonFormatter), ("true", JsonFormatter)],
)
def test_lines_are_json_where_dynamos_are(value: str, kind: type[logging.Formatter]) -> None:
    assert isinstance(formatter({"DYN_LOGGING_JSONL": value}), kind)
    assert isinstance(formatter({}), TextFormatter)
