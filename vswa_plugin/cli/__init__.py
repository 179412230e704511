"""Subcommands of ``vswa``: the table of built-in ones, and what plugins add to it.

A built-in command is a module of this package with ``configure(parser)`` and ``run(args) -> int``; it is
imported only when it is asked for; ``demo`` is a package.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from vswa_plugin.hookspecs.commands import Command

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


def built_in(name: str) -> Command:
    """Import the module of one built-in command."""
    module = import_module(_MODULES.get(name, f"vswa_plugin.cli.{name.replace('-', '_')}"))
    return Command(name, BUILT_IN[name], "vswa itself", module.configure, module.run)


def built_in_owners() -> dict[str, str]:
    """The names that plugins cannot take, with their owner."""
    return dict.fromkeys(BUILT_IN, "vswa itself")
