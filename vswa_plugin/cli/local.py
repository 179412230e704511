"""What ``vswa demo`` and ``vswa serve`` share: their options, the default model, the deployment itself."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from vswa_plugin.dynamo.names import worker_namespace
from vswa_plugin.errors import VswaError
from vswa_plugin.launch.cluster import Cluster, ClusterSettings, Progress
from vswa_plugin.launch.processes import python_module
from vswa_plugin.launch.scratch import Scratch
from vswa_plugin.launch.topologies import (
    TOPOLOGIES,
    Routing,
    Topology,
    WorkerGroup,
    add_log_arguments,
    add_router,
    add_worker_counts,
    worker_counts,
)
from vswa_plugin.program.model_path import find_model
from vswa_plugin.program.options import encodable, port

#: Commands that the plugin of the default engine adds; their contract is in the hook vswa_register_commands.
_MAKE_MODEL, _GET_MODEL = "make-model", "get-model"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def add_arguments(parser: argparse.ArgumentParser, *, keeps: bool = False) -> None:
    """Add what both have.

    :param keeps: whether the servers are kept, so that the size of their logs must be bounded.
    """
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a checkpoint's directory, a GGUF file, a model of the Hugging Face Hub such as "
        "google/gemma-3-1b-it, or a name for `vswa get-model`, which installs it (default: a small random "
        "model is made)",
    )
    parser.add_argument(
        "--served-model-name", type=encodable, default="gemma", help="what clients call the model (gemma)"
    )
    parser.add_argument(
        "--topology",
        default="agg",
        metavar="|".join(TOPOLOGIES),
        help="agg: each worker does all (default); disagg: prefill workers hand over to decode workers; "
        "agg_router, disagg_router: and requests go where their prefix is cached",
    )
    add_worker_counts(parser, several=2)
    add_router(parser)
    parser.add_argument(
        "--http-port", type=port, default=0, help="port of the frontend (default: a free one)"
    )
    parser.add_argument(
        "--engine-args", metavar="FILE", help="engine options, as --extra-engine-args of a worker"
    )
    if keeps:
        add_log_arguments(parser)
    else:
        parser.add_argument(
            "--log-dir", metavar="DIR", help="a directory in which the logs of all processes are kept"
        )


def worker_groups(
    args: argparse.Namespace, topology: Topology, override: dict[str, Any] | None = None
) -> tuple[WorkerGroup, ...]:
    """The workers that were asked for, all with the same engine options."""
    counts = worker_counts(args, topology)
    return tuple(WorkerGroup(mode, count, args.engine_args, override or {}) for mode, count in counts.items())


def find_named(args: argparse.Namespace) -> None:
    """Let ``--model`` be a directory where it is a name of the Hub. Blocks while it downloads."""
    if args.model is not None and not is_named(args.model):
        args.model = str(find_model(args.model, "--model", lambda line: print(line, file=sys.stderr)).path)


async def model_path(args: argparse.Namespace, folder: Path, progress: Progress) -> Path:
    """The model that was asked for, or a small random one in ``folder``."""
    if is_named(args.model):
        return await _get_model(args.model, progress)
    if args.model is not None:
        return Path(args.model)
    directory = folder / "model"
    progress(f"making a small random model in {directory}: its words mean nothing, all else is real")
    await _run_command(_MAKE_MODEL, str(directory))
    return directory


def is_named(model: str | None) -> bool:
    """Whether ``model`` is a name rather than a place: no such file, and nothing of a path in it."""
    return model is not None and _NAME.fullmatch(model) is not None and not Path(model).exists()


async def _get_model(name: str, progress: Progress) -> Path:
    """The directory of a model by name; its terms and its progress go to standard error."""
    progress(f"model {name}: installed and converted where that has not been done")
    return Path((await _run_command(_GET_MODEL, name)).strip())


async def _run_command(name: str, argument: str) -> str:
    """What a plugin's command prints. In a process of its own: it may take long, or need much memory."""
    command = python_module("vswa_plugin", name, argument)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:  # a signal has ended the wait; pip may run below it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            await process.wait()
    if process.returncode != 0:
        raise VswaError(f"`vswa {name} {argument}` failed; its message is above")
    return output.decode()


def cluster_of(
    args: argparse.Namespace,
    model: Path,
    groups: tuple[WorkerGroup, ...],
    routing: Routing,
    scratch: Scratch,
    progress: Progress,
    **more: Any,
) -> Cluster:
    """The deployment that was asked for; nothing is started.

    :param more: further settings, those in which both differ.
    """
    settings = ClusterSettings(
        model_path=str(model),
        served_model_name=args.served_model_name,
        groups=groups,
        namespace=worker_namespace(os.environ),
        http_port=args.http_port,
        routing=routing,
        **more,
    )
    return Cluster(settings, scratch.log_folder(args.log_dir), progress, scratch.path)
