"""``vswa serve``: the demo's servers, left running."""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
import time
from pathlib import Path

from vswa_plugin.cluster import Cluster, ClusterSettings
from vswa_plugin.commands import local


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Ctrl-C or SIGTERM stops everything."
    local.add_arguments(parser)
    parser.set_defaults(http_port=8000)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_serve(args))


async def _serve(args: argparse.Namespace) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    progress = local.progress_from(time.monotonic())
    with tempfile.TemporaryDirectory(prefix="vswa-serve-") as scratch:
        settings = ClusterSettings(
            model_path=str(await local.model_path(args, Path(scratch), progress)),
            served_model_name=args.served_model_name,
            workers=args.workers,
            engine_args=args.engine_args,
            http_port=args.http_port,
        )
        cluster = Cluster(settings, local.log_folder(args, Path(scratch)), progress)
        starting = asyncio.create_task(cluster.start())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return 0
            await starting
            _show_how_to_use(cluster)
            while not stop.is_set():
                cluster.check()
                await asyncio.wait((stopping,), timeout=1)
            return 0
        finally:
            starting.cancel()
            progress("stopping")
            await cluster.stop()


def _show_how_to_use(cluster: Cluster) -> None:
    name = cluster.settings.served_model_name
    print(
        f"""
Serving {name!r} on {cluster.url}; logs are in {cluster.folder}. Try:

  curl -s {cluster.url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "max_tokens": 20, "messages": [{{"role": "user", "content": "Hello"}}]}}'

and, in another terminal, follow the events of every window:

  NATS_SERVER={cluster.nats_server} ETCD_ENDPOINTS={cluster.etcd_endpoints} vswa events

Ctrl-C stops everything.""",
        flush=True,
    )
