"""Subcommands of ``vswa``: the table of built-in ones, and what plugins add to it.

A built-in command is a module of this package with ``configure(parser)`` and ``run(args) -> int``; it is
imported only when it is asked for; ``demo`` is a package.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TypeAlias

from vswa_plugin.errors import PluginError

Configure: TypeAlias = Callable[[argparse.ArgumentParser], None]
Run: TypeAlias = Callable[[argparse.Namespace], int]

#: Built-in command -> its one-line help. The module is ``vswa_plugin.cli.<name>``, or what ``_MODULES`` says.
BUILT_IN: Mapping[str, str] = {
    "accuracy": "how often a router's promise is kept, on recorded engine traces",
    "demo": "see it work: brokers, frontend, two workers, a few requests, and every window's events",
    "events": "follow the KV block events of every worker and window",
    "explain": "what every rank could reuse of a prompt, and what spoilt the rest",
    "index": "what every rank holds, per window and tier, live",
    "plugins": "list plugins: version, hooks, where from, and why one is not loaded",
    "serve": "the demo's servers, left running for your own requests",
}

_MODULES = {"demo": "vswa_plugin.cli.demo.run"}
_NAME = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Command:
    """One subcommand; ``owner`` says in messages who provides it."""

    name: str
    help: str
    owner: str
    configure: Configure
    run: Run


class Commands:
    """Where one plugin adds its subcommands; given to ``vswa_register_commands``.

    :param owner: the plugin's name.
    :param taken: command name -> owner, for the commands that exist already.
    """

    def __init__(self, owner: str, taken: Mapping[str, str]) -> None:
        self._owner = f"plugin {owner!r}"
        self._taken = dict(taken)
        self.added: list[Command] = []

    def add(self, name: str, help: str, configure: Configure, run: Run) -> None:
        """Add one subcommand.

        :param name: lower-case letters, digits and dashes.
        :param help: one line for the list of commands.
        :param configure: called with the command's ``argparse.ArgumentParser``.
        :param run: called with the parsed arguments; returns the exit code.
        :raises PluginError: a name that is taken or not well-formed, or something that cannot be called.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PluginError(f"{self._owner}: expected a command name like 'make-model', got {name!r}")
        if name in self._taken:
            raise PluginError(
                f"{self._owner} adds the command {name!r}, which {self._taken[name]} provides already; "
                f"rename it, or switch one of the two off with --no-plugin"
            )
        if not isinstance(help, str) or not help.strip():
            raise PluginError(f"{self._owner}, command {name!r}: expected one line of help, got {help!r}")
        for what, given in (("configure", configure), ("run", run)):
            if not callable(given):
                raise PluginError(
                    f"{self._owner}, command {name!r}: expected a function for {what}, got {given!r}"
                )
        self._taken[name] = self._owner
        self.added.append(Command(name, help, self._owner, configure, run))


def built_in(name: str) -> Command:
    """Import the module of one built-in command."""
    module = import_module(_MODULES.get(name, f"vswa_plugin.cli.{name.replace('-', '_')}"))
    return Command(name, BUILT_IN[name], "vswa itself", module.configure, module.run)


def built_in_owners() -> dict[str, str]:
    """The names that plugins cannot take, with their owner."""
    return dict.fromkeys(BUILT_IN, "vswa itself")
