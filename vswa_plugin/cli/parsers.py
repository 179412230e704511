"""The parser of ``vswa``: the options of all commands, and the subcommands."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from vswa_plugin import __version__
from vswa_plugin.cli import BUILT_IN, PROGRAMS, built_in, built_in_owners
from vswa_plugin.errors import PluginFailed, VswaError
from vswa_plugin.hookspecs.commands import Command
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import add_plugin_arguments
from vswa_plugin.program.run import LEVELS, TRACEBACK_ENV, Parser, exit_codes_help

logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Per-window KV cache events for sliding-window models, such as Gemma 3, behind NVIDIA Dynamo. Workers publish
which blocks every attention window holds, so that a router knows what each can really resume. The programs
of a deployment are commands here (vswa worker, also python -m vswa_plugin.worker); the other commands look
at a deployment from outside."""

_EXAMPLES = f"""\
examples:
  vswa demo                             see it work, from a chat request to every window's events
  vswa index                            what every worker holds, per window, live
  vswa plugins                          what is loaded, from where, and why something is not
  vswa --plugin ./mine.py plugins       the same, with a plugin that you are writing
  vswa --no-plugin prometheus plugins   the same, with one switched off
  vswa COMMAND --help                   the options of one command

{exit_codes_help()}
{TRACEBACK_ENV}=1 or --log-level debug adds the traceback to the line of each error.
"""
#: Options of :func:`global_parser` that take a value.
GLOBAL_OPTIONS = ("--plugin", "--no-plugin", "--plugin-options", "--log-level")


def global_parser(*, add_help: bool = True) -> argparse.ArgumentParser:
    """Options that may stand before or after the subcommand."""
    parser = Parser(
        prog="vswa",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=add_help,
    )
    add_plugin_arguments(parser)
    parser.add_argument(
        "--log-level", choices=LEVELS, metavar="LEVEL", help="debug, info, warning (default) or error"
    )
    return parser


def command_parser(helps: Mapping[str, str], chosen: Command | None = None) -> argparse.ArgumentParser:
    """A parser that lists the commands of ``helps`` and knows the options of ``chosen``."""
    parser, subparsers = _with_subparsers()
    for name, text in helps.items():
        added = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        if chosen is not None and name == chosen.name:
            configure(chosen, added)
    return parser


def full_parser(host: PluginHost) -> argparse.ArgumentParser:
    """A parser that knows all commands with all of their options; it imports all of them.

    Of a plugin that fails in adding its options, it knows those that were added before.
    """
    parser, subparsers = _with_subparsers()
    for name, program in PROGRAMS.items():
        parent = program.parser(f"vswa {name}")
        subparsers.add_parser(name, help=program.help, parents=[parent], add_help=False, allow_abbrev=False)
    commands: Sequence[Command] = [*map(built_in, BUILT_IN), *host.commands(built_in_owners())]
    for command in commands:
        added = subparsers.add_parser(command.name, help=command.help, allow_abbrev=False)
        try:
            configure(command, added)
        except PluginFailed as error:
            logger.warning("%s", error)
    return parser


def configure(command: Command, parser: argparse.ArgumentParser) -> None:
    """Add the options of ``command``.

    :raises PluginFailed: the plugin that provides it raises something unforeseen.
    """
    try:
        command.configure(parser)
    except VswaError:
        raise
    except Exception as error:
        if command.name in BUILT_IN:
            raise
        raise PluginFailed(
            f"{command.owner} failed in the options of `vswa {command.name}`: {type(error).__name__}: {error}"
        ) from error


def _with_subparsers() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[Any]]:
    parser = global_parser()
    parser.add_argument("--version", action="version", version=f"vswa {__version__}")
    return parser, parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
