"""The worker's command line. Everything that can be checked without a connection is checked here."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vswa_plugin.dynamo.names import (
    DEFAULT_NAMESPACE,
    ENDPOINT_ENV,
    NAMESPACE_ENV,
    REASONING_PARSER,
    TOOL_CALL_PARSER,
    EndpointName,
    default_endpoint,
    worker_namespace,
)
from vswa_plugin.dynamo.runtime import check_parser
from vswa_plugin.engine import ANY_ENGINE, MODES, ROUTER_ENV, ROUTERS, Engine, EngineSettings
from vswa_plugin.errors import ConfigError, PluginError, shown, unknown_choice
from vswa_plugin.host.loading import add_plugin_arguments
from vswa_plugin.program.args import ENVIRONMENT_HELP, RunArgs, add_run_arguments, make_parser, run_args
from vswa_plugin.program.model_path import find_model
from vswa_plugin.program.options import encodable, integer, read_number, real, requires
from vswa_plugin.wire.subjects import check_name
from vswa_plugin.worker.dynamo_args import FromDynamo, add_dynamo_flags, from_dynamo, mode_of, take_dotted
from vswa_plugin.worker.dynamo_flags import DOTTED
from vswa_plugin.worker.engine_args import (
    CONFIG_OPTION,
    OVERRIDE_OPTION,
    load_engine_args,
    merged,
    shipped_config,
)

logger = logging.getLogger(__name__)

#: How a worker shows itself.
REGISTER_ENV = "VSWA_REGISTER"
REGISTER = ("auto", "frontend", "hidden")
STATUS_HOST = "127.0.0.1"
#: What Dynamo's workers read where an option is not given.
_VARIABLES = {
    "model_path": "DYN_TRTLLM_MODEL",
    "served_model_name": "DYN_TRTLLM_SERVED_MODEL_NAME",
    "extra_engine_args": "DYN_TRTLLM_EXTRA_ENGINE_ARGS",
    "override_engine_args": "DYN_TRTLLM_OVERRIDE_ENGINE_ARGS",
    "dyn_tool_call_parser": "DYN_TOOL_CALL_PARSER",
    "dyn_reasoning_parser": "DYN_REASONING_PARSER",
}
_DRAIN_ENV = "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT"
#: More than any engine has: each rank has a cache and a stream of events.
MAX_RANKS = 1_024

_EXAMPLE = """\
modes, each with an example on a machine where nats-server and etcd run:
  vswa make-model /tmp/gemma
  python -m vswa_plugin.frontend --http-port 8000

  agg       does both phases of a request.
    python -m vswa_plugin.worker --mode agg --model-path /tmp/gemma \\
        --engine-config gemma3/vswa_agg

  prefill   computes a prompt's KV and holds it until a decode worker has taken it.
    python -m vswa_plugin.worker --mode prefill --model-path /tmp/gemma \\
        --engine-config gemma3/vswa_prefill

  decode    takes that KV, of sliding layers the last window only, and generates. Neither serves alone.
    python -m vswa_plugin.worker --mode decode --model-path /tmp/gemma \\
        --engine-config gemma3/vswa_decode

  curl localhost:8000/v1/models

`python -m vswa_plugin.launch agg|agg_router|disagg|disagg_router` starts all of this with one command.

--register says who may send requests. frontend: Dynamo's frontends, which find the model on this worker.
hidden: only routers that know the worker from our registry, as `python -m vswa_plugin.router` does, which
shows the model itself; were the worker visible too, the frontend would send requests past the router.
auto: hidden where VSWA_ROUTER=exact, as the launcher sets it, else frontend.

Every flag of `python -m dynamo.trtllm` is taken as well, and its DYN_TRTLLM_ variable: with the same meaning,
without effect and a line in the log, or refused with what to use. docs/dynamo-flags.md lists them. So are
common flags of `python -m dynamo.vllm`, for --engine vllm: docs/vllm.md.

environment:
  VSWA_REGISTER    default of --register
  VSWA_ROUTER      exact, picker or stock: the router in front, for --register auto
  DYN_ENDPOINT     default of --endpoint
  DYN_NAMESPACE    the namespace of an endpoint that is not given (dynamo)
  DYN_NAMESPACE_WORKER_SUFFIX   appended to that namespace with a hyphen: one of several sets of workers
{environment}
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


class WorkerArgs(RunArgs, frozen=True, kw_only=True):
    """A checked command line.

    :param tool_call_parser: of Dynamo's frontend; ``reasoning_parser`` too.
    :param stall_timeout_s: how long the engine may be silent with requests under way; 0: for ever.
    :param variables: to be set before anything reads them; ``notes``: for the log.
    """

    settings: EngineSettings
    endpoint: EndpointName
    stall_timeout_s: float
    showing: Showing
    taints: tuple[str, ...]
    tool_call_parser: str | None
    reasoning_parser: str | None
    status_host: str
    status_port: int | None
    variables: dict[str, str]
    notes: tuple[str, ...]


