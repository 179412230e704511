"""What Dynamo's bindings write to standard error by themselves: the traceback of each request that ends with
an exception, also where a client is at fault, from a thread of theirs and past all logging.

Our programs log why a request was refused or has failed, in one line, before they raise what Dynamo takes.
So the tracebacks of these exceptions become debug lines of the log, and whatever else comes in this way
warnings.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
from typing import TextIO

logger = logging.getLogger(__name__)

_BEGIN = "Traceback (most recent call last):"
#: The last line of a report of what `dynamo_error` has made.
_LOGGED = re.compile(r"dynamo\._core\.(InvalidArgument|HttpError|Disconnected|CannotConnect)\b")


def _foreign() -> bool:
    """Whether this thread was started outside of Python. Once it has logged, it is known by a dummy."""
    here = threading.get_ident()
    known = (thread for thread in threading.enumerate() if thread.ident == here)
    return all(type(thread).__name__ == "_DummyThread" for thread in known)


class _Reports(io.TextIOBase):
    """A standard error that hands what threads outside of Python write to the log, and all else on."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._written = ""
        self._report: list[str] = []

    def write(self, text: str) -> int:
        if not _foreign():
            return self.stream.write(text)
        self._written += text
        *lines, self._written = self._written.split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def _take(self, line: str) -> None:
        self._report.append(line)
        if line == _BEGIN or (self._report[0] == _BEGIN and line[:1].isspace()):
            return
        report, self._report = "\n".join(self._report), []
        logger.log(logging.DEBUG if _LOGGED.match(line) else logging.WARNING, "Dynamo: %s", report)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()


def log_reports() -> None:
    """Hand what Dynamo's bindings write to standard error to the log, from now on."""
    if not isinstance(sys.stderr, _Reports):
        sys.stderr = _Reports(sys.stderr)
