"""Subcommands that plugins add to ``vswa``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from vswa_plugin.errors import PluginError

Configure: TypeAlias = Callable[[argparse.ArgumentParser], None]
Run: TypeAlias = Callable[[argparse.Namespace], int]
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
