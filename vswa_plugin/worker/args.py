"""The worker's command line. Everything that can be checked without a connection is checked here."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from vswa_plugin import __version__
from vswa_plugin.dynamo import NATS_ENV, EndpointName, default_endpoint
from vswa_plugin.engine import MODES, EngineSettings
from vswa_plugin.engine_args import load_engine_args
from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.plugin_loading import add_plugin_arguments
from vswa_plugin.programs import LEVELS
from vswa_plugin.registry.opening import ENVIRONMENT, REGISTRY_ENV
from vswa_plugin.transport import DEFAULT_SERVER, check_name

#: How a worker shows itself, and which router it works behind.
REGISTER_ENV, ROUTER_ENV = "VSWA_REGISTER", "VSWA_ROUTER"
REGISTER = ("auto", "frontend", "hidden")
#: Our router, or the one in Dynamo's frontend.
ROUTERS = ("exact", "stock")

_EXAMPLE = """\
modes, each with an example on a machine where nats-server and etcd run:
  vswa make-model /tmp/gemma
  python -m vswa_plugin.frontend --http-port 8000

  agg       does both phases of a request.
    python -m vswa_plugin.worker --mode agg --model-path /tmp/gemma \\
        --extra-engine-args engine_configs/gemma3/vswa_agg.yaml

  prefill   computes a prompt's KV and holds it until a decode worker has taken it.
    python -m vswa_plugin.worker --mode prefill --model-path /tmp/gemma \\
        --extra-engine-args engine_configs/gemma3/vswa_prefill.yaml

  decode    takes that KV, of sliding layers the last window only, and generates. Neither serves alone.
    python -m vswa_plugin.worker --mode decode --model-path /tmp/gemma \\
        --extra-engine-args engine_configs/gemma3/vswa_decode.yaml

  curl localhost:8000/v1/models

`python -m vswa_plugin.launch agg|agg_router|disagg|disagg_router` starts all of this with one command.

--register says who may send requests. frontend: Dynamo's frontends, which find the model on this worker.
hidden: only routers that know the worker from our registry, as `python -m vswa_plugin.router` does, which
shows the model itself; were the worker visible too, the frontend would send requests past the router.
auto: hidden where VSWA_ROUTER=exact, as the launcher sets it, else frontend.

