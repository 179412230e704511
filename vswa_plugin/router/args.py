"""The router's command line. Options of the cost have Dynamo's names, and Dynamo's variables as defaults."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vswa_plugin.dynamo.names import (
    DEFAULT_NAMESPACE,
    NAMESPACE_ENV,
    ROUTER_COMPONENT,
    EndpointName,
    named_namespace,
    worker_namespace,
)
from vswa_plugin.errors import ConfigError
from vswa_plugin.following.view import ViewOptions
from vswa_plugin.host.loading import add_plugin_arguments
from vswa_plugin.program.args import ENVIRONMENT_HELP, RunArgs, add_run_arguments, make_parser, run_args
from vswa_plugin.program.options import encodable, excludes, integer, read_number, real, requires
from vswa_plugin.router.http.guard import TOKEN_ENV, token_from
from vswa_plugin.selection import Weights
from vswa_plugin.wire.subjects import check_name

_EXAMPLE = """\
example, with nats-server and etcd running. The frontend must not see the workers themselves, so they get a
namespace of their own:
  python -m vswa_plugin.worker --endpoint dyn://workers.backend.generate --model-path /tmp/gemma
  python -m vswa_plugin.router --endpoint dyn://dynamo.router.generate --namespace workers
  python -m vswa_plugin.frontend --namespace dynamo --http-port 8000
  curl localhost:8000/v1/models

Each model is shown on --endpoint with its name appended (dynamo.router.generate-gemma), the one that is given
by --served-model-name on --endpoint itself.
Where a model has prefill and decode workers, each request goes to one of both, chosen one after the other;
aggregated workers beside them serve only while one of these kinds is away.
A request can be pinned (backend_instance_id, dp_rank; prefill_worker_id, prefill_dp_rank), restricted
(allowed_worker_ids, routing_constraints) and have its own knobs (router_config_override); what Dynamo's
PrefillRouter overrides on its own is ignored.
Priorities and policy classes are ignored too: this router has no queue.

environment:
{environment}  DYN_ROUTER_*     defaults of the cost options above, by Dynamo's names

exit codes: 0 after SIGTERM, 1 when broker or runtime failed, 2 for what you can correct.
"""
_SELECTOR_EXAMPLE = """\
example, with nats-server, etcd, workers and Dynamo's frontend running:
  vswa selector --http-port 8092
  curl localhost:8092/openapi.json

A gateway asks /select for each request and pins the request to the answer with Dynamo's headers.

environment:
{environment}  DYN_ROUTER_*     defaults of the cost options above, by Dynamo's names

exit codes: 0 after SIGTERM, 1 when broker or registry failed, 2 for what you can correct.
"""
#: What ``--promise`` takes.
PROMISES = ("score", "forecast")
#: That of Dynamo's selection service.
SELECTOR_PORT = 8092
_DEFAULT_ENDPOINT = f"dyn://{DEFAULT_NAMESPACE}.{ROUTER_COMPONENT}.generate"
#: For ``--help`` of routers and selectors.
ENVIRONMENT = f"""\
{ENVIRONMENT_HELP}  DYN_NAMESPACE    where no option names a namespace ({DEFAULT_NAMESPACE})
  DYN_NAMESPACE_WORKER_SUFFIX   appended to that of the workers with a hyphen, as Dynamo's workers do
  {TOKEN_ENV}  a token that clients of the HTTP API must send, but for /health and /ready
"""
#: Knob -> option of Dynamo's KV router, and what it does.
_NUMBERS = {
    "overlap_score_credit": ("router-kv-overlap-score-credit", "credit of a cached block on the device"),
    "overlap_score_credit_decay": (
        "router-kv-overlap-score-credit-decay",
        "how fast that credit shrinks where more prompt tokens are in flight than on the least loaded rank",
    ),
    "prefill_load_scale": ("router-prefill-load-scale", "weight of blocks to compute against blocks held"),
    "host_cache_hit_weight": ("router-host-cache-hit-weight", "credit of a cached block in host memory"),
    "disk_cache_hit_weight": ("router-disk-cache-hit-weight", "credit of a cached block on disk"),
    "decode_active_request_weight": (
        "router-decode-active-request-weight",
        "cost of each active request, in blocks",
    ),
    "in_flight_credit": (
        "in-flight-credit",
        "how far a prefix that the rank computes for another request counts as cached; no option of Dynamo",
    ),
    "transfer_credit": (
        "transfer-credit",
        "credit of a block that the decode worker holds, so that it is not moved; no option of Dynamo",
    ),
    "router_temperature": (
        "router-temperature",
        "0 takes the cheapest rank; a larger number draws one at random by cost",
    ),
}
_SWITCHES = {
    "assume_kv_reuse": ("router-assume-kv-reuse", "count prompt blocks that requests share once"),
    "track_prefill_tokens": ("router-track-prefill-tokens", "count prompts that wait for their first token"),
    "track_active_blocks": ("router-track-active-blocks", "count blocks that active requests hold"),
    "track_output_blocks": ("router-track-output-blocks", "count blocks of generated tokens"),
}
_WORDS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


class HttpArgs(msgspec.Struct, frozen=True):
    """:param port: 0 takes a free one; None: no HTTP.
    :param selector_only: show no model and forward nothing, answer ``/select``.
    :param token: that clients must send; None: anybody is answered.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    selector_only: bool = False
    token: str | None = None


