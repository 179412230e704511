"""Subcommands that plugins add to ``vswa``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from vswa_plugin.engine.predicted import RankSetup, SimulatedRank
from vswa_plugin.errors import PluginError

Configure: TypeAlias = Callable[[argparse.ArgumentParser], None]
Run: TypeAlias = Callable[[argparse.Namespace], int]
_NAME = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Command:
    """One subcommand. Messages name its ``owner``, which provides it."""

    name: str
    help: str
    owner: str
    configure: Configure
    run: Run


class Commands:
    """Takes the subcommands of one plugin; ``vswa_register_commands`` gets one of these.

    :param owner: the plugin's name.
    :param taken: command name -> owner, for the commands that exist already.
    :param simulated_rank: see the attribute.
    :ivar simulated_rank: the cache of one rank without its model, by whichever plugin has it
        (``vswa_simulated_rank``); for commands, while they run. It raises ConfigError for sizes that cannot
        work, PluginError where no plugin simulates the reuse rule.
    """

    def __init__(
        self, owner: str, taken: Mapping[str, str], simulated_rank: Callable[[RankSetup], SimulatedRank]
    ) -> None:
        self._owner = f"plugin {owner!r}"
        self._taken = dict(taken)
        self.simulated_rank = simulated_rank
        self.added: list[Command] = []

    def add(self, name: str, help: str, configure: Configure, run: Run) -> None:
        """Add one subcommand.

        :param name: lower-case letters, digits and dashes.
        :param help: one line for the list of commands.
        :param configure: called with the command's ``argparse.ArgumentParser``.
        :param run: called with the parsed arguments; returns the exit code.
        :raises PluginError: the name is taken or not well-formed, or one of the two cannot be called.
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