def parser(program: str = "python -m vswa_plugin.worker") -> argparse.ArgumentParser:
    made = make_parser(
        program,
        "Serve a model through NVIDIA Dynamo and publish the KV block events of every attention window on "
        "NATS.",
        _EXAMPLE.replace("{environment}", ENVIRONMENT_HELP),
    )
    _add_model_arguments(made.add_argument_group("what is served"))
    _add_showing_arguments(made.add_argument_group("who finds it"))
    run = made.add_argument_group("how it runs")
    run.add_argument("--status-port", type=integer, metavar="PORT", help="serve /health, /ready and /metrics")
    run.add_argument("--status-host", metavar="HOST", help=f"address for --status-port ({STATUS_HOST})")
    add_run_arguments(run)
    run.add_argument(
        "--stall-timeout",
        type=real,
        default=300.0,
        metavar="SECONDS",
        help="how long the engine may give no sign of life while requests are under way; then the worker "
        "exits, and the requests go on with another worker (300; 0: the worker never exits for this reason)",
    )
    add_plugin_arguments(made)
    add_dynamo_flags(made)
    return made


def _add_model_arguments(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--mode", metavar="|".join(MODES), help="which phases of a request the worker serves, see below (agg)"
    )
    model.add_argument(
        "--disaggregation-mode",
        metavar="agg|pd|prefill|decode",
        help="the mode by the name that Dynamo gives it (default: DYN_TRTLLM_DISAGGREGATION_MODE)",
    )
    model.add_argument(
        "--engine",
        default=os.environ.get("VSWA_ENGINE", ""),
        help="an engine that a plugin provides, see `vswa plugins` (default: VSWA_ENGINE, or else the engine "
        "whose plugin offers it as the default, as gemma3_cpu's does)",
    )
    model.add_argument(
        "--model-path",
        "--model",
        metavar="PATH|NAME",
        help="directory of a Hugging Face checkpoint, or its name on the Hub such as google/gemma-3-1b-it or "
        "NAME@REVISION; gemma3_cpu also takes a GGUF file (default: DYN_TRTLLM_MODEL)",
    )
    model.add_argument(
        "--served-model-name",
        type=encodable,
        help="the name by which clients ask for the model (default: the name of its directory, or its own)",
    )
    model.add_argument(
        CONFIG_OPTION,
        metavar="NAME",
        help="engine options that this package has, such as gemma3/vswa_agg; an unknown name lists all",
    )
    model.add_argument(
        "--extra-engine-args",
        metavar="FILE",
        help="engine options as YAML, which replace those of --engine-config one by one: in TensorRT-LLM's "
        "format, or with vLLM's names for --engine vllm",
    )
    model.add_argument(
        "--override-engine-args",
        metavar="JSON",
        help="a JSON object of options that replace those of the file",
    )
    model.add_argument(
        "--data-parallel-size",
        type=integer,
        default=1,
        metavar="N",
        help="number of ranks, each of which has its own cache (1)",
    )
    model.add_argument(
        "--reuse-rule",
        metavar="RULE",
        help="the rule by which the engine reuses blocks, instead of the one that its plugin states: "
        "trtllm_v2, trtllm_v1 or trtllm_v1_contiguous",
    )


def _add_showing_arguments(showing: argparse._ArgumentGroup) -> None:
    showing.add_argument(
        "--endpoint",
        help=f"dyn://namespace.component.endpoint (dyn://{default_endpoint('agg')}, of prefill workers "
        f"dyn://{default_endpoint('prefill')}; their namespace is that of {NAMESPACE_ENV})",
    )
    showing.add_argument(
        "--namespace",
        help=f"the namespace of the endpoint where --endpoint is not given (default: {NAMESPACE_ENV}, else "
        f"{DEFAULT_NAMESPACE})",
    )
    showing.add_argument(
        "--register",
        metavar="|".join(REGISTER),
        help=f"whether Dynamo's frontends see the worker, see below (default: {REGISTER_ENV}, else auto)",
    )
    showing.add_argument(
        "--taint",
        action="append",
        default=[],
        metavar="NAME",
        help="a label that requests can demand or prefer (routing_constraints); may be repeated",
    )
    for option, what in ((TOOL_CALL_PARSER, "tool calls"), (REASONING_PARSER, "reasoning")):
        showing.add_argument(
            option,
            metavar="NAME",
            help=f"how Dynamo's frontend finds {what} in this model's answers (default: it does not look)",
        )


