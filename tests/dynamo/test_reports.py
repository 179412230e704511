"""What Dynamo's bindings write to standard error from threads of their own."""

from __future__ import annotations

import _thread
import io
import logging
import sys
import threading

import pytest

from vswa_plugin.dynamo.reports import _Reports, log_reports

REPORT = """\
Traceback (most recent call last):
  File "/x.py", line 1, in generate
    raise error
dynamo._core.{kind}: n: expected 1, got 2
"""


def write_elsewhere(stream: _Reports, text: str) -> None:
    """As the bindings do: piece by piece, from a thread that Python did not start."""
    done = threading.Event()

    def body() -> None:
        for piece in text.splitlines(keepends=True):
            stream.write(piece[:5])
            stream.write(piece[5:])
        stream.flush()
        done.set()

    _thread.start_new_thread(body, ())
    assert done.wait(10)


@pytest.mark.parametrize("kind", ["InvalidArgument", "HttpError", "Disconnected", "CannotConnect"])
def test_reports_of_what_was_logged_are_for_debugging(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    out = io.StringIO()
    with caplog.at_level(logging.DEBUG):
        write_elsewhere(_Reports(out), REPORT.format(kind=kind))

    assert "" == out.getvalue()
    (line,) = caplog.records
    assert logging.DEBUG == line.levelno
    assert "Dynamo: " + REPORT.format(kind=kind).strip() == line.getMessage()


@pytest.mark.parametrize("text", [REPORT.replace("dynamo._core.{kind}", "ValueError"), "it panicked\n"])
def test_anything_else_is_a_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    write_elsewhere(_Reports(io.StringIO()), text)

    assert [(logging.WARNING, f"Dynamo: {text.strip()}")] == [
        (line.levelno, line.getMessage()) for line in caplog.records
    ]


def test_reports_do_not_run_into_each_other(caplog: pytest.LogCaptureFixture) -> None:
    stream = _Reports(io.StringIO())
    with caplog.at_level(logging.DEBUG):
        write_elsewhere(stream, REPORT.format(kind="HttpError"))
        write_elsewhere(stream, "it panicked\n" + REPORT.format(kind="HttpError"))

    assert [logging.DEBUG, logging.WARNING, logging.DEBUG] == [line.levelno for line in caplog.records]


def test_our_own_threads_write_as_before() -> None:
    out = io.StringIO()
    stream = _Reports(out)
    stream.write("here\n")
    thread = threading.Thread(target=stream.write, args=("there\n",))
    thread.start()
    thread.join()

    assert "here\nthere\n" == out.getvalue()


def test_standard_error_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = io.StringIO()
    monkeypatch.setattr(sys, "stderr", before)
    log_reports()
    log_reports()

    assert isinstance(sys.stderr, _Reports)
    assert before is sys.stderr.stream
