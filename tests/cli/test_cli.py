from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest

from vswa_plugin import __version__
from vswa_plugin import cli as commands
from vswa_plugin.cli import BUILT_IN, built_in
from vswa_plugin.cli.main import main
from vswa_plugin.engine.predicted import RankSetup, SimulatedRank
from vswa_plugin.errors import ConnectError, InvariantError, PluginError
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.hookspecs.commands import Command, Commands
from vswa_plugin.host.host import PluginHost

Output = pytest.CaptureFixture[str]
COMMAND = """
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.hookspecs import hookimpl

def configure(parser):
    parser.add_argument("--end", default="return")

def run(args):
    print("said hello")
    if args.end == "config":
        raise ConfigError("expected a file, got none")
    if args.end == "interrupt":
        raise KeyboardInterrupt
    return 5

@hookimpl
def vswa_register_commands(commands):
    commands.add("{name}", "say hello", configure, run)
"""


@pytest.fixture(autouse=True)
def only_local_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSWA_PLUGINS", "")
    monkeypatch.delenv("VSWA_PLUGINS_DISABLED", raising=False)
    monkeypatch.delenv("VSWA_TRACE_PLUGINS", raising=False)


@pytest.fixture
def hello(tmp_path: Path) -> str:
    return plugin_file(tmp_path, "greeter", "hello")


def plugin_file(tmp_path: Path, stem: str, command: str) -> str:
    path = tmp_path / f"{stem}.py"
    path.write_text(COMMAND.replace("{name}", command))
    return str(path)


def test_the_version_is_printed(capsys: Output) -> None:
    assert 0 == main(["--version"])
    assert f"vswa {__version__}\n" == capsys.readouterr().out


def test_help_names_all_commands_and_examples(hello: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--plugin", hello, "--help"])
    text = capsys.readouterr().out

    assert 0 == ended.value.code
    for word in ("examples:", "plugins", "hello", "say hello", "--no-plugin", "VSWA_PLUGINS_DISABLED"):
        assert word in text


def test_without_a_command_help_is_printed(capsys: Output) -> None:
    assert 0 == main([])
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_command_has_a_module_and_help(name: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])

    assert 0 == ended.value.code
    assert f"usage: vswa {name}" in capsys.readouterr().out
    assert callable(built_in(name).run)


def test_an_unknown_command_lists_the_known_ones(hello: str, capsys: Output) -> None:
    assert 2 == main(["--plugin", hello, "helo"])

    captured = capsys.readouterr()
    assert captured.err.startswith("vswa: error: unknown command 'helo': did you mean 'hello'? Known: ")
    assert "" == captured.out


@pytest.mark.parametrize("before", [True, False])
def test_a_plugins_command_runs_with_the_plugin_named_before_or_after_it(
    hello: str, before: bool, capsys: Output
) -> None:
    given = ["--plugin", hello]
    code = main([*given, "hello"] if before else ["hello", *given])

    assert 5 == code
    assert "said hello\n" == capsys.readouterr().out


@pytest.mark.parametrize("before", [True, False])
def test_a_plugin_of_a_command_is_given_the_options_of_the_file(
    before: bool, tmp_path: Path, capsys: Output
) -> None:
    code = "\n\n@hookimpl\ndef vswa_options(options):\n    print('limit', options.integer('limit', 1))\n"
    (tmp_path / "greeter.py").write_text(COMMAND.replace("{name}", "hello") + code)
    (tmp_path / "options.yaml").write_text("greeter: {limit: 7}\n")
    given = ["--plugin", str(tmp_path / "greeter.py"), "--plugin-options", str(tmp_path / "options.yaml")]

    assert 5 == main([*given, "hello"] if before else ["hello", *given])
    assert "limit 7\nsaid hello\n" == capsys.readouterr().out


def test_an_error_for_the_user_is_one_line_and_exit_code_2(hello: str, capsys: Output) -> None:
    assert 2 == main(["--plugin", hello, "hello", "--end", "config"])
    assert "vswa: error: expected a file, got none\n" == capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_no_traceback(hello: str, capsys: Output) -> None:
    assert 130 == main(["--plugin", hello, "hello", "--end", "interrupt"])
    assert "" == capsys.readouterr().err


def fake_command(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    module = ModuleType("vswa_plugin.cli.fake")
    module.__dict__.update(configure=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(commands.BUILT_IN, "fake", "for this test")  # type: ignore[arg-type]


def test_a_broker_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    fake_command(monkeypatch, ConnectError("cannot reach NATS at nats://127.0.0.1:1"))

    assert 1 == main(["fake"])
    assert "vswa: failed: cannot reach NATS at nats://127.0.0.1:1\n" == capsys.readouterr().err


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, InvariantError("index and tree differ"))
    with pytest.raises(InvariantError):
        main(["fake"])


def test_a_built_in_command_does_not_wait_for_plugins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    fake_command(monkeypatch, ConnectError("reached"))
    (tmp_path / "slow.py").write_text("raise SystemExit('imported')")

    assert 1 == main(["--plugin", str(tmp_path / "slow.py"), "fake"])
    assert "vswa: failed: reached\n" == capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "serve"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "dsagg"], "unknown topology 'dsagg': did you mean 'disagg'?"),
        (
            ["--topology", "disagg_router", "--router", "x"],
            "--router: unknown router 'x'. Known: exact, picker, stock",
        ),
        (["--router", "stock"], "--router: topology 'agg' routes by no cache"),
        (
            ["--topology", "agg_router", "--router", "stock", "--routers", "2"],
            "--routers: only ROUTER=exact and ROUTER=picker have",
        ),
        (["--topology", "disagg", "--workers", "3"], "--workers: topology 'disagg' has prefill and decode"),
    ],
)
def test_a_topology_that_cannot_be_started_is_refused_before_anything_is(
    command: str, options: list[str], message: str, capsys: Output
) -> None:
    assert 2 == main([command, *options])
    assert message in capsys.readouterr().err