def parse(
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    reader: argparse.ArgumentParser | None = None,
) -> WorkerArgs:
    """Read and check the command line; raises ConfigError, or SystemExit from argparse.

    :param environ: of the worker; ours unless given.
    :param reader: :func:`parser` unless given.
    """
    environ = os.environ if environ is None else environ
    argv, dotted = take_dotted(sys.argv[1:] if argv is None else argv)
    given = (reader or parser()).parse_args(argv)
    _fill(given, environ)
    mode = mode_of(given.mode, given.disaggregation_mode, environ)
    if mode not in MODES:
        raise ConfigError(f"--mode: {unknown_choice('mode', mode, MODES)}")
    run = run_args(given, environ)
    if not 1 <= given.data_parallel_size <= MAX_RANKS:
        raise ConfigError(
            f"--data-parallel-size: expected at least 1, at most {MAX_RANKS}, got {given.data_parallel_size}"
        )
    if given.status_port is not None and not 0 <= given.status_port < 65_536:
        raise ConfigError(f"--status-port: expected a port from 0 to 65535, got {given.status_port}")
    requires("--status-host", given.status_host, "--status-port", given.status_port)
    theirs = from_dynamo(given, environ)
    environ = {**environ, **theirs.variables}
    endpoint = _endpoint(given.endpoint, mode, environ, given.namespace)
    model = find_model(given.model_path, "--model-path", logger.warning)
    options, source = _engine_options(given, theirs, dotted)
    return WorkerArgs(
        **msgspec.structs.asdict(run),
        settings=EngineSettings(
            engine=given.engine,
            mode=mode,
            model_path=str(model.path),
            served_model_name=given.served_model_name or model.name,
            options=options,
            options_source=source,
            data_parallel_size=given.data_parallel_size,
        ),
        endpoint=endpoint,
        stall_timeout_s=_stall_timeout(given.stall_timeout),
        showing=showing(given.register or environ.get(REGISTER_ENV) or "auto", environ),
        taints=_taints(given.taint),
        tool_call_parser=check_parser(TOOL_CALL_PARSER, given.dyn_tool_call_parser),
        reasoning_parser=check_parser(REASONING_PARSER, given.dyn_reasoning_parser),
        status_host=STATUS_HOST if given.status_host is None else given.status_host,
        status_port=given.status_port,
        variables=theirs.variables,
        notes=theirs.notes,
    )


def _fill(given: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Take from Dynamo's variables what the command line leaves open; raises ConfigError."""
    for name, variable in _VARIABLES.items():
        if getattr(given, name) is None:
            setattr(given, name, environ.get(variable) or None)
    if given.model_path is None:
        raise ConfigError("--model-path: expected the directory or name of a model, got none")
    if given.drain_timeout is None and (text := environ.get(_DRAIN_ENV)):
        try:
            given.drain_timeout = read_number(text, float)
        except ValueError:
            raise ConfigError(f"{_DRAIN_ENV}: expected seconds, got {shown(text)}") from None


def _engine_options(
    given: argparse.Namespace, theirs: FromDynamo, dotted: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Flags of Dynamo, the file over them, and over it what is given one by one; with all of its sources."""
    if dotted and given.override_engine_args:
        raise ConfigError(
            f"{OVERRIDE_OPTION}: expected no {DOTTED}* flags with it, got both; use one of them"
        )
    base, sources = theirs.options, theirs.sources
    if given.engine_config is not None:
        base, sources = merged(base, shipped_config(given.engine_config)), (*sources, given.engine_config)
    options, source = load_engine_args(given.extra_engine_args, given.override_engine_args, base, sources)
    if dotted:
        options, source = merged(options, dotted), f"{source} and {DOTTED}*"
    if given.reuse_rule is not None:
        section = options.get(ANY_ENGINE)
        known = section if isinstance(section, dict) else {}
        options[ANY_ENGINE] = {**known, "reuse_rule": given.reuse_rule}
        source = f"--reuse-rule and {source}"
    return options, source


def with_engine_name(args: WorkerArgs, engine: Engine) -> WorkerArgs:
    """``args`` with the name of ``engine``, where none was given.

    :raises PluginError: an engine that answers for no name does not say its own.
    """
    if args.settings.engine:
        return args
    if not engine.info.engine:
        raise PluginError(
            "expected the default engine to say its name in EngineInfo.engine, got none; "
            "name one with --engine or VSWA_ENGINE"
        )
    settings = msgspec.structs.replace(args.settings, engine=engine.info.engine)
    return msgspec.structs.replace(args, settings=settings)


def _endpoint(
    given: str | None, mode: str, environ: Mapping[str, str], namespace: str | None
) -> EndpointName:
    """What is named is taken as it is; else a place in the namespace that option or environment names."""
    if given is not None:
        return EndpointName.parse(given)
    if environ.get(ENDPOINT_ENV):
        return EndpointName.parse(environ[ENDPOINT_ENV], ENDPOINT_ENV)
    if namespace is not None:
        check_name("--namespace", namespace)
    return default_endpoint(mode, worker_namespace(environ, namespace))


def _stall_timeout(given: float) -> float:
    if not 0 <= given < math.inf:
        raise ConfigError(f"--stall-timeout: expected 0 seconds or more, got {given:g}")
    return given


def _taints(given: Sequence[str]) -> tuple[str, ...]:
    if not all(name.strip() for name in given):
        raise ConfigError("--taint: expected a name, got nothing")
    return tuple(dict.fromkeys(given))