environment:
  VSWA_REGISTER    default of --register
  VSWA_ROUTER      exact or stock: the router in front, for --register auto
  NATS_SERVER      where batches are published   (default nats://127.0.0.1:4222)
  NATS_AUTH_USERNAME, NATS_AUTH_PASSWORD | NATS_AUTH_TOKEN | NATS_AUTH_NKEY | NATS_AUTH_CREDENTIALS_FILE
  NATS_TLS_CA_CERT_PATH, NATS_TLS_CLIENT_CERT_PATH, NATS_TLS_CLIENT_KEY_PATH   as Dynamo reads them
{registry}  DYN_LOG          level of Dynamo's own log
  VSWA_PLUGINS, VSWA_PLUGINS_DISABLED, VSWA_TRACE_PLUGINS   see `vswa --help`

exit codes: 0 after SIGTERM, 1 when engine, broker or runtime failed, 2 for what you can correct.
"""


class Showing(msgspec.Struct, frozen=True):
    """:param visible: whether Dynamo's frontends are shown the model.
    :param reason: why, in words.
    """

    visible: bool
    reason: str


def showing(register: str, environ: Mapping[str, str]) -> Showing:
    """What ``--register`` means in this environment; raises ConfigError."""
    if register not in REGISTER:
        raise ConfigError(f"--register: {unknown_choice('way', register, REGISTER)}")
    if register != "auto":
        return Showing(register == "frontend", f"--register {register}")
    router = environ.get(ROUTER_ENV, "")
    if router and router not in ROUTERS:
        raise ConfigError(f"{ROUTER_ENV}: {unknown_choice('router', router, ROUTERS)}")
    if router == "exact":
        return Showing(False, f"{ROUTER_ENV}=exact, its router shows the model")
    return Showing(True, f"{ROUTER_ENV}={router}" if router else f"no {ROUTER_ENV}")


class WorkerArgs(msgspec.Struct, frozen=True):
    """A checked command line."""

    settings: EngineSettings
    endpoint: EndpointName
    nats_server: str
    registry: str | None
    heartbeat_s: float
    drain_timeout_s: float
    showing: Showing
    taints: tuple[str, ...]
    status_host: str
    status_port: int | None
    log_level: str
    plugin: list[str]
    no_plugin: list[str]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m vswa_plugin.worker",
        description="Serve a model through NVIDIA Dynamo and publish the KV block events of every "
        "attention window on NATS.",
        epilog=_EXAMPLE.replace("{registry}", ENVIRONMENT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=__version__)
    model = made.add_argument_group("what is served")
    model.add_argument("--mode", default="agg", metavar="|".join(MODES), help="see below (agg)")
    model.add_argument(
        "--engine",
        default=os.environ.get("VSWA_ENGINE", "gemma3_cpu"),
        help="an engine that a plugin provides (`vswa plugins`); default gemma3_cpu or VSWA_ENGINE",
    )
    model.add_argument(
        "--model-path",
        required=True,
        help="directory of a Hugging Face checkpoint; gemma3_cpu also takes a GGUF file",
    )
    model.add_argument("--served-model-name", help="what clients call it (default: the directory's name)")
    model.add_argument(
        "--extra-engine-args", metavar="FILE", help="engine options, YAML in TensorRT-LLM's format"
    )
    model.add_argument(
        "--override-engine-args", metavar="JSON", help="options laid over the file, as a JSON object"
    )
    model.add_argument(
        "--data-parallel-size", type=int, default=1, metavar="N", help="ranks with a cache each (1)"
    )
    model.add_argument(
        "--reuse-rule",
        metavar="RULE",
        help="by which rule the engine reuses blocks, where you know better than its plugin: trtllm_v2, "
        "trtllm_v1 or trtllm_v1_contiguous (default: the engine says)",
    )
    run = made.add_argument_group("how it runs")
    run.add_argument(
        "--endpoint",
        help=f"dyn://namespace.component.endpoint (dyn://{default_endpoint('agg')}, of prefill workers "
        f"dyn://{default_endpoint('prefill')})",
    )
    run.add_argument(
        "--registry", metavar="etcd|file:DIR", help=f"where to announce the worker (default: {REGISTRY_ENV})"
    )
    run.add_argument(
        "--register",
        metavar="|".join(REGISTER),
        help=f"whether Dynamo's frontends see the worker, see below (default: {REGISTER_ENV}, else auto)",
    )
    run.add_argument(
        "--taint",
        action="append",
        default=[],
        metavar="NAME",
        help="a label that requests can demand or prefer (routing_constraints); may be repeated",
    )
    run.add_argument("--status-port", type=int, metavar="PORT", help="serve /health, /ready and /metrics")
    run.add_argument("--status-host", default="127.0.0.1", help="address for --status-port (127.0.0.1)")
    run.add_argument("--heartbeat", type=float, default=1.0, metavar="SECONDS", help="between heartbeats (1)")
    run.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long SIGTERM waits for requests under way (30)",
    )
    run.add_argument("--log-level", default="info", help="debug, info (default), warning or error")
    add_plugin_arguments(made)
    return made


def parse(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> WorkerArgs:
    """Read and check the command line; raises ConfigError, or SystemExit from argparse.

    :param environ: of the worker; ours unless given.
    """
    environ = os.environ if environ is None else environ
    given = parser().parse_args(argv)
    if given.mode not in MODES:
        raise ConfigError(f"--mode: {unknown_choice('mode', given.mode, MODES)}")
    if given.log_level not in LEVELS:
        raise ConfigError(f"--log-level: {unknown_choice('level', given.log_level, LEVELS)}")
    if given.heartbeat <= 0 or given.drain_timeout < 0:
        raise ConfigError("--heartbeat: expected more than 0 seconds, --drain-timeout: 0 or more")
    if given.data_parallel_size < 1:
        raise ConfigError(f"--data-parallel-size: expected at least 1, got {given.data_parallel_size}")
    endpoint = EndpointName.parse(given.endpoint) if given.endpoint else default_endpoint(given.mode)
    check_name("--endpoint, namespace", endpoint.namespace)
    check_name("--endpoint, component", endpoint.component)
    if not Path(given.model_path).exists():
        raise ConfigError(
            f"--model-path: expected a model at {given.model_path}, got nothing there; "
            "`vswa make-model DIR` writes a small random one"
        )
    options, source = load_engine_args(given.extra_engine_args, given.override_engine_args)
    if given.reuse_rule is not None:
        section = options.get("vswa")
        options["vswa"] = {**(section if isinstance(section, dict) else {}), "reuse_rule": given.reuse_rule}
        source = f"--reuse-rule and {source}"
    model_path = str(Path(given.model_path).resolve())
    return WorkerArgs(
        settings=EngineSettings(
            engine=given.engine,
            mode=given.mode,
            model_path=model_path,
            served_model_name=given.served_model_name or Path(model_path).name,
            options=options,
            options_source=source,
            data_parallel_size=given.data_parallel_size,
        ),
        endpoint=endpoint,
        nats_server=environ.get(NATS_ENV, DEFAULT_SERVER),
        registry=given.registry,
        heartbeat_s=given.heartbeat,
        drain_timeout_s=given.drain_timeout,
        showing=showing(given.register or environ.get(REGISTER_ENV) or "auto", environ),
        taints=_taints(given.taint),
        status_host=given.status_host,
        status_port=given.status_port,
        log_level=given.log_level,
        plugin=given.plugin,
        no_plugin=given.no_plugin,
    )


def _taints(given: Sequence[str]) -> tuple[str, ...]:
    if not all(name.strip() for name in given):
        raise ConfigError("--taint: expected a name, got nothing")
    return tuple(dict.fromkeys(given))
