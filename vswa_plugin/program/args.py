"""What our programs' command lines share: how help looks, and the options of workers and routers alike."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

import msgspec

from vswa_plugin import __version__
from vswa_plugin.dynamo.names import NATS_ENV
from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.program.options import real
from vswa_plugin.program.run import LEVELS, Parser
from vswa_plugin.registry.opening import ENVIRONMENT, REGISTRY_ENV
from vswa_plugin.wire.transport import DEFAULT_SERVER

DRAIN_TIMEOUT_S = 30.0
#: For ``--help`` of whatever speaks to the brokers.
ENVIRONMENT_HELP = f"""\
  NATS_SERVER      where workers publish their batches   (default {DEFAULT_SERVER})
  NATS_AUTH_USERNAME, NATS_AUTH_PASSWORD | NATS_AUTH_TOKEN | NATS_AUTH_NKEY | NATS_AUTH_CREDENTIALS_FILE
  NATS_TLS_CA_CERT_PATH, NATS_TLS_CLIENT_CERT_PATH, NATS_TLS_CLIENT_KEY_PATH   as Dynamo reads them
{ENVIRONMENT}  DYN_LOG          level of Dynamo's own log
  VSWA_PLUGINS, VSWA_PLUGINS_DISABLED, VSWA_TRACE_PLUGINS   see `vswa --help`
  VSWA_PLUGIN_OPTIONS, VSWA_PLUGIN_<NAME>_<KEY>   options of plugins: a file, and single ones
  VSWA_TERMINATION_LOG   a file for the reason why the program ended, e.g. /dev/termination-log
"""


class RunArgs(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker or router runs.

    :param registry: as VSWA_REGISTRY; None: what the environment says.
    :param heartbeat_s: between a worker's heartbeats.
    :param drain_timeout_s: how long SIGTERM waits for requests under way.
    """

    nats_server: str
    registry: str | None
    heartbeat_s: float
    drain_timeout_s: float
    log_level: str
    plugin: list[str]
    no_plugin: list[str]
    plugin_options: str | None


def make_parser(program: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with ``--version`` and an epilog that is shown as it is written."""
    made = Parser(
        prog=program,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=__version__)
    return made


def add_log_level(parser: argparse._ActionsContainer) -> None:
    """Add ``--log-level``, which :func:`check_log_level` checks."""
    parser.add_argument(
        "--log-level", default="info", metavar="LEVEL", help="debug, info (default), warning or error"
    )


def check_log_level(level: str) -> str:
    """``level`` itself; raises ConfigError where it is none."""
    if level not in LEVELS:
        raise ConfigError(f"--log-level: {unknown_choice('level', level, LEVELS)}")
    return level


def add_run_arguments(group: argparse._ArgumentGroup, *, drains: bool = True) -> None:
    """Add what :func:`run_args` reads, but for the options of plugins.

    :param drains: whether the program has requests under way as it stops.
    """
    group.add_argument(
        "--registry",
        metavar="etcd|file:DIR",
        help=f"where workers announce themselves (default: {REGISTRY_ENV})",
    )
    group.add_argument(
        "--heartbeat",
        type=real,
        default=1.0,
        metavar="SECONDS",
        help="time between two heartbeats of a worker (1); workers state it, and a router uses its own value "
        "for workers of older versions, which do not",
    )
    if drains:
        group.add_argument(
            "--drain-timeout",
            type=real,
            metavar="SECONDS",
            help=f"how long SIGTERM waits for requests under way ({DRAIN_TIMEOUT_S:g})",
        )
    else:
        group.set_defaults(drain_timeout=None)
    add_log_level(group)


def nats_server(environ: Mapping[str, str]) -> str:
    """Where workers publish; an empty NATS_SERVER counts as none."""
    return environ.get(NATS_ENV) or DEFAULT_SERVER


def run_args(given: argparse.Namespace, environ: Mapping[str, str]) -> RunArgs:
    """Check what was given; raises ConfigError."""
    if not 0 < given.heartbeat < math.inf:
        raise ConfigError(f"--heartbeat: expected more than 0 seconds, got {given.heartbeat:g}")
    drain_timeout_s: float = DRAIN_TIMEOUT_S if given.drain_timeout is None else given.drain_timeout
    if not 0 <= drain_timeout_s < math.inf:
        raise ConfigError(f"--drain-timeout: expected 0 seconds or more, got {drain_timeout_s:g}")
    return RunArgs(
        nats_server=nats_server(environ),
        registry=given.registry,
        heartbeat_s=given.heartbeat,
        drain_timeout_s=drain_timeout_s,
        log_level=check_log_level(given.log_level),
        plugin=given.plugin,
        no_plugin=given.no_plugin,
        plugin_options=given.plugin_options,
    )
