"""``vswa serve``: the demo's servers, left running."""

from __future__ import annotations

import argparse
import asyncio
import os
import time

from vswa_plugin.cli import local
from vswa_plugin.launch.cluster import Cluster
from vswa_plugin.launch.scratch import open_scratch
from vswa_plugin.launch.serving import keep_serving, progress_from
from vswa_plugin.launch.topologies import chosen_router, find_topology, log_bytes


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Ctrl-C or SIGTERM stops everything; a worker, router or frontend that fails is started again."
    )
    local.add_arguments(parser, keeps=True)
    parser.set_defaults(http_port=8000)


def run(args: argparse.Namespace) -> int:
    local.find_named(args)
    most_bytes = log_bytes(args)
    topology = find_topology(args.topology)
    groups = local.worker_groups(args, topology)
    routing = chosen_router(args, topology, os.environ)
    progress = progress_from(time.monotonic())
    with open_scratch("serve") as scratch:

        async def make() -> Cluster:
            model = await local.model_path(args, scratch.path, progress)
            more = {"keep": True, "log_bytes": most_bytes}
            return local.cluster_of(args, model, groups, routing, scratch, progress, **more)

        return asyncio.run(keep_serving("vswa serve", make, progress))
