"""``python -m vswa_plugin.relay``: see ``--help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vswa_plugin.dynamo.runtime import run_on_uvloop
from vswa_plugin.errors import ConfigError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host
from vswa_plugin.program.life import Life
from vswa_plugin.program.run import run_program, set_up_logging
from vswa_plugin.registry.opening import open_registry, registry_from_env
from vswa_plugin.relay.app import Relay
from vswa_plugin.relay.args import parse, parser
from vswa_plugin.relay.listed import Listed

NAME = "vswa relay"
PROGRAM = "python -m vswa_plugin.relay"


def run(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the relay. What is local is checked before any connection is tried."""
    args = parse(argv, reader=parser(program))
    set_up_logging(args.log_level)
    _ = (
        open_registry(args.registry) if args.registry else registry_from_env()
    )  # refused now where it is wrong
    life = Life(NAME)
    with load_host(args.plugin, args.no_plugin, options=args.plugin_options) as host:
        for worker in args.workers:
            _check(worker, host)
        return run_on_uvloop(life.run(Relay(args, host, life)))


def _check(worker: Listed, host: PluginHost) -> None:
    """Refuse, before anything is reached, what cannot be relayed."""
    try:
        source = host.event_source(worker.of_instance(0, "127.0.0.1").source)
        host.event_adapter(source.event_format, source.info.layout)
    except ConfigError as error:
        error.add_note(f"this is about {worker.name}")
        raise


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """The exit code; ``program`` is what usage and refusals call it."""
    return run_program(NAME, lambda: run(argv, program))


if __name__ == "__main__":
    sys.exit(main())
