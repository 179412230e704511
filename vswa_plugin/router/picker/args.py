"""The picker's command line: that of a selector, and where it serves Envoy."""

from __future__ import annotations

import argparse
import os
import re
import ssl
from collections.abc import Mapping, Sequence

import msgspec

from vswa_plugin.dynamo.names import DEFAULT_NAMESPACE, NAMESPACE_ENV
from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.program.args import add_run_arguments, make_parser
from vswa_plugin.program.options import port, real, requires
from vswa_plugin.router.args import ENVIRONMENT, RouterArgs, add_shared_arguments, checked

#: That of the pickers of the Gateway API inference extension.
GRPC_PORT = 9002
DEFAULT_TTL_S = 600.0
_ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}")
_EPILOG = """\
example, with nats-server and etcd running. Workers show themselves to Dynamo's frontend, Envoy stands before
it, and asks the picker for each request which worker it goes to:
  vswa worker --model-path /tmp/gemma --register frontend &
  vswa frontend --http-port 8001 &
  vswa picker --grpc-port 9002 --http-port 8093 &
  vswa envoy-config --port 8000 --frontend 127.0.0.1:8001 --picker 127.0.0.1:9002 > envoy.json
  envoy -c envoy.json
  curl localhost:8000/v1/models

`vswa launch agg_router --router picker` starts all of it, Envoy too. docs/gateway.md has the manifests for a
Gateway and an InferencePool on Kubernetes.

What becomes of a request:
  picked            it goes on with the headers that pin it to the chosen worker and rank, and counts as load
                    until its answer ends
  passed            it goes on unchanged, and the frontend's own mode decides: it does not generate, or the
                    frontend will refuse it
  404, 400          no worker serves the model; what it says about its routing cannot be met
  503, 429          no worker can serve it right now; too many requests are under way
Where this program does not answer, Envoy lets requests go on to the frontend's own mode or refuses them, as
its configuration says (failure_mode_allow; `vswa envoy-config --closed`).

The first token is seen where the frontend's headers wait for it: start the frontend with
DYN_HTTP_PRE_COMMIT_ERROR_PEEK_MS=600000, as `vswa launch` does. Otherwise a prompt counts as computed when
the frontend has taken the request.

environment:
{environment}  DYN_ROUTER_*     defaults of the cost options above, by Dynamo's names

exit codes: 0 after SIGTERM, 1 when broker, registry or preprocessor failed, 2 for what you can correct.
"""


class PickerArgs(msgspec.Struct, frozen=True):
    """:param port: of gRPC; 0 takes a free one.
    :param ttl_s: how long a request counts as load at most.
    :param destinations: see :class:`~vswa_plugin.router.picker.destinations.Destinations`.
    :param tls: certificate and key of the gRPC server; None: plain.
    """

    host: str
    port: int
    ttl_s: float
    destinations: tuple[str, ...] = ()
    tls: tuple[str, str] | None = None

    def context(self) -> ssl.SSLContext | None:
        """How gRPC is secured; raises ConfigError where the certificate cannot be used."""
        if self.tls is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2"])
        try:
            context.load_cert_chain(*self.tls)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"--tls-cert, --tls-key: expected a certificate and its key as PEM files, got {error}"
            ) from error
        return context


def picker_parser(program: str = "vswa picker") -> argparse.ArgumentParser:
    made = make_parser(
        program,
        "Choose the worker of each request of an Envoy gateway, by what every attention window really holds "
        "and by load, over Envoy's external processing protocol: the answers do not pass this program.",
        _EPILOG.replace("{environment}", ENVIRONMENT),
    )
    made.set_defaults(endpoint=None, served_model_name=None, selector_only=False)
    run = made.add_argument_group("how it runs")
    run.add_argument(
        "--namespace",
        help=f"Dynamo namespace of the workers, or `all` ({NAMESPACE_ENV}, else {DEFAULT_NAMESPACE})",
    )
    add_run_arguments(run)
    grpc = made.add_argument_group("Envoy")
    grpc.add_argument(
        "--grpc-port",
        type=port,
        default=GRPC_PORT,
        metavar="PORT",
        help=f"serve Envoy on this port, where 0 stands for a free one ({GRPC_PORT})",
    )
    grpc.add_argument("--grpc-host", default="127.0.0.1", metavar="HOST", help="address of it (127.0.0.1)")
    grpc.add_argument("--tls-cert", metavar="FILE", help="serve Envoy with TLS: a certificate as a PEM file")
    grpc.add_argument("--tls-key", metavar="FILE", help="the key of that certificate")
    grpc.add_argument(
        "--destination",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="frontends that requests are sent to in turn, where the gateway lets the picker choose the "
        "endpoint (an InferencePool): an address, or a name, for all its addresses; may be repeated",
    )
    grpc.add_argument(
        "--request-timeout",
        type=real,
        default=DEFAULT_TTL_S,
        metavar="SECONDS",
        help=f"how long a request counts as load at most ({DEFAULT_TTL_S:g})",
    )
    http = made.add_argument_group("HTTP API (docs/router-api.md)")
    add_shared_arguments(made, run, http, "off")
    return made


def parse_picker(
    argv: Sequence[str] | None, program: str = "vswa picker", environ: Mapping[str, str] | None = None
) -> tuple[RouterArgs, PickerArgs]:
    """Read and check the command line; raises ConfigError, or SystemExit from argparse."""
    given = picker_parser(program).parse_args(argv)
    for destination in given.destination:
        if not _ADDRESS.fullmatch(destination):
            raise ConfigError(f"--destination: expected HOST:PORT, got {shown(destination)}")
    if not 0 < given.request_timeout <= 86_400:
        raise ConfigError(f"--request-timeout: expected 0 < seconds <= 86400, got {given.request_timeout:g}")
    requires("--tls-key", given.tls_key, "--tls-cert", given.tls_cert)
    requires("--tls-cert", given.tls_cert, "--tls-key", given.tls_key)
    tls = (given.tls_cert, given.tls_key) if given.tls_cert is not None else None
    picker = PickerArgs(
        given.grpc_host, given.grpc_port, given.request_timeout, tuple(given.destination), tls
    )
    picker.context()
    return checked(given, os.environ if environ is None else environ), picker
