"""``vswa completion``: a script for bash or zsh that completes commands, options, values and files."""

from __future__ import annotations

import argparse
import re
import sys

from vswa_plugin.cli.parsers import full_parser
from vswa_plugin.host.loading import load_host
from vswa_plugin.program.run import LEVELS

_SHELLS = ("bash", "zsh")
_EPILOG = """\
examples:
  vswa completion bash > ~/.local/share/bash-completion/completions/vswa
  vswa completion zsh > ~/.zfunc/_vswa     where fpath has ~/.zfunc, before compinit
  eval "$(vswa completion bash)"           for this shell only

The script holds the commands and options of this version and of the plugins that are loaded: write it again
when either changes.
"""
#: What a metavar, or the name of an option, says of its values: words to choose from, a file, a directory.
_WORDS = re.compile(r"[a-z][a-z0-9_-]*")
_FILES = ("FILE", "FILE_OR_MODULE", "TRACE")
_DIRECTORIES = ("DIR",)
_MODELS = ("model_path",)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("shell", choices=_SHELLS, help="the shell that the script is for")


def run(args: argparse.Namespace) -> int:
    import shtab

    with load_host(args.plugin, args.no_plugin) as host:
        parser = full_parser(host)
    _add_values(parser)
    sys.stdout.write(shtab.complete(parser, shell=args.shell) + "\n")
    return 0


def _add_values(parser: argparse.ArgumentParser) -> None:
    """Say in shtab's terms what values each option takes. The parser is read once and thrown away."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _add_values(below)
        elif action.metavar in _FILES or action.dest in _MODELS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest == "log_level":
            action.choices = LEVELS
        elif isinstance(action.metavar, str) and "|" in action.metavar:
            action.choices = [word for word in action.metavar.split("|") if _WORDS.fullmatch(word)]