class RouterArgs(RunArgs, frozen=True, kw_only=True):
    """A checked command line.

    :param served_model_name: the only model that is shown; None: all.
    :param namespace: of the workers; None: all.
    :param promise: one of :data:`PROMISES`: what a rank has cached now, or when a request's turn comes.
    """

    endpoint: EndpointName
    served_model_name: str | None
    namespace: str | None
    weights: Weights
    stale_grace_s: float
    max_lag_s: float
    http: HttpArgs
    promise: str = PROMISES[0]

    @property
    def view(self) -> ViewOptions:
        """How long what is doubtful of a worker is believed."""
        return ViewOptions(
            heartbeat_s=self.heartbeat_s, stale_grace_s=self.stale_grace_s, max_lag_s=self.max_lag_s
        )


def parser(program: str = "python -m vswa_plugin.router") -> argparse.ArgumentParser:
    made = make_parser(
        program,
        "Show the workers' models to Dynamo's frontend and send each request to the worker that "
        "reuses most of its prompt, by what every attention window really holds, and has least to do.",
        _EXAMPLE.replace("{environment}", ENVIRONMENT),
    )
    run = made.add_argument_group("how it runs")
    run.add_argument(
        "--endpoint",
        help=f"where the frontend finds the models, dyn://namespace.component.endpoint ({_DEFAULT_ENDPOINT})",
    )
    run.add_argument(
        "--served-model-name",
        type=encodable,
        metavar="NAME",
        help="show this model only, on --endpoint itself",
    )
    run.add_argument(
        "--namespace",
        help=f"Dynamo namespace of the workers, or `all` (default: {NAMESPACE_ENV}, else that of --endpoint)",
    )
    add_run_arguments(run)
    http = made.add_argument_group("HTTP API (docs/router-api.md)")
    http.add_argument(
        "--selector-only",
        action="store_true",
        help="show no model and forward nothing: answer /select for gateways that pin requests to workers "
        "which the frontend sees itself",
    )
    add_shared_arguments(made, run, http, f"with --selector-only {SELECTOR_PORT}, else off")
    return made


def selector_parser(program: str = "python -m vswa_plugin.router --selector-only") -> argparse.ArgumentParser:
    """The options of a router that have an effect with ``--selector-only``, which is implied."""
    made = make_parser(
        program,
        "Answer /select: which worker reuses most of a prompt, by what every attention window really holds, "
        "and has least to do. It shows no model and forwards no request.",
        _SELECTOR_EXAMPLE.replace("{environment}", ENVIRONMENT),
    )
    made.set_defaults(endpoint=None, served_model_name=None, selector_only=True)
    run = made.add_argument_group("how it runs")
    run.add_argument(
        "--namespace",
        help=f"Dynamo namespace of the workers, or `all` ({NAMESPACE_ENV}, else {DEFAULT_NAMESPACE})",
    )
    add_run_arguments(run, drains=False)
    http = made.add_argument_group("HTTP API (docs/router-api.md)")
    add_shared_arguments(made, run, http, str(SELECTOR_PORT))
    return made


def add_shared_arguments(
    made: argparse.ArgumentParser,
    run: argparse._ArgumentGroup,
    http: argparse._ArgumentGroup,
    default_port: str,
) -> None:
    """What routers and selectors have besides their common options."""
    run.add_argument(
        "--stale-grace",
        type=real,
        default=10.0,
        metavar="SECONDS",
        help="how long a worker whose events are missing is scored as last seen (10)",
    )
    run.add_argument(
        "--max-lag",
        type=real,
        metavar="SECONDS",
        help="do not score a worker while its events arrive later than that (no bound); clocks may differ",
    )
    run.add_argument(
        "--promise",
        choices=PROMISES,
        default=PROMISES[0],
        metavar="|".join(PROMISES),
        help=f"score: expect what a worker has cached now; forecast: what it will have cached when the "
        f"requests before have had their turn, for small loads only: docs/accuracy.md ({PROMISES[0]})",
    )
    http.add_argument(
        "--http-port",
        type=integer,
        metavar="PORT",
        help=f"serve the HTTP API on this port, where 0 stands for a free one ({default_port})",
    )
    http.add_argument(
        "--http-host",
        metavar="HOST",
        help=f"address of the HTTP API, which answers anybody unless {TOKEN_ENV} is set ({HttpArgs().host})",
    )
    _add_knobs(made.add_argument_group("what a worker costs, in blocks (names of Dynamo's KV router)"))
    add_plugin_arguments(made)


