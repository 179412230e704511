"""A deployment kept until a signal, and the lines that are printed about it."""

from __future__ import annotations

import sys
import time

from vswa_plugin.launch.cluster import Cluster, Progress
from vswa_plugin.program.life import Life, Program


def progress_from(began: float) -> Progress:
    """Prints a line with the seconds since ``began``."""

    def show(text: str) -> None:
        sys.stdout.write(f"[{time.monotonic() - began:5.1f} s] {text}\n")
        sys.stdout.flush()

    return show


class Serving(Program):
    """A deployment that is kept until a signal. A second signal makes its workers drain no longer.

    However it ends, no child is left.
    """

    def __init__(self, cluster: Cluster, progress: Progress, life: Life) -> None:
        self._cluster = cluster
        self._progress = progress
        self._life = life

    async def start(self) -> None:
        """Start all processes, and say how to use them; raises what the cluster cannot start."""
        self._life.tasks.start(self._cluster.bound_logs(), "bound logs")
        await self._cluster.start()
        sys.stdout.write(how_to_use(self._cluster))
        sys.stdout.flush()

    async def serve(self) -> None:
        """Return when nothing but brokers is left; raises what the cluster cannot go on without."""
        await self._cluster.failed()

    def hurry(self) -> None:
        self._cluster.hurry()

    async def end(self) -> None:
        self._progress("stopping")
        await self._cluster.stop()


async def keep_serving(cluster: Cluster, progress: Progress) -> int:
    """Start ``cluster`` and keep it until SIGTERM or SIGINT; the exit code.

    :raises ConfigError, ChildDied, ConnectError: what the cluster cannot start or go on with.
    """
    life = Life("vswa launch")
    return await life.run(Serving(cluster, progress, life))


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
