"""The options that workers and routers share: read alike, refused alike, explained alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vswa_plugin import frontend
from vswa_plugin.errors import ConfigError
from vswa_plugin.program.args import ENVIRONMENT_HELP
from vswa_plugin.program.run import CommandLineRefused, Parser
from vswa_plugin.router import args as router_args
from vswa_plugin.worker import args as worker_args

Parse = Callable[..., Any]


@pytest.fixture(params=["worker", "router"])
def parse(request: pytest.FixtureRequest, model_dir: Path) -> Parse:
    if request.param == "router":
        return lambda *argv, **environ: router_args.parse(argv, environ)
    return lambda *argv, **environ: worker_args.parse(["--model-path", str(model_dir), *argv], environ)


def test_what_is_shared_is_read_alike(parse: Parse) -> None:
    argv = ("--registry", "file:/x", "--heartbeat", "0.5", "--drain-timeout", "0", "--log-level", "debug")
    args = parse(
        *argv,
        "--plugin",
        "a.py",
        "--plugin",
        "b",
        "--no-plugin",
        "c",
        "--plugin-options",
        "d.yaml",
        NATS_SERVER="nats://h:1",
    )

    assert (args.nats_server, args.registry) == ("nats://h:1", "file:/x")
    assert (args.heartbeat_s, args.drain_timeout_s, args.log_level) == (0.5, 0.0, "debug")
    assert (args.plugin, args.no_plugin, args.plugin_options) == (["a.py", "b"], ["c"], "d.yaml")


@pytest.mark.parametrize("environ", [{}, {"NATS_SERVER": ""}])
def test_defaults_are_alike(parse: Parse, environ: dict[str, str]) -> None:
    args = parse(**environ)

    assert (args.nats_server, args.registry) == ("nats://127.0.0.1:4222", None)
    assert (args.heartbeat_s, args.drain_timeout_s, args.log_level) == (1.0, 30.0, "info")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--heartbeat", "0"], "--heartbeat: expected more than 0 seconds, got 0"),
        (["--heartbeat", "nan"], "--heartbeat: expected more than 0 seconds, got nan"),
        (["--heartbeat", "inf"], "--heartbeat: expected more than 0 seconds, got inf"),
        (["--drain-timeout", "-1"], "--drain-timeout: expected 0 seconds or more, got -1"),
        (["--log-level", "dbug"], "--log-level: unknown level 'dbug': did you mean 'debug'?"),
    ],
)
def test_what_is_wrong_is_refused_alike(parse: Parse, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(*argv)


@pytest.mark.parametrize("option", ["--registry", "--heartbeat", "--plugin", "--log-level"])
def test_two_dashes_are_no_value(parse: Parse, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CommandLineRefused) as refused:
        parse(f"{option}=--")

    assert f"argument {option}: expected a value, got '--'" == refused.value.message
    assert 1 == capsys.readouterr().err.count("\n")


def test_what_stands_behind_two_dashes_is_no_option() -> None:
    made = Parser()
    made.add_argument("words", nargs="*")

    assert ["--a=--"] == made.parse_args(["--", "--a=--"]).words


@pytest.mark.parametrize("made", [worker_args.parser(), router_args.parser()], ids=["worker", "router"])
def test_help_names_the_brokers_and_has_an_example_and_exit_codes(made: Any) -> None:
    said = made.format_help()

    assert ENVIRONMENT_HELP in said
    for part in ("example", "exit codes: 0 after SIGTERM", "--registry", "--heartbeat", "--plugin"):
        assert part in said
    assert "{" not in said


def test_the_frontend_refuses_an_unknown_level_like_the_others() -> None:
    with pytest.raises(ConfigError, match="--log-level: unknown level 'loud'"):
        frontend.run(["--log-level", "loud"])
