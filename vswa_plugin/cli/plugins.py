"""``vswa plugins``: what is loaded, what is not, and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vswa_plugin.host.loading import load_host
from vswa_plugin.host.registered import PluginStatus

_HEADINGS = ("plugin", "version", "state", "from", "hooks, or why not")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON list, for scripts")


def run(args: argparse.Namespace) -> int:
    with _without_warnings(), load_host(args.plugin, args.no_plugin, options=args.plugin_options) as host:
        statuses = host.plugins()
    if args.json:
        json.dump([dataclasses.asdict(status) for status in statuses], sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif not statuses:
        sys.stdout.write("no plugins: is the package installed? Try: pip show vswa-plugin\n")
    elif sys.stdout.isatty():
        _show_table(statuses)
    else:
        _show_lines(statuses)
    return 0


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The list itself says why a plugin is not loaded; saying it twice hides the rest."""
    logger = logging.getLogger("vswa_plugin.host.host")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _row(status: PluginStatus) -> tuple[str, ...]:
    what = " ".join(status.hooks) if status.state == "loaded" else status.reason
    return (status.name, status.version or "-", status.state, status.source, what)


def _show_lines(statuses: list[PluginStatus]) -> None:
    """One line per plugin, however long: a pipe has no width, and grep wants whole lines."""
    rows = [_HEADINGS, *map(_row, statuses)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        sys.stdout.write("  ".join([*cells, row[-1]]) + "\n")


def _show_table(statuses: list[PluginStatus]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for status in statuses:
        name, version, state, source, what = _row(status)
        style = {"loaded": "green", "failed": "red"}.get(state, "dim")
        if state == "loaded":
            what = what.replace(" ", "\n")
        # Text, not markup: names and reasons may contain square brackets.
        table.add_row(Text(name), Text(version), Text(state, style), Text(source), Text(what))
    Console().print(table)
