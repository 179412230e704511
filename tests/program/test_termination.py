"""Why a program of ours ended: written where VSWA_TERMINATION_LOG says, for whoever runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.program.test_exit_codes import raising
from vswa_plugin.errors import ConfigError, ConnectError, InvariantError
from vswa_plugin.launch.processes import python_module
from vswa_plugin.program.args import make_parser
from vswa_plugin.program.run import MESSAGE_BYTES, TERMINATION_ENV, record_end, run_program


@pytest.fixture
def termination_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a container: the file is there before the program starts."""
    path = tmp_path / "termination-log"
    path.write_text("of an earlier life, which had more to say")
    monkeypatch.setenv(TERMINATION_ENV, str(path))
    return path


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ConfigError("expected a model\nat /m"), 2, "vswa worker: error: expected a model at /m\n"),
        (ConnectError("NATS is away"), 1, "vswa worker: failed: NATS is away\n"),
    ],
)
def test_the_last_message_is_written_there_and_printed_as_ever(
    termination_log: Path, capsys: pytest.CaptureFixture[str], error: Exception, code: int, printed: str
) -> None:
    assert run_program("vswa worker", raising(error)) == code
    assert capsys.readouterr().err == printed
    assert termination_log.read_text() == printed.partition(": ")[2].partition(": ")[2].strip()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (InvariantError("two of one"), f"vswa_plugin.errors.InvariantError: {InvariantError('two of one')}"),
    ],
)
def test_a_bug_keeps_its_traceback_and_is_named_there(
    termination_log: Path, error: Exception, message: str
) -> None:
    with pytest.raises(type(error)):
        run_program("vswa worker", raising(error))

    assert termination_log.read_text() == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --port"),
        (["--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--port", "1", "--prt", "2"], "unrecognized arguments: --prt 2"),
    ],
)
def test_what_argparse_refuses_is_written_there_and_printed_in_a_line(
    termination_log: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    parser = make_parser("vswa worker", "", "")
    parser.add_argument("--port", type=int, required=True)
    with pytest.raises(SystemExit) as ended:
        run_program("vswa worker", lambda: parser.parse_args(argv).port)

    assert (ended.value.code, termination_log.read_text()) == (2, message)
    hint = "; `vswa worker --help` lists the options"
    assert capsys.readouterr().err == f"vswa worker: error: {message}{hint}\n"


@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_help_and_version_are_no_reason(termination_log: Path, argv: list[str]) -> None:
    before = termination_log.read_text()
    with pytest.raises(SystemExit) as ended:
        run_program("vswa worker", lambda: make_parser("vswa worker", "", "").parse_args(argv).port)

    assert (ended.value.code, termination_log.read_text()) == (0, before)


def test_a_long_reason_is_cut_between_two_characters(termination_log: Path) -> None:
    record_end("x" + "é" * MESSAGE_BYTES)

    assert termination_log.read_text(encoding="utf-8") == "x" + "é" * ((MESSAGE_BYTES - 1) // 2)


def test_a_file_that_cannot_be_written_is_said_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TERMINATION_ENV, str(tmp_path))

    assert run_program("vswa worker", raising(ConfigError("expected a model"))) == 2
    assert f"VSWA_TERMINATION_LOG: expected a file that can be written, got {tmp_path}" in caplog.text


@pytest.mark.parametrize("module", ["worker", "router", "frontend", "launch"])
def test_every_program_writes_it(termination_log: Path, module: str) -> None:
    command = python_module(f"vswa_plugin.{module}", "--no-such-option")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    reason = termination_log.read_text()

    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.partition("error: ")[2].partition("; `")[0]) == (2, reason)


def test_a_worker_without_a_model_says_so_there(termination_log: Path) -> None:
    command = [sys.executable, "-m", "vswa_plugin.worker", "--model-path", "/nowhere"]
    subprocess.run(command, capture_output=True, check=False)

    assert termination_log.read_text().startswith("--model-path: expected a model at /nowhere, got nothing")
