"""``python -m vswa_plugin.worker``: see ``--help``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from vswa_plugin.dynamo.runtime import run_on_uvloop
from vswa_plugin.host.loading import load_host
from vswa_plugin.program.life import Life
from vswa_plugin.program.run import run_program, set_up_logging
from vswa_plugin.registry.opening import open_registry, registry_from_env
from vswa_plugin.tracing import export_spans
from vswa_plugin.worker.app import Worker
from vswa_plugin.worker.args import parse, parser, with_engine_name

logger = logging.getLogger(__name__)

NAME = "vswa worker"
PROGRAM = "python -m vswa_plugin.worker"


def run(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run one worker. What is local is checked before any connection is tried."""
    args = parse(argv, reader=parser(program))
    set_up_logging(args.log_level)
    os.environ.update(args.variables)
    export_spans("vswa-worker", os.environ)
    for note in args.notes:
        logger.info("%s", note)
    life = Life(NAME)
    tasks = life.tasks
    registry = open_registry(args.registry, tasks=tasks) if args.registry else registry_from_env(tasks=tasks)
    with load_host(args.plugin, args.no_plugin, options=args.plugin_options) as host:
        engine = host.engine(args.settings)
        host.event_adapter(engine.event_format, engine.info.layout)  # refused now rather than after start
        args = with_engine_name(args, engine)
        return run_on_uvloop(life.run(Worker(args, host, engine, registry, life)))


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """The exit code; ``program`` is what usage and refusals call it."""
    return run_program(NAME, lambda: run(argv, program))


if __name__ == "__main__":
    sys.exit(main())
