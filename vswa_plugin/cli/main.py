"""The command ``vswa``: finds the subcommand, runs it, turns errors into a line and an exit code.

The exit codes are those of program/run.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vswa_plugin import __version__
from vswa_plugin.cli import (
    BUILT_IN,
    PROGRAMS,
    WITHOUT_OPTIONS,
    WITHOUT_PLUGINS,
    built_in,
    built_in_helps,
    built_in_owners,
)
from vswa_plugin.errors import ConfigError, PluginFailed, VswaError, unknown_choice
from vswa_plugin.program.run import log_plainly, run_program

if TYPE_CHECKING:
    from vswa_plugin.hookspecs.commands import Command

_SHOWN_BY_VSWA = ("-h", "--help", "--version")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code. ``--help`` and wrong options end in SystemExit."""
    return run_program("vswa", lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"vswa {__version__}")
        return 0
    from vswa_plugin.cli.parsers import global_parser
    from vswa_plugin.host.loading import load_host

    before, name, after = _split(argv)
    if name in PROGRAMS and not any(word in _SHOWN_BY_VSWA for word in before):
        # The options before the name are the program's own; it refuses one that it does not have.
        return PROGRAMS[name].main([*before, *after], f"vswa {name}")
    given, rest = global_parser(add_help=False).parse_known_args(argv)
    _set_up_logging(given.log_level)
    if name in BUILT_IN:
        return _run_command(built_in(name), built_in_helps(), given, rest)
    # Stays open while the command runs: its code may live in a plugin's file.
    with load_host(given.plugin, given.no_plugin, options=given.plugin_options) as host:
        added = {command.name: command for command in host.commands(built_in_owners())}
        helps = {**built_in_helps(), **{command.name: command.help for command in added.values()}}
        if name and name not in helps:
            raise ConfigError(unknown_choice("command", name, helps))
        return _run_command(added.get(name), helps, given, rest)


def _split(argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """The words before the name of the command, the name (empty: there is none), and the words after it."""
    from vswa_plugin.cli.parsers import GLOBAL_OPTIONS

    is_value = False
    for index, word in enumerate(argv):
        if not is_value and not word.startswith("-"):
            return list(argv[:index]), word, list(argv[index + 1 :])
        is_value = not is_value and word in GLOBAL_OPTIONS
    return list(argv), "", []


def _set_up_logging(level: str | None) -> None:
    from vswa_plugin.host.loading import tracing

    chosen = level.upper() if level else logging.INFO if tracing(os.environ) else logging.WARNING
    log_plainly("vswa: %(message)s")
    logging.getLogger().setLevel(chosen)


def _run_command(
    command: Command | None, helps: dict[str, str], given: argparse.Namespace, rest: Sequence[str]
) -> int:
    from vswa_plugin.cli.parsers import command_parser

    parser = command_parser(helps, command)
    args = parser.parse_args(rest)
    if command is None:
        parser.print_help()
        return 0
    args.plugin, args.no_plugin, args.plugin_options = given.plugin, given.no_plugin, given.plugin_options
    if command.name in WITHOUT_PLUGINS:
        for option, names in (("--plugin", args.plugin), ("--no-plugin", args.no_plugin)):
            if names:
                raise ConfigError(
                    f"{option}: expected no plugin, got {names}: `vswa {command.name}` loads none"
                )
    if args.plugin_options is not None and command.name in WITHOUT_OPTIONS:
        raise ConfigError(
            f"--plugin-options: expected no options of plugins, got {args.plugin_options}: no plugin acts in "
            f"`vswa {command.name}`"
        )
    if command.name in BUILT_IN:
        return command.run(args)
    return _run_of_plugin(command, args)


def _run_of_plugin(command: Command, args: argparse.Namespace) -> int:
    """What a plugin's command raises unforeseen is that plugin's failure, and is said to be."""
    try:
        return command.run(args)
    except (VswaError, OSError):
        raise
    except Exception as error:
        raise PluginFailed(
            f"{command.owner} failed in `vswa {command.name}`: {type(error).__name__}: {error}"
        ) from error
