"""Subcommands of ``vswa``: the tables of built-in commands and programs.

A built-in command is a module of this package with ``configure(parser)`` and ``run(args) -> int``; ``demo``
is a package. A program also runs as ``python -m``; its module has ``parser(program)`` and
``main(argv, program) -> int``. Either is imported only when it is asked for.

main.py             finds the subcommand, runs it, turns errors into a line and an exit code
parsers.py          the parsers of all commands and programs
accuracy.py         ``vswa accuracy``
accuracy_route.py   ``vswa accuracy route``
choice.py           ``vswa explain --choice``
brokers.py          ``vswa brokers``
completion.py       ``vswa completion``
doctor.py           ``vswa doctor``
envoy_config.py     ``vswa envoy-config``
events.py           ``vswa events``
explain.py          ``vswa explain``
explained.py        the picture of ``vswa explain``
prompts.py          the tokens of its prompt
index.py            ``vswa index``
new_plugin.py       ``vswa new-plugin``
pages.py            what ``vswa index`` reads of workers and routers over HTTP
plugins.py          ``vswa plugins``
serve.py            ``vswa serve``
top.py              the live display of ``vswa index``
local.py            what ``serve`` and ``demo`` share
demo                ``vswa demo``
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vswa_plugin.hookspecs.commands import Command

#: Built-in command -> its one-line help. The module is ``vswa_plugin.cli.<name>``, or what ``_MODULES`` says.
BUILT_IN: Mapping[str, str] = {
    "accuracy": "measure how often a router's promise is kept, on recorded engine traces",
    "brokers": "run an embedded nats-server and etcd on loopback, for a laptop; never for production",
    "completion": "print a script that completes commands, options and values in bash or zsh",
    "demo": "run the whole system once, with a few requests, and show the events of every window",
    "doctor": "look at what a deployment needs here: versions, brokers, workers, ports, GPUs, clocks",
    "envoy-config": "print a configuration of Envoy for Dynamo's frontend and a picker",
    "events": "follow the KV block events of every worker and window",
    "explain": "show what every rank could reuse of a prompt, and which missing block prevents more",
    "index": "show live what every rank holds, per window and tier",
    "new-plugin": "write a new plugin package, whose tests pass, for you to change",
    "plugins": "list the plugins: version, hooks, origin, and why one is not loaded",
    "serve": "run the demo's servers until a signal, for your own requests",
}

#: Built-in commands that load no plugins; what they start has options of its own for them.
WITHOUT_PLUGINS = frozenset({"brokers", "demo", "envoy-config", "events", "new-plugin", "serve"})

#: Built-in commands in which no plugin acts, so that options of plugins would do nothing.
WITHOUT_OPTIONS = WITHOUT_PLUGINS | {"completion"}

_MODULES = {
    "demo": "vswa_plugin.cli.demo.run",
    "envoy-config": "vswa_plugin.cli.envoy_config",
    "new-plugin": "vswa_plugin.cli.new_plugin",
}


@dataclass(frozen=True)
class ProgramEntry:
    """A program that is also a subcommand; ``module`` has the functions ``main_name`` and ``parser_name``."""

    help: str
    module: str
    main_name: str = "main"
    parser_name: str = "parser"

    def main(self, argv: Sequence[str], program: str) -> int:
        """Run it; ``program`` is what usage and refusals call it."""
        code: int = getattr(import_module(self.module), self.main_name)(argv, program)
        return code

    def parser(self, program: str) -> argparse.ArgumentParser:
        """Its command line."""
        made: argparse.ArgumentParser = getattr(import_module(self.module), self.parser_name)(program)
        return made


PROGRAMS: Mapping[str, ProgramEntry] = {
    "frontend": ProgramEntry("run Dynamo's OpenAI-compatible HTTP frontend", "vswa_plugin.frontend"),
    "launch": ProgramEntry("run a whole deployment in the foreground", "vswa_plugin.launch.__main__"),
    "picker": ProgramEntry(
        "choose the workers of an Envoy gateway's requests, whose answers do not pass it",
        "vswa_plugin.router.__main__",
        "main_picker",
        "picker_parser",
    ),
    "relay": ProgramEntry(
        "publish and register workers that are not ours, such as Dynamo's own vLLM workers",
        "vswa_plugin.relay.__main__",
    ),
    "router": ProgramEntry(
        "run the exact router, which stands before the workers and scores every window",
        "vswa_plugin.router.__main__",
    ),
    "selector": ProgramEntry(
        "run a router that only answers /select, for gateways: router --selector-only",
        "vswa_plugin.router.__main__",
        "main_selector",
        "selector_parser",
    ),
    "worker": ProgramEntry(
        "run one engine behind Dynamo, and publish the events of every window", "vswa_plugin.worker.__main__"
    ),
}


def built_in(name: str) -> Command:
    """Import the module of one built-in command."""
    from vswa_plugin.hookspecs.commands import Command

    module = import_module(_MODULES.get(name, f"vswa_plugin.cli.{name}"))
    return Command(name, BUILT_IN[name], "vswa itself", module.configure, module.run)


def built_in_helps() -> dict[str, str]:
    """The one-line help of each program and built-in command; programs come first."""
    return {**{name: program.help for name, program in PROGRAMS.items()}, **BUILT_IN}


def built_in_owners() -> dict[str, str]:
    """The names that plugins cannot take, with their owner."""
    return dict.fromkeys(built_in_helps(), "vswa itself")