# -- vswa plugins ------------------------------------------------------------------------------------


def test_plugins_are_listed_as_lines_for_pipes(
    hello: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.delenv("VSWA_PLUGINS")

    assert 0 == main(["plugins", "--plugin", hello, "--no-plugin", "prometheus"])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert ["greeter", "-", "loaded", hello, "vswa_register_commands"] == rows["greeter"]
    expected = f"prometheus {__version__} disabled vswa-plugin (vswa_plugins.prometheus:Prometheus) "
    expected += "switched off by name"
    assert expected.split() == rows["prometheus"]


def test_plugins_are_listed_as_json(hello: str, capsys: Output) -> None:
    assert 0 == main(["plugins", "--json", "--plugin", hello])

    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert ("loaded", ["vswa_register_commands"], hello) == tuple(
        listed["greeter"][key] for key in ("state", "hooks", "source")
    )
    assert "disabled" == listed["prometheus"]["state"]


def test_on_a_terminal_plugins_are_a_table(
    hello: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")

    assert 0 == main(["plugins", "--plugin", hello])
    text = capsys.readouterr().out
    assert "───" in text
    assert "greeter" in text


def test_an_unknown_plugin_to_switch_off_lists_the_known_ones(capsys: Output) -> None:
    assert 2 == main(["plugins", "--no-plugin", "prometeus"])
    assert "unknown plugin 'prometeus': did you mean 'prometheus'? Known: " in capsys.readouterr().err


def test_a_local_plugin_that_cannot_be_loaded_ends_the_command(tmp_path: Path, capsys: Output) -> None:
    assert 2 == main(["--plugin", str(tmp_path / "nowhere.py"), "plugins"])
    assert "expected a Python file, found none at" in capsys.readouterr().err


# -- clashes -----------------------------------------------------------------------------------------


def test_a_clash_of_two_plugins_names_both_and_keeps_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [plugin_file(tmp_path, stem, "hello") for stem in ("zeta", "alpha")]
    with PluginHost() as host:
        for file in files:
            host.load_local(file)
        added = host.commands({})

    assert [("hello", "plugin 'alpha'")] == [(each.name, each.owner) for each in added]
    assert "plugin 'zeta' adds the command 'hello', which plugin 'alpha' provides already" in caplog.text


def test_a_built_in_command_cannot_be_replaced(
    tmp_path: Path, capsys: Output, caplog: pytest.LogCaptureFixture
) -> None:
    file = plugin_file(tmp_path, "mine", "plugins")

    assert 0 == main(["--plugin", file])
    assert "plugin 'mine' adds the command 'plugins', which vswa itself provides already" in caplog.text


def test_a_plugin_that_fails_half_way_adds_no_command_and_costs_no_other(tmp_path: Path) -> None:
    class Half:
        @hookimpl
        def vswa_register_commands(self, commands: Commands) -> None:
            commands.add("half", "one", lambda parser: None, lambda args: 0)
            raise ValueError("boom")

    with PluginHost() as host:
        host.register(Half(), "a")
        host.load_local(plugin_file(tmp_path, "b", "hello"))
        added = host.commands({})

    assert ["hello"] == [each.name for each in added]


def _no_rank(setup: RankSetup) -> SimulatedRank:
    raise AssertionError("nothing is simulated")


@pytest.mark.parametrize(
    ("name", "help", "configure", "run", "message"),
    [
        ("Bad", "h", print, print, "expected a command name like 'make-model', got 'Bad'"),
        ("--x", "h", print, print, "expected a command name"),
        (None, "h", print, print, "expected a command name"),
        ("x", " ", print, print, "command 'x': expected one line of help"),
        ("x", "h", None, print, "expected a function for configure, got None"),
        ("x", "h", print, 3, "expected a function for run, got 3"),
    ],
)
def test_a_command_that_cannot_work_is_refused_at_once(
    name: str, help: str, configure: object, run: object, message: str
) -> None:
    added = Commands("mine", {}, _no_rank)
    with pytest.raises(PluginError, match=message):
        added.add(name, help, configure, run)  # type: ignore[arg-type]

    assert list[Command]() == added.added


# -- as a program ------------------------------------------------------------------------------------


def test_a_reader_that_has_gone_ends_the_command_quietly() -> None:
    script = Path(sys.executable).with_name("vswa")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        done = subprocess.run(
            [script, "plugins"], stdout=gone, stderr=subprocess.PIPE, timeout=30, check=False
        )

    assert (141, b"") == (done.returncode, done.stderr)


def test_the_installed_script_lists_the_first_party_plugins() -> None:
    script = Path(sys.executable).with_name("vswa")
    done = subprocess.run([script, "plugins"], env={}, capture_output=True, text=True, timeout=30, check=True)

    rows = {line.split()[0]: line.split()[2] for line in done.stdout.splitlines()}
    installed = {each.name for each in entry_points(group="vswa_plugin")}
    assert {"gemma3_cpu", "prometheus", "trtllm_events"} <= installed
    assert dict.fromkeys(installed, "loaded") == {n: state for n, state in rows.items() if n != "plugin"}
    assert "" == done.stderr
