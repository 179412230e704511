"""The command ``vswa``: finds the subcommand, runs it, turns errors into a line and an exit code.

Exit codes: what the command returns; 2 for what the user can correct; 130 after Ctrl-C; 141 when the reader
of our output has gone.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from vswa_plugin import __version__
from vswa_plugin.cli import BUILT_IN, built_in, built_in_owners
from vswa_plugin.errors import ConfigError, InvariantError, VswaError, unknown_choice
from vswa_plugin.hookspecs.commands import Command
from vswa_plugin.host.loading import add_plugin_arguments, load_host, tracing

_DESCRIPTION = """\
Per-window KV cache events for sliding-window models, such as Gemma 3, behind NVIDIA Dynamo. Workers publish
which blocks every attention window holds, so that a router knows what each can really resume. This command
looks at a deployment from outside; a worker itself is started with python -m vswa_plugin.worker."""

_EXAMPLES = """\
examples:
  vswa demo                             see it work, from a chat request to every window's events
  vswa index                            what every worker holds, per window, live
  vswa plugins                          what is loaded, from where, and why something is not
  vswa --plugin ./mine.py plugins       the same, with a plugin that you are writing
  vswa --no-plugin prometheus plugins   the same, with one switched off
  vswa COMMAND --help                   the options of one command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code. ``--help`` and wrong options end in SystemExit."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except InvariantError:
        # A bug of ours: the traceback is what a report needs.
        raise
    except VswaError as error:
        print(f"vswa: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: list[str]) -> int:
    given, rest = _global_parser(add_help=False).parse_known_args(argv)
    if rest[:1] == ["--version"]:
        print(f"vswa {__version__}")
        return 0
    level = logging.INFO if tracing(os.environ) else logging.WARNING
    logging.basicConfig(level=level, format="vswa: %(message)s")
    name = next((word for word in rest if not word.startswith("-")), None)
    if name is not None and name in BUILT_IN:
        return _run_one_of([built_in(name)], given, rest)
    # Stays open while the command runs: its code may live in a plugin's file.
    with load_host(given.plugin, given.no_plugin) as host:
        added = host.commands(built_in_owners())
        known = [*BUILT_IN, *(command.name for command in added)]
        if name is not None and name not in known:
            raise ConfigError(unknown_choice("command", name, known))
        return _run_one_of([*map(built_in, BUILT_IN), *added], given, rest)


def _run_one_of(commands: Sequence[Command], given: argparse.Namespace, rest: list[str]) -> int:
    parser = _global_parser()
    parser.add_argument("--version", action="version", version=f"vswa {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in commands:
        command.configure(
            subparsers.add_parser(
                command.name, help=command.help, description=command.help, allow_abbrev=False
            )
        )
    args = parser.parse_args(rest)
    for command in commands:
        if command.name == args.command:
            args.plugin, args.no_plugin = given.plugin, given.no_plugin
            return command.run(args)
    parser.print_help()
    return 0


def _global_parser(*, add_help: bool = True) -> argparse.ArgumentParser:
    """Options that may stand before or after the subcommand."""
    parser = argparse.ArgumentParser(
        prog="vswa",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=add_help,
    )
    add_plugin_arguments(parser)
    return parser
