"""The lines of the log: readable ones, or JSON where Dynamo's are (DYN_LOGGING_JSONL), with the same keys.

A line about a request has its id, and that of its trace where it belongs to one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

from vswa_plugin.errors import plain
from vswa_plugin.tracing import REQUEST, is_on

JSONL_ENV = "DYN_LOGGING_JSONL"
#: As Dynamo spells them.
_LEVELS = {"WARNING": "WARN", "CRITICAL": "ERROR"}


class TextFormatter(logging.Formatter):
    """A line, with the ids of its request behind it. What others say in it must not steer a terminal."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if (ids := REQUEST.get()) is None:
            return line
        named = [] if ids.request_id in line else [f"request_id={ids.request_id}"]
        named += [f"trace_id={ids.trace_id}"] if ids.trace_id else []
        return f"{line} [{' '.join(named)}]" if named else line


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": _LEVELS.get(record.levelname, record.levelname),
            "file": record.pathname,
            "line": record.lineno,
            "target": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if (ids := REQUEST.get()) is not None:
            named = {"request_id": ids.request_id, "trace_id": ids.trace_id, "span_id": ids.span_id}
            line |= {name: value for name, value in named.items() if value}
        return json.dumps(line)  # in ASCII, so that halves of surrogates can be written too


def formatter(environ: Mapping[str, str]) -> logging.Formatter:
    """The one that ``environ`` asks for."""
    return JsonFormatter() if is_on(environ, JSONL_ENV) else TextFormatter()
