"""One convention for exit codes: programs, built-in commands and commands of plugins follow it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vswa_plugin.cli.main import main
from vswa_plugin.errors import ConfigError, ConnectError, PluginFailed, Unavailable
from vswa_plugin.launch.processes import ChildDied
from vswa_plugin.program.life import Failed
from vswa_plugin.program.run import EXIT_CODES, run_program

Output = pytest.CaptureFixture[str]
VSWA = Path(sys.executable).with_name("vswa")
PLUGIN = """
from pathlib import Path
from vswa_plugin.hookspecs import hookimpl

def configure(parser):
    parser.add_argument("what")

def broken(parser):
    raise KeyError("no such option")

def run(args):
    if args.what == "file":
        Path("/nowhere/at/all").read_text()
    if args.what == "lines":
        for number in range(100_000):
            print(number)
        return 0
    raise ValueError(f"cannot {args.what}")

@hookimpl
def vswa_register_commands(commands):
    commands.add("greet", "say hello", configure, run)
    commands.add("broken", "no options", broken, run)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "greeter.py"
    path.write_text(PLUGIN)
    return str(path)


def raising(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("expected a model"), 2, "p: error: expected a model\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"),
            2,
            "p: error: cannot use /x: No such file or directory; check the path and its permissions\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            "p: error: cannot use /x: Permission denied; check the path and its permissions\n",
        ),
        (
            OSError(errno.EADDRINUSE, "Address already in use"),
            2,
            f"p: error: [Errno {errno.EADDRINUSE}] Address already in use\n",
        ),
        (ConnectError("NATS is away"), 1, "p: failed: NATS is away\n"),
        (ChildDied("etcd has ended"), 1, "p: failed: etcd has ended\n"),
        (Failed("the engine has failed"), 1, "p: failed: the engine has failed\n"),
        (Unavailable("the worker stops"), 1, "p: failed: the worker stops\n"),
        (PluginFailed("plugin 'x' failed"), 1, "p: failed: plugin 'x' failed\n"),
        (
            ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
            1,
            f"p: failed: [Errno {errno.ECONNRESET}] Connection reset by peer\n",
        ),
        (TimeoutError(), 1, "p: failed: TimeoutError\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, f"p: failed: [Errno {errno.EPIPE}] Broken pipe\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_each_kind_of_error_has_its_exit_code_and_one_line(
    error: BaseException, code: int, line: str, capsys: Output
) -> None:
    assert (code, line) == (run_program("p", raising(error)), capsys.readouterr().err)
    assert code in EXIT_CODES


def test_what_is_wrong_with_a_file_is_one_line_of_the_command(tmp_path: Path, capsys: Output) -> None:
    missing = tmp_path / "trace.jsonl"

    assert 2 == main(["accuracy", "replay", str(missing)])
    error = capsys.readouterr().err
    assert error.startswith("vswa: error: ")
    assert str(missing) in error
    assert 1 == error.count("\n")


def test_what_a_plugins_command_raises_names_the_plugin_on_one_line(plugin: str, capsys: Output) -> None:
    assert 1 == main(["--plugin", plugin, "greet", "hello"])
    expected = "vswa: failed: plugin 'greeter' failed in `vswa greet`: ValueError: cannot hello\n"
    assert expected == capsys.readouterr().err


def test_a_missing_file_is_the_users_to_correct_in_a_plugins_command_too(plugin: str, capsys: Output) -> None:
    assert 2 == main(["--plugin", plugin, "greet", "file"])
    assert capsys.readouterr().err.startswith("vswa: error: cannot use /nowhere/at/all: No such file")


def test_options_that_a_plugin_cannot_add_name_it_and_cost_no_other_command(
    plugin: str, capsys: Output
) -> None:
    assert 1 == main(["--plugin", plugin, "broken"])
    assert "plugin 'greeter' failed in the options of `vswa broken`: KeyError: " in capsys.readouterr().err
    assert 1 == main(["--plugin", plugin, "greet", "hello"])
    assert "cannot hello" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "environ", "shown"),
    [
        ([], {}, False),
        ([], {"VSWA_TRACEBACK": "0"}, False),
        ([], {"VSWA_TRACEBACK": "1"}, True),
        (["--log-level", "info"], {}, False),
        (["--log-level", "debug"], {}, True),
    ],
)
def test_the_traceback_is_shown_on_demand(
    plugin: str, options: list[str], environ: dict[str, str], shown: bool
) -> None:
    command = [VSWA, *options, "--plugin", plugin, "greet", "hello"]
    done = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=30, check=False
    )

    assert (1, shown) == (done.returncode, "Traceback" in done.stderr)
    assert shown == ("ValueError: cannot hello\n\nThe above exception" in done.stderr)
    assert done.stderr.splitlines()[-1].startswith("vswa: failed: plugin 'greeter' failed")


@pytest.mark.parametrize("arguments", [("greet", "lines"), ("--help",), ("worker", "--help")])
def test_a_reader_that_has_gone_ends_every_command_quietly(plugin: str, arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    before = [] if arguments[0] == "worker" else ["--plugin", plugin]
    with os.fdopen(writer, "w") as gone:
        done = subprocess.run(
            [VSWA, *before, *arguments], stdout=gone, stderr=subprocess.PIPE, timeout=30, check=False
        )

    assert (141, b"") == (done.returncode, done.stderr)


def test_head_gets_its_line_and_ends_the_command_quietly(plugin: str) -> None:
    line = f"set -o pipefail; {VSWA} --plugin {plugin} greet lines | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=30, check=False)

    assert (141, "0\n", "") == (done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_stream_that_was_closed_at_the_start_is_no_error(closed: str, plugin: str, tmp_path: Path) -> None:
    """What is written there goes nowhere, and not to a file or socket that got its number."""
    streams = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-"}
    line = f"exec {VSWA} --plugin {plugin} greet lines {streams[closed]}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=30, check=False)

    assert (0, "") == (done.returncode, done.stderr)
    assert (0 if closed == "stdout" else 100_000) == len(done.stdout.splitlines())


@pytest.mark.parametrize("command", ["greet lines", "plugins"])
def test_a_full_disk_is_said_once_and_is_the_users_to_correct(
    plugin: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is seen at once or only when the last lines are flushed."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    line = f"exec {VSWA} --plugin {plugin} {command} > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=30, check=False)

    assert (2, "vswa: error: [Errno 28] No space left on device\n") == (done.returncode, done.stderr)


@pytest.mark.parametrize("target", ["/dev/full", ">(:)"])
def test_an_error_that_cannot_be_written_keeps_its_exit_code(plugin: str, target: str) -> None:
    line = f"{VSWA} --plugin {plugin} greet file 2> {target}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=30, check=False)

    assert (2, "", "") == (done.returncode, done.stdout, done.stderr)


def test_notes_of_an_error_are_on_its_line(capsys: Output) -> None:
    error = ConnectError("NATS is away")
    error.add_note("logs are kept in /tmp/x")

    assert 1 == run_program("p", raising(error))
    assert "p: failed: NATS is away; logs are kept in /tmp/x\n" == capsys.readouterr().err


def test_the_convention_is_in_the_help(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out

    for code, when in EXIT_CODES.items():
        assert f"  {code:<4} {when}\n" in shown