def _add_knobs(group: argparse._ArgumentGroup) -> None:
    defaults = Weights()
    for knob, (option, what) in _NUMBERS.items():
        names = [f"--{option}"]
        if option.startswith("router-kv-"):
            names.append(f"--{option.removeprefix('router-kv-')}")
        group.add_argument(
            *names, dest=knob, type=real, metavar="X", help=f"{what} ({getattr(defaults, knob):g})"
        )
    for knob, (option, what) in _SWITCHES.items():
        shown = "yes" if getattr(defaults, knob) else "no"
        group.add_argument(
            f"--{option}", dest=knob, action=argparse.BooleanOptionalAction, help=f"{what} ({shown})"
        )


def parse(
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    reader: argparse.ArgumentParser | None = None,
) -> RouterArgs:
    """Read and check the command line; raises ConfigError, or SystemExit from argparse.

    :param reader: :func:`parser` unless given.
    """
    return checked((reader or parser()).parse_args(argv), os.environ if environ is None else environ)


def checked(given: argparse.Namespace, environ: Mapping[str, str]) -> RouterArgs:
    """What a parser of this module has read; raises ConfigError."""
    _check_effects(given)
    run = run_args(given, environ)
    if not given.stale_grace >= 0:
        raise ConfigError(f"--stale-grace: expected 0 seconds or more, got {given.stale_grace:g}")
    if given.max_lag is not None and not given.max_lag > 0:
        raise ConfigError(f"--max-lag: expected more than 0 seconds, got {given.max_lag:g}")
    endpoint = _endpoint(given.endpoint, environ)
    namespace = given.namespace
    if namespace is None:
        namespace = worker_namespace(environ, named_namespace(environ, endpoint.namespace))
    elif namespace != "all":
        check_name("--namespace", namespace)
    return RouterArgs(
        **msgspec.structs.asdict(run),
        endpoint=endpoint,
        served_model_name=given.served_model_name,
        namespace=None if given.namespace == "all" else namespace,
        weights=_weights(given, environ),
        stale_grace_s=given.stale_grace,
        max_lag_s=math.inf if given.max_lag is None else given.max_lag,
        http=_http_args(given, environ),
        promise=given.promise,
    )


def _endpoint(given: str | None, environ: Mapping[str, str]) -> EndpointName:
    """The namespace of the environment is the frontend's: the suffix belongs to workers alone."""
    if given is not None:
        return EndpointName.parse(given)
    return EndpointName(named_namespace(environ), ROUTER_COMPONENT, "generate")


def _weights(given: argparse.Namespace, environ: Mapping[str, str]) -> Weights:
    """Option, else Dynamo's variable, else the default."""
    chosen: dict[str, Any] = {}
    for knob, (option, _) in {**_NUMBERS, **_SWITCHES}.items():
        value = getattr(given, knob)
        variable = f"DYN_{option.upper().replace('-', '_')}"
        if value is None and option.startswith("router-") and environ.get(variable):
            value = _read(variable, environ[variable], knob in _SWITCHES)
        if value is not None:
            chosen[knob] = value
    return Weights(**chosen).check()


def _read(variable: str, text: str, switch: bool) -> float | bool:
    if switch:
        if (word := _WORDS.get(text.lower())) is None:
            raise ConfigError(f"{variable}: expected true or false, got {text!r}")
        return word
    try:
        return read_number(text, float)
    except ValueError as error:
        raise ConfigError(f"{variable}: expected a number, got {text!r}") from error


def _check_effects(given: argparse.Namespace) -> None:
    """Raise ConfigError for an option that would have no effect."""
    only = given.selector_only
    excludes("--served-model-name", given.served_model_name, "--selector-only", only)
    excludes("--endpoint", given.endpoint, "--selector-only --namespace", only and given.namespace)
    excludes("--drain-timeout", given.drain_timeout, "--selector-only", only)
    if not only:
        requires("--http-host", given.http_host, "--http-port", given.http_port)


def _http_args(given: argparse.Namespace, environ: Mapping[str, str]) -> HttpArgs:
    """Raises ConfigError."""
    port: int | None = given.http_port
    if port is None and given.selector_only:
        port = SELECTOR_PORT
    if port is not None and not 0 <= port < 65_536:
        raise ConfigError(f"--http-port: expected a port from 0 to 65535, got {port}")
    host = HttpArgs().host if given.http_host is None else given.http_host
    return HttpArgs(host, port, given.selector_only, token_from(environ))
