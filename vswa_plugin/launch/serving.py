"""A deployment kept until a signal, and the lines that are printed about it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Awaitable, Callable

from vswa_plugin.dynamo.chat import chat_obstacle
from vswa_plugin.launch.cluster import Cluster, Progress
from vswa_plugin.launch.targets import TARGETS
from vswa_plugin.program.life import Life, Program

#: What a first request asks, where the model can chat and where it cannot.
_CHAT = '"messages": [{"role": "user", "content": "Hello"}]'
_COMPLETION = '"prompt": "Hello"'


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

    def __init__(self, make: Callable[[], Awaitable[Cluster]], progress: Progress, life: Life) -> None:
        self._make = make
        self._progress = progress
        self._life = life
        self._cluster: Cluster | None = None

    async def start(self) -> None:
        """Start all processes, and say how to use them; raises what the cluster cannot start."""
        self._cluster = cluster = await self._make()
        self._life.tasks.start(cluster.bound_logs(), "bound logs")
        await cluster.start()
        sys.stdout.write(how_to_use(cluster))
        sys.stdout.flush()

    async def serve(self) -> None:
        """Return when nothing but brokers is left; raises what the cluster cannot go on without."""
        if self._cluster is not None:
            await self._cluster.failed()

    def hurry(self) -> None:
        if self._cluster is not None:
            self._cluster.hurry()

    async def end(self) -> None:
        await stop(self._cluster, self._progress)


async def stop(cluster: Cluster | None, progress: Progress) -> dict[str, int]:
    """Stop ``cluster``, if there is one yet, and say so where anybody reads it; exit codes by name."""
    with contextlib.suppress(OSError):  # the reader or the terminal has gone, which may be why it stops
        progress("stopping")
    return {} if cluster is None else await cluster.stop()


async def keep_serving(program: str, make: Callable[[], Awaitable[Cluster]], progress: Progress) -> int:
    """Start the cluster that ``make`` returns and keep it until a signal; the exit code.

    :param program: the command that does so, for messages.
    :raises ConfigError, ChildDied, ConnectError: what the cluster cannot start or go on with.
    """
    life = Life(program)
    return await life.run(Serving(make, progress, life))


def how_to_use(cluster: Cluster) -> str:
    """What to type next."""
    name = cluster.settings.served_model_name
    chat = chat_obstacle(cluster.settings.model_path) is None
    url = f"{cluster.url}/v1/{'chat/' if chat else ''}completions"
    asked = _CHAT if chat else _COMPLETION
    apis = (
        f" Routers, each with a live page: {' '.join(cluster.router_urls)} (docs/router-api.md)."
        if cluster.router_urls
        else ""
    )
    return f"""
Serving {name!r} on {cluster.url}; logs are in {cluster.folder}.{apis}
Where Prometheus finds their metrics (docs/operations.md): {cluster.folder / TARGETS}. Try:

  curl -s {url} -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "max_tokens": 20, {asked}}}'

and, in another terminal, follow the events of every window:

  NATS_SERVER={cluster.nats_server} ETCD_ENDPOINTS={cluster.etcd_endpoints} vswa events

Ctrl-C stops everything.
"""
