"""The worker's command line. Everything that can be checked without a connection is checked here."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vswa_plugin import __version__
from vswa_plugin.dynamo import NATS_ENV, EndpointName
from vswa_plugin.engine import MODES, EngineSettings
from vswa_plugin.engine_args import load_engine_args
from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.host import add_plugin_arguments
from vswa_plugin.programs import LEVELS
from vswa_plugin.registry.opening import ENVIRONMENT, REGISTRY_ENV
from vswa_plugin.transport import DEFAULT_SERVER, check_name

_EXAMPLE = """\
example, on a machine with nats-server and etcd running:
  vswa make-model /tmp/gemma
  python -m vswa_plugin.worker --mode agg --engine gemma3_cpu --model-path /tmp/gemma
  python -m vswa_plugin.frontend --http-port 8000
  curl localhost:8000/v1/models

environment:
  NATS_SERVER      where batches are published   (default nats://127.0.0.1:4222)
  NATS_AUTH_USERNAME, NATS_AUTH_PASSWORD | NATS_AUTH_TOKEN | NATS_AUTH_NKEY | NATS_AUTH_CREDENTIALS_FILE
  NATS_TLS_CA_CERT_PATH, NATS_TLS_CLIENT_CERT_PATH, NATS_TLS_CLIENT_KEY_PATH   as Dynamo reads them
{registry}  DYN_LOG          level of Dynamo's own log
  VSWA_PLUGINS, VSWA_PLUGINS_DISABLED, VSWA_TRACE_PLUGINS   see `vswa --help`

exit codes: 0 after SIGTERM, 1 when engine, broker or runtime failed, 2 for what you can correct.
"""
_DEFAULT_ENDPOINT = "dyn://dynamo.backend.generate"


class WorkerArgs(msgspec.Struct, frozen=True):
    """A checked command line."""

    settings: EngineSettings
    endpoint: EndpointName
    nats_server: str
    registry: str | None
    heartbeat_s: float
    drain_timeout_s: float
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
    model.add_argument("--mode", default="agg", metavar="|".join(MODES), help="agg (default): both phases")
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
    run = made.add_argument_group("how it runs")
    run.add_argument(
        "--endpoint",
        default=_DEFAULT_ENDPOINT,
        help=f"dyn://namespace.component.endpoint ({_DEFAULT_ENDPOINT})",
    )
    run.add_argument(
        "--registry", metavar="etcd|file:DIR", help=f"where to announce the worker (default: {REGISTRY_ENV})"
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


def parse(argv: Sequence[str] | None = None) -> WorkerArgs:
    """Read and check the command line; raises ConfigError, or SystemExit from argparse."""
    given = parser().parse_args(argv)
    if given.mode not in MODES:
        raise ConfigError(f"--mode: {unknown_choice('mode', given.mode, MODES)}")
    if given.log_level not in LEVELS:
        raise ConfigError(f"--log-level: {unknown_choice('level', given.log_level, LEVELS)}")
    if given.heartbeat <= 0 or given.drain_timeout < 0:
        raise ConfigError("--heartbeat: expected more than 0 seconds, --drain-timeout: 0 or more")
    endpoint = EndpointName.parse(given.endpoint)
    check_name("--endpoint, namespace", endpoint.namespace)
    check_name("--endpoint, component", endpoint.component)
    if not Path(given.model_path).exists():
        raise ConfigError(
            f"--model-path: expected a model at {given.model_path}, got nothing there; "
            "`vswa make-model DIR` writes a small random one"
        )
    options, source = load_engine_args(given.extra_engine_args, given.override_engine_args)
    model_path = str(Path(given.model_path).resolve())
    return WorkerArgs(
        settings=EngineSettings(
            engine=given.engine,
            mode=given.mode,
            model_path=model_path,
            served_model_name=given.served_model_name or Path(model_path).name,
            options=options,
            options_source=source,
        ),
        endpoint=endpoint,
        nats_server=os.environ.get(NATS_ENV, DEFAULT_SERVER),
        registry=given.registry,
        heartbeat_s=given.heartbeat,
        drain_timeout_s=given.drain_timeout,
        status_host=given.status_host,
        status_port=given.status_port,
        log_level=given.log_level,
        plugin=given.plugin,
        no_plugin=given.no_plugin,
    )
