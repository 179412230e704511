"""``python -m vswa_plugin.router``: see ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from vswa_plugin.dynamo.runtime import run_on_uvloop
from vswa_plugin.errors import ConfigError
from vswa_plugin.host.loading import load_host
from vswa_plugin.program.life import Life
from vswa_plugin.program.run import run_program, set_up_logging
from vswa_plugin.registry.opening import open_registry, registry_from_env
from vswa_plugin.router.app import Router
from vswa_plugin.router.args import parse, parser, selector_parser
from vswa_plugin.router.selector.app import Selector
from vswa_plugin.tracing import export_spans

NAME, SELECTOR_NAME, PICKER_NAME = "vswa router", "vswa selector", "vswa picker"
PROGRAM = "python -m vswa_plugin.router"


def run(argv: Sequence[str] | None, reader: argparse.ArgumentParser) -> int:
    """Run one router. What is local is checked before any connection is tried."""
    args = parse(argv, reader=reader)
    set_up_logging(args.log_level)
    export_spans("vswa-router", os.environ)
    life = Life(SELECTOR_NAME if args.http.selector_only else NAME)
    tasks = life.tasks
    registry = open_registry(args.registry, tasks=tasks) if args.registry else registry_from_env(tasks=tasks)
    with load_host(args.plugin, args.no_plugin, options=args.plugin_options) as host:
        program = (Selector if args.http.selector_only else Router)(args, host, registry, life)
        return run_on_uvloop(life.run(program))


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """The exit code; ``program`` is what usage and refusals call it."""
    return run_program(NAME, lambda: run(argv, parser(program)))


def main_selector(argv: Sequence[str] | None, program: str) -> int:
    """A router with ``--selector-only``, without the options that have no effect then."""
    return run_program(SELECTOR_NAME, lambda: run(argv, selector_parser(program)))


def run_picker(argv: Sequence[str] | None, program: str) -> int:
    """Run one picker."""
    # Imported here: what it needs besides is in the extra `gateway`.
    from vswa_plugin.router.picker.args import parse_picker

    args, picker = parse_picker(argv, program)
    try:
        from vswa_plugin.router.picker.app import PickerProgram
    except ImportError as error:
        raise ConfigError(
            f"expected the extra gateway, got {error}; pip install 'vswa-plugin[gateway]'"
        ) from error
    set_up_logging(args.log_level)
    life = Life(PICKER_NAME)
    tasks = life.tasks
    registry = open_registry(args.registry, tasks=tasks) if args.registry else registry_from_env(tasks=tasks)
    with load_host(args.plugin, args.no_plugin, options=args.plugin_options) as host:
        return run_on_uvloop(life.run(PickerProgram(args, picker, host, registry, life)))


def main_picker(argv: Sequence[str] | None, program: str) -> int:
    """The exit code; ``program`` is what usage and refusals call it."""
    return run_program(PICKER_NAME, lambda: run_picker(argv, program))


def picker_parser(program: str) -> argparse.ArgumentParser:
    from vswa_plugin.router.picker import args

    return args.picker_parser(program)


if __name__ == "__main__":
    sys.exit(main())
