"""The HTTP part of the router's command line."""

from __future__ import annotations

import argparse

import msgspec

from vswa_plugin.errors import ConfigError

#: That of Dynamo's selection service.
SELECTOR_PORT = 8092


class HttpArgs(msgspec.Struct, frozen=True):
    """:param port: 0 takes a free one; None: no HTTP.
    :param selector_only: show no model and forward nothing, answer ``/select``.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    selector_only: bool = False


def add_http_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--http-port",
        type=int,
        metavar="PORT",
        help=f"serve the HTTP API, 0: on a free port (with --selector-only {SELECTOR_PORT}, else off)",
    )
    group.add_argument(
        "--http-host",
        default="127.0.0.1",
        metavar="HOST",
        help="address of the HTTP API, which asks nobody who they are (127.0.0.1)",
    )
    group.add_argument(
        "--selector-only",
        action="store_true",
        help="show no model and forward nothing: answer /select for gateways that pin requests to workers "
        "which the frontend sees itself",
    )


def http_args(given: argparse.Namespace) -> HttpArgs:
    """Raises ConfigError."""
    port: int | None = given.http_port
    if port is None and given.selector_only:
        port = SELECTOR_PORT
    if port is not None and not 0 <= port < 65_536:
        raise ConfigError(f"--http-port: expected a port from 0 to 65535, got {port}")
    return HttpArgs(given.http_host, port, given.selector_only)
