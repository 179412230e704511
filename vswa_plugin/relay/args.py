"""The relay's command line. Everything that can be checked without a connection is checked here."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vswa_plugin.dynamo.names import (
    DEFAULT_NAMESPACE,
    NAMESPACE_ENV,
    EndpointName,
    default_endpoint,
    worker_namespace,
)
from vswa_plugin.engine import MODES, Section
from vswa_plugin.engine.option_files import json_options, read_options
from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.host.loading import add_plugin_arguments
from vswa_plugin.program.args import ENVIRONMENT_HELP, RunArgs, add_run_arguments, make_parser, run_args
from vswa_plugin.program.model_path import FoundModel, find_model
from vswa_plugin.program.options import at_least_one, encodable, excludes, port, requires, zero_or_more
from vswa_plugin.relay.listed import MAX_RANKS, Defaults, Listed, listed, listed_in
from vswa_plugin.wire.subjects import check_name

logger = logging.getLogger(__name__)

STATUS_HOST = "127.0.0.1"
ENGINE = "vllm"

_EXAMPLE = """\
The workers stay as they are: Dynamo's own vLLM workers, or any vLLM that Dynamo calls through a worker. Each
must publish its KV events by ZeroMQ, with a replay endpoint so that a relay that starts late misses nothing:

  --kv-events-config '{{"enable_kv_cache_events": true, "publisher": "zmq",
                       "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}}'

examples:
  one worker:
    vswa relay --events tcp://10.0.0.5:5557 --replay tcp://10.0.0.5:5558 --model-path /models/gemma-3-1b-it

  every instance of an endpoint that Dynamo's discovery lists, now and later, one on each machine:
    vswa relay --events 'tcp://{{host}}:5557' --replay 'tcp://{{host}}:5558' --model-path /models/gemma

  a list:
    vswa relay --workers fleet.yaml --status-port 9095

  fleet.yaml, of which only events is needed; the options above are defaults for what is left out:
    workers:
      - events: tcp://10.0.0.5:5557
        replay: tcp://10.0.0.5:5558
        id: 7587893486240423427    # else the instance on that host
        namespace: dynamo
        component: backend
        endpoint: generate
        model: gemma
        model_path: /models/gemma-3-1b-it
        mode: agg
        dp_ranks: 2                # or a list of their numbers
        visible: false             # Dynamo's frontends do not see it
        options: {{block_size: 16}}  # as the engine has it

