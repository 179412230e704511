"""The public names, as docs/api.md lists them; ``python -m tests.api_page > docs/api.md`` writes the page.

A module of PUBLIC lists its public names in ``__all__``; what each is comes from the first line of its
docstring, and for constants and type aliases from the ``#:`` comment above them.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

#: Module -> who imports it, and for what.
PUBLIC = {
    "vswa_plugin": "All that the smallest plugin needs.",
    "vswa_plugin.hookspecs": "For plugin authors: how hooks and commands are marked. "
    "The hooks are in [hooks.md](hooks.md).",
    "vswa_plugin.engine": "For authors of engines and event adapters: settings, requests, chunks, "
    "KV events, and the shape of an engine.",
    "vswa_plugin.engine.presets": "Known models, for simulations ([models-hybrid.md](models-hybrid.md)).",
    "vswa_plugin.blocks": "Layouts, hashes and reuse rules.",
    "vswa_plugin.wire": "The batches of events that workers publish, as values and as bytes "
    "([protocol.md](protocol.md)).",
    "vswa_plugin.errors": "What is raised on purpose.",
    "vswa_plugin.files": "Files and JSON that others wrote, read within bounds.",
    "vswa_plugin.index": "Which rank holds which block of which cache group, and what each could reuse.",
    "vswa_plugin.selection": "What a candidate costs, and which one is chosen.",
    "vswa_plugin.following.fleet": "For programs that follow a deployment: registry, "
    "event streams and index together.",
    "vswa_plugin.following.subscriber": "The event streams alone, for any index.",
    "vswa_plugin.registry": "The entries of live workers, and what a registry must do.",
    "vswa_plugin.registry.opening": "The registry that an address or the environment names.",
    "vswa_plugin.accuracy.trace": "Engine traces ([accuracy.md](accuracy.md)).",
    "vswa_plugin.accuracy.replay": "Traces, replayed through the real event path.",
    "vswa_plugin.accuracy.report": "What a replay measured.",
    "vswa_plugin.accuracy.scorers": "Ways to predict what an engine will reuse.",
    "vswa_plugin.testing.host": "A plugin host for tests. [testing.md](testing.md) explains all of "
    "`vswa_plugin.testing`.",
    "vswa_plugin.testing.engine": "An engine of a few lines, and events in TensorRT-LLM's format.",
    "vswa_plugin.testing.streams": "A real publisher and a real follower, in memory or "
    "over a real nats-server.",
    "vswa_plugin.testing.memory": "A message broker without a process.",
    "vswa_plugin.testing.faults": "What a network may do to messages.",
    "vswa_plugin.testing.mutations": "Events that are almost well-formed.",
    "vswa_plugin.testing.conformance": "Suites for engines and event adapters.",
    "vswa_plugin.testing.phases": "The suite for engines that compute prompts for one another.",
    "vswa_plugin.testing.rules": "The suite for reuse rules.",
    "vswa_plugin.testing.walks": "What the engines' own matching reuses, token by token.",
    "vswa_plugin.testing.cases": "Random caches and prompts for reuse rules.",
    "vswa_plugin.testing.scorers": "The suite for scorers.",
    "vswa_plugin.testing.registries": "The suite for registries.",
    "vswa_plugin.testing.registry_outages": "The suite for registries that can be put out of reach.",
    "vswa_plugin.testing.registry_backends": "What a registry's author provides for the suites.",
}

INTRODUCTION = """\
# What may be imported

Plugins, test suites and programs of others build on the names below. A change that breaks one of them is
named in the CHANGELOG together with what replaces it. Every other module and name is free to change in any
version: import names from the module under which they are listed here, not from the file that defines them.
The first-party plugins keep to this as well, and a test checks it.

The commands are in [cli.md](cli.md), HTTP is in [router-api.md](router-api.md), and the events on
NATS are in [protocol.md](protocol.md). A test compares this page with the code;
`python -m tests.api_page > docs/api.md` writes it anew.
"""


@dataclass(frozen=True)
class Public:
    name: str
    kind: str
    line: str


def names_of(module: ModuleType) -> Iterator[Public]:
    for name in module.__all__:
        value = getattr(module, name)
        kind, line = _described(module, name, value)
        yield Public(name, kind, line)


def _described(module: ModuleType, name: str, value: object) -> tuple[str, str]:
    if inspect.isclass(value):
        kind = "error" if issubclass(value, BaseException) else "protocol" if _is_protocol(value) else "class"
        return kind, _first_line(value.__dict__.get("__doc__"))
    if inspect.isfunction(value):
        return "function", _first_line(value.__doc__)
    return "value", _comment(module, name)


def _is_protocol(value: type) -> bool:
    return bool(getattr(value, "_is_protocol", False))


def _first_line(docstring: str | None) -> str:
    return inspect.cleandoc(docstring or "").split("\n\n")[0].replace("\n", " ").strip()


def _plain(line: str) -> str:
    """Without the roles of Sphinx."""
    return re.sub(r":\w+:`~?\.?([\w.]+)`", r"``\1``", line)


def _comment(module: ModuleType, name: str) -> str:
    """The ``#:`` comment above the definition, in this module or in the one that it was imported from."""
    source = inspect.getsource(module)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return _comment(import_module(node.module), name)
    above = re.search(rf"((?:^#:.*\n)+){name}\b\s*[:=]", source, re.MULTILINE)
    return " ".join(line.removeprefix("#:").strip() for line in above[1].splitlines()) if above else ""


def page() -> str:
    parts = [INTRODUCTION]
    for path, purpose in PUBLIC.items():
        module = import_module(path)
        rows = "\n".join(
            f"| `{public.name}` | {public.kind} | {_cell(public.line)} |" for public in names_of(module)
        )
        parts.append(f"## `{path}`\n\n{purpose}\n\n| name | | |\n|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def _cell(line: str) -> str:
    return _plain(line).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
