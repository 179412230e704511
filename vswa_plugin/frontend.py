"""``python -m vswa_plugin.frontend``: Dynamo's own OpenAI HTTP frontend, out of the runtime wheel."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vswa_plugin.dynamo.client_fields import LOST
from vswa_plugin.dynamo.frontend import FrontendSettings, serve_frontend
from vswa_plugin.dynamo.kubernetes import reach_kubernetes
from vswa_plugin.dynamo.names import NAMESPACE_ENV, PREFIX_ENV, ROUTER_MODES
from vswa_plugin.dynamo.runtime import connect, run_on_uvloop
from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.program.addresses import check_address, http_url
from vswa_plugin.program.args import add_log_level, check_log_level, make_parser, nats_server
from vswa_plugin.program.life import Life, Program
from vswa_plugin.program.options import excludes, port, zero_or_more
from vswa_plugin.program.run import run_program, set_up_logging
from vswa_plugin.registry.opening import reach_discovery
from vswa_plugin.wire.subjects import check_name
from vswa_plugin.wire.transport import Transport

logger = logging.getLogger("vswa_plugin.frontend")

NAME = "vswa frontend"
PROGRAM = "python -m vswa_plugin.frontend"

_EXAMPLE = """\
example:
  python -m vswa_plugin.frontend --http-port 8000
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "gemma", "messages": [{"role": "user", "content": "Hello"}]}'

Models appear as their workers register.

environment:
  NATS_SERVER, ETCD_ENDPOINTS            where the brokers are
  DYN_NAMESPACE, DYN_NAMESPACE_PREFIX    defaults of --namespace and --namespace-prefix
"""


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    made = make_parser(
        program,
        "NVIDIA Dynamo's OpenAI-compatible HTTP frontend, as `python -m dynamo.frontend` starts "
        "it, but from ai-dynamo-runtime alone.",
        _EXAMPLE,
    )
    made.add_argument("--http-host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    made.add_argument("--http-port", type=port, default=8000, help="port to listen on (8000)")
    made.add_argument(
        "--router-mode",
        default="round-robin",
        metavar="|".join(ROUTER_MODES),
        help="how workers are chosen (round-robin)",
    )
    made.add_argument(
        "--namespace", help=f"show only models of this Dynamo namespace (default: {NAMESPACE_ENV}, else all)"
    )
    made.add_argument(
        "--namespace-prefix",
        metavar="PREFIX",
        help="show models of all namespaces that begin so, as those of workers with a "
        f"DYN_NAMESPACE_WORKER_SUFFIX do (default: {PREFIX_ENV}, which goes before {NAMESPACE_ENV})",
    )
    made.add_argument(
        "--migration-limit",
        type=zero_or_more,
        default=3,
        help="how often a request may move to another worker (3)",
    )
    add_log_level(made)
    return made


class Frontend(Program):
    """Dynamo's frontend as a program of ours."""

    def __init__(self, settings: FrontendSettings, life: Life) -> None:
        self._settings = settings
        self._tasks = life.tasks
        self._runtime: Any = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await _probe()
        self._runtime = connect()
        # Any endpoint will do: nothing is written.
        await reach_kubernetes(self._runtime.endpoint("vswa.frontend.probe"), 30, writes=False)
        serving = asyncio.create_task(serve_frontend(self._runtime, self._settings), name="Dynamo's frontend")
        hint = f"is port {self._settings.http_port} taken, or was etcd away for longer than its lease?"
        self._serving = serving
        self._tasks.watch(serving, hint)
        logger.info("listening on %s/v1", http_url(self._settings.http_host, self._settings.http_port))
        logger.info(
            "Dynamo's frontend drops these fields of requests without an error, do not send them: %s; see "
            "docs/request-fields.md",
            ", ".join(LOST),
        )

    async def end(self) -> None:
        if self._runtime is not None:
            self._runtime.shutdown()
        if self._serving is not None:
            await asyncio.wait({self._serving}, timeout=10)


async def _probe() -> None:
    """Dynamo's runtime would block for minutes where a broker is away: find out first."""
    transport = Transport(nats_server(os.environ), "vswa frontend")
    await transport.connect(timeout=30)
    await transport.close()
    await reach_discovery(timeout_s=30)


def run(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the frontend; the exit code."""
    given = parser(program).parse_args(argv)
    set_up_logging(check_log_level(given.log_level))
    if given.router_mode not in ROUTER_MODES:
        raise ConfigError(f"--router-mode: {unknown_choice('mode', given.router_mode, ROUTER_MODES)}")
    namespace, prefix = _scope(given, os.environ)
    settings = FrontendSettings(
        # Dynamo takes numeric addresses only.
        http_host=check_address(given.http_host, given.http_port),
        http_port=given.http_port,
        router_mode=given.router_mode,
        namespace=namespace,
        namespace_prefix=prefix,
        migration_limit=given.migration_limit,
    )
    life = Life(NAME)
    return run_on_uvloop(life.run(Frontend(settings, life)))


def _scope(given: argparse.Namespace, environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The namespace, or the begin of namespaces, of which models are shown; the options go first.

    :raises ConfigError: names the option or variable that is wrong.
    """
    excludes("--namespace", given.namespace, "--namespace-prefix", given.namespace_prefix)
    named = (("--namespace", given.namespace), ("--namespace-prefix", given.namespace_prefix))
    if all(name is None for _, name in named):
        prefix = environ.get(PREFIX_ENV) or None
        named = (
            (NAMESPACE_ENV, None if prefix else environ.get(NAMESPACE_ENV) or None),
            (PREFIX_ENV, prefix),
        )
    for where, name in named:
        if name is not None:
            check_name(where, name)
    return named[0][1], named[1][1]


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """The exit code; ``program`` is what usage and refusals call it."""
    return run_program(NAME, lambda: run(argv, program))


if __name__ == "__main__":
    sys.exit(main())
