"""The operator's HTTP surface of a process: /health, /ready, /metrics."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from vswa_plugin.program.addresses import check_address, http_url

logger = logging.getLogger(__name__)


#: A connection on which no request comes, or only a part of one, ends.
IDLE_TIMEOUT_S = 10.0


class Status(msgspec.Struct):
    """What a process says of itself.

    :param ready: it serves.
    :param failure: why it cannot go on, which makes it unhealthy.
    :param tasks: names of the long-lived tasks that run.
    """

    ready: bool = False
    failure: str | None = None
    tasks: Callable[[], list[str]] = list


def reachable_url(host: str, port: int) -> str:
    """The URL under which others reach what listens on ``host``; for all addresses, this machine's name."""
    if host in ("", "0.0.0.0", "::"):
        host = socket.gethostname()
    return http_url(host, port)


class StatusServer:
    """Serves ``status`` and ``metrics`` on ``host:port``; port 0 takes a free one.

    /health: 200 while the process works, 503 with the reason once engine or runtime failed.
    /ready: 200 once requests are served, 503 before and while draining.
    """

    def __init__(self, status: Status, metrics: Callable[[], Awaitable[str]]) -> None:
        self._status = status
        self._metrics = metrics
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; the port. Raises ConfigError where the address is taken or not ours."""
        check_address(host, port, host_option="--status-host", port_option="--status-port")
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._show_metrics),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=IDLE_TIMEOUT_S)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        bound: int = self._runner.addresses[0][1]
        logger.info("status on %s: /health /ready /metrics", http_url(host, bound))
        return bound

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        failure = self._status.failure
        body = {
            "status": "healthy" if failure is None else "failed",
            "reason": failure,
            "tasks": self._status.tasks(),
        }
        return web.json_response(body, status=200 if failure is None else 503)

    async def _ready(self, _: web.Request) -> web.Response:
        ready = self._status.ready and self._status.failure is None
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            text=await self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )
