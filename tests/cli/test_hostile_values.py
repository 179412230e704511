"""Every option and argument of every command and program with values that nobody should give.

Each is taken or refused, never with a traceback: a refusal has exit code 2 or 1 and one line on standard
error. Programs and clients stop where they would begin to run; what a value does later has tests of its own.
"""

from __future__ import annotations

import argparse
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cli.test_cli_docs import subcommands
from vswa_plugin.cli.main import main
from vswa_plugin.cli.parsers import full_parser
from vswa_plugin.errors import MAX_LINE
from vswa_plugin.host.loading import load_host

TRACE = Path(__file__).parents[1] / "data" / "trtllm-v2-gemma3-1b-head.jsonl.gz"
#: Command -> what it needs besides the option that is tried, and stands before it.
NEEDED = {
    "worker": ["--model-path", "{model}"],
    "relay": ["--model-path", "{model}", "--events", "tcp://127.0.0.1:1"],
    "launch": ["agg_router", "--model-path", "{model}"],
    "explain": ["--token-ids", "1"],
    "completion": ["bash"],
    "accuracy replay": ["{trace}"],
    "accuracy route": ["forks"],
    "make-model": ["{new}"],
    "import-gguf": ["{binary}", "{new}"],
    "get-model": ["gemma3-270m"],
}
#: What an option has no effect without.
WITH = {"--status-host": ["--status-port", "0"], "--http-host": ["--http-port", "0"]}
#: A line of a log, which may stand before the refusal.
LOGGED = re.compile(r"\d{4}-\d\d-\d\d |vswa: (?!error|failed)")
VALUES = {
    "port out of range": "99999",
    "negative": "-1",
    "zero": "0",
    "not a number": "nan",
    "infinite": "inf",
    "missing file": "{missing}",
    "directory": "{directory}",
    "binary file": "{binary}",
    "empty": "",
    "very long": "x" * 100_000,
    "very long number": "9" * 5_000,
    "surrogate": "\udcff",
    "busy port": "{busy}",
}


#: Of these, a large number is no fault, and what it asks for takes its time.
LONG = {
    ("make-model", "--layers"),
    ("simulate", "--workers"),
    ("simulate", "--requests"),
    ("accuracy route", "--seeds"),
}


class Stopped(BaseException):
    """The program would run now."""


class Case(NamedTuple):
    command: str
    option: str


def cases() -> Iterator[Case]:
    with load_host(environ={}) as host:
        parser = full_parser(host)
    for name, _, below in subcommands(parser):
        for action in below._actions:
            if isinstance(action, argparse._HelpAction | argparse._VersionAction) or action.nargs == 0:
                continue
            if action.help is argparse.SUPPRESS:
                continue  # tests/worker/test_dynamo_flags.py tries those of Dynamo
            yield Case(name, action.option_strings[0] if action.option_strings else "")
    for option in ("--plugin", "--no-plugin", "--plugin-options", "--log-level"):
        yield Case("plugins", option)


@pytest.fixture(autouse=True)
def stops_where_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **_: Any) -> int:
        for argument in arguments:
            getattr(argument, "close", lambda: None)()
        raise Stopped

    for target in (
        "asyncio.run",
        "vswa_plugin.worker.__main__.run_on_uvloop",
        "vswa_plugin.relay.__main__.run_on_uvloop",
        "vswa_plugin.router.__main__.run_on_uvloop",
        "vswa_plugin.frontend.run_on_uvloop",
        "vswa_plugin.cli.accuracy_route._run_all",
        "subprocess.run",
    ):
        monkeypatch.setattr(target, stop)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "binary").write_bytes(bytes(range(256)) * 16)
    (folder / "directory").mkdir()
    return {name: str(folder / name) for name in ("binary", "directory")}


@pytest.fixture(scope="module")
def busy() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield str(server.getsockname()[1])


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case.command} {case.option}")
def test_no_value_of_an_option_ends_in_a_traceback(
    case: Case,
    files: dict[str, str],
    busy: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    fill = {**files, "busy": busy, "model": str(model_dir), "trace": str(TRACE), "new": str(tmp_path / "new")}
    fill["missing"] = str(tmp_path / "no" / "such" / "file")
    for what, value in VALUES.items():
        needed = [word.format(**fill) for word in NEEDED.get(case.command, [])]
        hostile = value.format(**fill)
        if case.option:
            line = [*case.command.split(), *needed, *WITH.get(case.option, []), f"{case.option}={hostile}"]
        else:
            line = [*case.command.split(), *needed[:-1], "--", hostile]
        if case in LONG and what in ("port out of range", "busy port"):
            continue
        capfd.readouterr()
        try:
            code: Any = main(line)
        except SystemExit as refused:
            code = refused.code
        except Stopped:
            continue
        error = "".join(line for line in capfd.readouterr().err.splitlines(True) if not LOGGED.match(line))
        assert code in (0, 1, 2), (what, code)
        if code:
            assert 1 == len(error.splitlines()), (what, error[:2_000])
            assert len(error) < 2 * MAX_LINE, (what, error[:2_000])
