"""``vswa envoy-config``: print a configuration of Envoy for Dynamo's frontend and a picker of ours."""

from __future__ import annotations

import argparse
import json

from vswa_plugin.launch.envoy import Address, EnvoySettings, envoy_config
from vswa_plugin.program.options import port


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Envoy removes the headers by which a client could choose its worker itself, sends each request that "
        "generates to the picker, and then to a frontend. docs/gateway.md says what each part does."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address that Envoy listens on (127.0.0.1)")
    parser.add_argument("--port", type=port, default=8000, help="port that Envoy listens on (8000)")
    parser.add_argument(
        "--frontend",
        action="append",
        metavar="HOST:PORT",
        help="one of Dynamo's frontends; several share the requests (127.0.0.1:8001)",
    )
    parser.add_argument(
        "--picker",
        action="append",
        metavar="HOST:PORT",
        help="gRPC of a `vswa picker`; several share the requests (127.0.0.1:9002)",
    )
    parser.add_argument(
        "--closed",
        action="store_true",
        help="refuse requests while no picker answers; without it, the frontend chooses by its own mode then",
    )


def run(args: argparse.Namespace) -> int:
    settings = EnvoySettings(
        Address(args.host, args.port),
        tuple(Address.parse("--frontend", each) for each in args.frontend or ["127.0.0.1:8001"]),
        tuple(Address.parse("--picker", each) for each in args.picker or ["127.0.0.1:9002"]),
        args.closed,
    )
    print(json.dumps(envoy_config(settings), indent=2))
    return 0
