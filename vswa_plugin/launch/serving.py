"""A deployment kept until a signal, and what people are told of it."""

from __future__ import annotations

import asyncio
import signal
import sys
import time

from vswa_plugin.launch.cluster import Cluster, Progress


def progress_from(began: float) -> Progress:
    """Prints a line with the seconds since ``began``."""

    def show(text: str) -> None:
        sys.stdout.write(f"[{time.monotonic() - began:5.1f} s] {text}\n")
        sys.stdout.flush()

    return show


async def keep_serving(cluster: Cluster, progress: Progress) -> int:
    """Start ``cluster``, say how to use it, and keep it until SIGTERM or SIGINT; the exit code.

    A second signal makes its workers drain no longer. However this ends, no child is left.

    :raises ConfigError, ChildDied, ConnectError: what the cluster cannot start or go on with.
    """
    stop = asyncio.Event()

    def signalled() -> None:
        if stop.is_set():
            cluster.hurry()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signalled)

    async def serving() -> None:
        await cluster.start()
        sys.stdout.write(how_to_use(cluster))
        sys.stdout.flush()
        await cluster.failed()

    tasks = [asyncio.create_task(serving()), asyncio.create_task(stop.wait())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return 0
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        progress("stopping")
        await cluster.stop()


def how_to_use(cluster: Cluster) -> str:
    """What to type next."""
    name = cluster.settings.served_model_name
    apis = f" Routers: {' '.join(cluster.router_urls)} (docs/router-api.md)." if cluster.router_urls else ""
    return f"""
Serving {name!r} on {cluster.url}; logs are in {cluster.folder}.{apis} Try:

  curl -s {cluster.url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "max_tokens": 20, "messages": [{{"role": "user", "content": "Hello"}}]}}'

and, in another terminal, follow the events of every window:

  NATS_SERVER={cluster.nats_server} ETCD_ENDPOINTS={cluster.etcd_endpoints} vswa events

Ctrl-C stops everything.
"""
