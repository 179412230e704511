"""``python -m vswa_plugin.launch TOPOLOGY``: one deployment, kept alive until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence

from vswa_plugin.dynamo.names import DEFAULT_NAMESPACE, NAMESPACE_ENV, ROUTER_MODES, worker_namespace
from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.launch.cluster import Cluster, Progress
from vswa_plugin.launch.scratch import open_scratch
from vswa_plugin.launch.serving import keep_serving, progress_from
from vswa_plugin.launch.settings import ClusterSettings, check_settings, settings_with_gpus
from vswa_plugin.launch.topologies import (
    TOPOLOGIES,
    Routing,
    Topology,
    WorkerGroup,
    add_log_arguments,
    add_router,
    add_worker_counts,
    chosen_router,
    find_topology,
    log_bytes,
    worker_counts,
)
from vswa_plugin.program.args import make_parser
from vswa_plugin.program.model_path import find_model
from vswa_plugin.program.options import encodable, port
from vswa_plugin.program.run import run_program, set_up_logging
from vswa_plugin.wire.subjects import check_name

_EPILOG = """\
topologies:
{topologies}

environment, as the guide "Gemma3 Sliding Window" sets it:
  MODEL_PATH                                directory of the model, or its name on the Hugging Face Hub such
                                            as google/gemma-3-1b-it (or --model-path)
  SERVED_MODEL_NAME                         what clients call it (default: the name of directory or model)
  HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE     where a model of the Hub is kept, and whether to look there alone
  HF_TOKEN                                  the token of an account that may download a gated model
  AGG_ENGINE_ARGS                           engine options of the workers: a YAML file, or the name of one of
                                            this package such as gemma3/vswa_agg
  PREFILL_ENGINE_ARGS, DECODE_ENGINE_ARGS   the same for each kind of disaggregated workers
  PREFILL_CUDA_VISIBLE_DEVICES, DECODE_CUDA_VISIBLE_DEVICES   GPUs of each kind, of which every worker gets
                                            as many of its own as its parallel sizes need (default: those of
                                            CUDA_VISIBLE_DEVICES, else of the machine)
  NATS_SERVER, ETCD_ENDPOINTS               brokers (several etcd with commas); embedded ones where not set
  DYN_HTTP_HOST, DYN_HTTP_PORT              where the frontend listens (127.0.0.1, 8000)
  DYN_NAMESPACE                             Dynamo namespace of all of it (or --namespace)
  DYN_NAMESPACE_WORKER_SUFFIX               appended to that namespace with a hyphen
  VSWA_ENGINE                               the engine, as --engine of a worker
  ROUTER                                    the router of agg_router and disagg_router: exact, picker or
                                            stock (or --router)
  DYN_ROUTER_*                              cost options of exact routers and pickers, see their --help
  VSWA_DYNAMO_EVENTS                        which blocks the stock router is sent: boundary (default), or
                                            global as Dynamo does today
  VSWA_TERMINATION_LOG                      a file for the reason why this program ended

example:
  vswa make-model /tmp/gemma
  export MODEL_PATH=/tmp/gemma SERVED_MODEL_NAME=gemma
  export PREFILL_ENGINE_ARGS=gemma3/vswa_prefill DECODE_ENGINE_ARGS=gemma3/vswa_decode
  python -m vswa_plugin.launch disagg --decode-workers 2 -- --heartbeat 0.5

Every worker gets the options that follow --. Exact routers get --heartbeat, --registry and plugins of them.
Ctrl-C, SIGTERM or SIGHUP stops workers, then routers, frontend and brokers; a second one does not wait for
requests under way. A worker, router or frontend that fails is started again, after 1, 2, 4 ... 30 seconds. An
embedded broker that fails ends everything, so use brokers of your own for what has to last. If this program
is killed, all that it has started ends too.