environment:
{environment}
exit codes: 0 after SIGTERM, 1 when a broker or the runtime failed, 2 for what you can correct.
"""


class RelayArgs(RunArgs, frozen=True, kw_only=True):
    """A checked command line."""

    workers: tuple[Listed, ...]
    status_host: str
    status_port: int | None


def parser(program: str = "python -m vswa_plugin.relay") -> argparse.ArgumentParser:
    made = make_parser(
        program,
        "Publish the KV events of every attention window for workers that are not ours, such as Dynamo's own "
        "vLLM workers, and register them, so that our routers score them.",
        _EXAMPLE.replace("{{", "{").replace("}}", "}").replace("{environment}", ENVIRONMENT_HELP),
    )
    add = made.add_argument_group("which workers").add_argument
    add("--workers", metavar="FILE", help="a YAML file with a list of workers, see below")
    add("--events", metavar="ADDRESS", help="of one worker: where rank 0 publishes its events")
    add("--replay", metavar="ADDRESS", help="where they can be asked for again (default: nowhere)")
    add(
        "--worker-id",
        type=zero_or_more,
        metavar="N",
        help="its instance id in Dynamo (default: that of the instance which Dynamo's discovery lists there)",
    )
    add("--data-parallel-size", type=at_least_one, metavar="N", help="its data-parallel ranks (1)")
    add = made.add_argument_group("what they are, unless the file says it").add_argument
    add("--engine", default=ENGINE, help=f"the engine that they run ({ENGINE})")
    add("--mode", default=MODES[0], metavar="|".join(MODES), help=f"phases that they serve ({MODES[0]})")
    add("--model-path", "--model", metavar="PATH|NAME", help="directory or name of their model")
    add("--served-model-name", type=encodable, help="the name by which clients ask for it")
    add("--endpoint", help=f"dyn://namespace.component.endpoint (dyn://{default_endpoint('agg')})")
    add("--namespace", help=f"of the endpoint (default: {NAMESPACE_ENV}, else {DEFAULT_NAMESPACE})")
    add("--hidden", action="store_true", help="Dynamo's frontends do not see them, only our router does")
    add(
        "--engine-options",
        metavar="JSON",
        help="of vllm: block_size, max_model_len, num_gpu_blocks_override, disable_hybrid_kv_cache_manager, "
        "as the engine has them",
    )
    run = made.add_argument_group("how it runs")
    run.add_argument("--status-port", type=port, metavar="PORT", help="serve /health, /ready and /metrics")
    run.add_argument("--status-host", metavar="HOST", help=f"address for --status-port ({STATUS_HOST})")
    add_run_arguments(run, drains=False)
    add_plugin_arguments(made)
    return made


def parse(
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    reader: argparse.ArgumentParser | None = None,
) -> RelayArgs:
    """Read and check the command line; raises ConfigError, or SystemExit from argparse."""
    environ = os.environ if environ is None else environ
    given = (reader or parser()).parse_args(argv)
    if given.mode not in MODES:
        raise ConfigError(f"--mode: {unknown_choice('mode', given.mode, MODES)}")
    requires("--status-host", given.status_host, "--status-port", given.status_port)
    return RelayArgs(
        **msgspec.structs.asdict(run_args(given, environ)),
        workers=_workers(given, _defaults(given, environ)),
        status_host=given.status_host or STATUS_HOST,
        status_port=given.status_port,
    )


def _defaults(given: argparse.Namespace, environ: Mapping[str, str]) -> Defaults:
    excludes("--endpoint", given.endpoint, "--namespace", given.namespace)
    if given.endpoint is not None:
        endpoint = EndpointName.parse(given.endpoint)
    else:
        if given.namespace is not None:
            check_name("--namespace", given.namespace)
        endpoint = default_endpoint(given.mode, worker_namespace(environ, given.namespace))
    options: dict[str, Any] = {}
    if given.engine_options is not None:
        options = json_options(given.engine_options, "--engine-options", '{"block_size": 16}')
    return Defaults(
        given.engine,
        given.mode,
        endpoint,
        given.model_path,
        given.served_model_name,
        not given.hidden,
        options,
    )


def _workers(given: argparse.Namespace, defaults: Defaults) -> tuple[Listed, ...]:
    found: dict[str, FoundModel] = {}

    def find(path: str, option: str) -> FoundModel:
        if path not in found:
            found[path] = find_model(path, option, logger.warning)
        return found[path]

    excludes("--workers", given.workers, "--events", given.events)
    for option in ("--replay", "--worker-id", "--data-parallel-size"):
        requires(option, getattr(given, option[2:].replace("-", "_")), "--events", given.events)
    if given.workers is not None:
        return listed_in(read_options(given.workers, "--workers"), given.workers, defaults, find)
    if given.events is None:
        raise ConfigError("--events: expected the address of a worker's KV events, or --workers, got neither")
    if given.model_path is None:
        raise ConfigError("--model-path: expected the directory or name of a model, got none")
    ranks = given.data_parallel_size or 1
    if ranks > MAX_RANKS:
        raise ConfigError(f"--data-parallel-size: expected at most {MAX_RANKS}, got {ranks}")
    one = {"events": given.events, "replay": given.replay, "id": given.worker_id, "dp_ranks": ranks}
    return (listed(Section(one, "the command line"), defaults, find),)
