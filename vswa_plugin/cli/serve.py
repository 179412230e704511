"""``vswa serve``: the demo's servers, left running."""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path

from vswa_plugin.cli import local
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.serving import keep_serving, progress_from
from vswa_plugin.launch.topologies import chosen_router, find_topology, log_bytes


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Ctrl-C or SIGTERM stops everything; a worker, router or frontend that fails is started again."
    )
    local.add_arguments(parser, keeps=True)
    parser.set_defaults(http_port=8000)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_serve(args, log_bytes(args)))


async def _serve(args: argparse.Namespace, most_bytes: int) -> int:
    topology = find_topology(args.topology)
    groups = local.worker_groups(args, topology)
    routing = chosen_router(args, topology, os.environ)
    progress = progress_from(time.monotonic())
    with tempfile.TemporaryDirectory(prefix="vswa-serve-") as scratch:
        settings = ClusterSettings(
            model_path=str(await local.model_path(args, Path(scratch), progress)),
            served_model_name=args.served_model_name,
            groups=groups,
            http_port=args.http_port,
            routing=routing,
            keep=True,
            log_bytes=most_bytes,
        )
        cluster = Cluster(settings, local.log_folder(args, Path(scratch)), progress)
        return await keep_serving(cluster, progress)