exit codes: 0 after a signal, 1 when a broker failed, 2 for what you can correct.
"""

PROGRAM = "python -m vswa_plugin.launch"
#: What messages call this program, however it was started.
NAME = "vswa launch"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    shown = (f"  {name:<16}{each.about}" for name, each in TOPOLOGIES.items())
    made = make_parser(
        program,
        "Start frontend, routers and workers of one topology, and keep them alive.",
        _EPILOG.replace("{topologies}", "\n".join(shown)),
    )
    made.add_argument("topology", metavar="|".join(TOPOLOGIES), help="which processes are started, see below")
    environ = os.environ.get
    made.add_argument("--model-path", default=environ("MODEL_PATH"), help="default: MODEL_PATH")
    made.add_argument(
        "--served-model-name", type=encodable, default=environ("SERVED_MODEL_NAME") or None, metavar="NAME"
    )
    made.add_argument("--engine", help="as --engine of a worker (default: VSWA_ENGINE, else the worker's)")
    add_worker_counts(made, several=1)
    add_router(made)
    made.add_argument("--http-host", default=environ("DYN_HTTP_HOST", "127.0.0.1"), help="default: 127.0.0.1")
    made.add_argument(
        "--http-port", type=port, default=environ("DYN_HTTP_PORT", "8000"), help="default: 8000"
    )
    made.add_argument(
        "--router-mode",
        metavar="|".join(ROUTER_MODES),
        help="how the frontend of agg and disagg chooses workers (round-robin)",
    )
    made.add_argument("--namespace", help=f"default: {NAMESPACE_ENV}, else {DEFAULT_NAMESPACE}")
    add_log_arguments(made)
    return made


def settings_from(
    argv: Sequence[str],
    environ: Mapping[str, str],
    program: str = PROGRAM,
    say: Progress = lambda _: None,
) -> tuple[ClusterSettings, str | None]:
    """What the command line and environment ask for, and the folder for logs; nothing is started.

    :param say: gets a line before a model is downloaded.

    :raises ConfigError: whatever can be found wrong without starting a process.
    """
    split = list(argv).index("--") if "--" in argv else len(argv)
    given = parser(program).parse_args(argv[:split])
    topology = find_topology(given.topology)
    if not given.model_path:
        raise ConfigError(
            "MODEL_PATH: expected the directory or name of a model, got nothing; "
            "`vswa make-model DIR` writes a small random one"
        )
    model = find_model(given.model_path, "MODEL_PATH", say)
    routing = chosen_router(given, topology, environ)
    settings = ClusterSettings(
        model_path=str(model.path),
        served_model_name=given.served_model_name or model.name,
        groups=_groups(topology, worker_counts(given, topology), environ),
        engine=given.engine or environ.get("VSWA_ENGINE", ""),
        namespace=_namespace(given.namespace, environ),
        http_host=given.http_host,
        http_port=given.http_port,
        router_mode=_router_mode(given.router_mode, topology, routing),
        routing=routing,
        worker_options=tuple(argv[split + 1 :]),
        keep=True,
        log_bytes=log_bytes(given),
    )
    check_settings(settings)
    return settings_with_gpus(settings, environ, say), given.log_dir


def _namespace(given: str | None, environ: Mapping[str, str]) -> str:
    """One namespace for workers, routers and frontend, so that each finds the others."""
    return worker_namespace(environ, None if given is None else check_name("--namespace", given))


def _router_mode(given: str | None, topology: Topology, routing: Routing) -> str:
    if given is None:
        return "kv" if routing.router == "stock" else "round-robin"
    if topology.routed:
        raise ConfigError(f"--router-mode: {topology.name!r} has its own, got {given!r}; use --router")
    if given not in ROUTER_MODES:
        raise ConfigError(f"--router-mode: {unknown_choice('mode', given, ROUTER_MODES)}")
    return given


def _groups(
    topology: Topology, counts: Mapping[str, int], environ: Mapping[str, str]
) -> tuple[WorkerGroup, ...]:
    return tuple(
        WorkerGroup(mode, counts[mode], environ.get(f"{mode.upper()}_ENGINE_ARGS") or None)
        for mode in topology.modes
    )


def run(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Launch what the command line asks for; the exit code."""
    progress = progress_from(time.monotonic())
    arguments = sys.argv[1:] if argv is None else argv
    settings, log_dir = settings_from(arguments, os.environ, program, progress)
    set_up_logging("warning")
    with open_scratch("launch") as scratch:
        folder = scratch.log_folder(log_dir)

        async def make() -> Cluster:
            return Cluster(settings, folder, progress, scratch.path)

        return asyncio.run(keep_serving(NAME, make, progress))


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """The exit code; ``program`` is what usage and refusals call it."""
    return run_program(NAME, lambda: run(argv, program))


if __name__ == "__main__":
    sys.exit(main())
