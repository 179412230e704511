"""Which of Dynamo's instances a worker is: routers of ours call it under that number.

Dynamo's discovery names no address of a worker's KV events, but each instance has the host by which it is
called. Where nothing tells two instances apart, none is taken: blocks of another worker would be promised.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vswa_plugin.dynamo.client import WorkerClient
from vswa_plugin.dynamo.names import EndpointName

logger = logging.getLogger(__name__)

#: How long Dynamo may take to make a client of an endpoint, and when that is tried again.
CLIENT_TIMEOUT_S, RETRY_S = 10.0, 5.0


class Instances:
    """What Dynamo's discovery lists, by endpoint. ``runtime``: Dynamo's."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._clients: dict[EndpointName, WorkerClient] = {}
        self._opening = asyncio.Lock()
        self._due: dict[EndpointName, float] = {}

    async def at(self, name: EndpointName) -> Mapping[int, str]:
        """The host of each instance of an endpoint; empty while Dynamo gives no client of it."""
        async with self._opening:
            client = self._clients.get(name) or await self._open(name)
        return {} if client is None else client.hosts()

    async def _open(self, name: EndpointName) -> WorkerClient | None:
        now = asyncio.get_running_loop().time()
        if now < self._due.get(name, 0.0):
            return None
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                client = self._clients[name] = await WorkerClient.open(self._runtime, name)
        except Exception as error:  # Dynamo raises plain Exception
            self._due[name] = now + RETRY_S
            logger.warning(
                "instances at %s cannot be listed, tried again every %.0f s: %s", name, RETRY_S, error
            )
            return None
        return client


def instance_on(host: str, found: Mapping[int, str]) -> tuple[int | None, str]:
    """The one instance that a worker on ``host`` is, else None, and in words why there is none.

    :param host: as its address says; empty, or of this machine alone: not known to others.
    :param found: instance id -> host.
    """
    there = [number for number, other in found.items() if other == host]
    if not there and _is_local(host):
        there = list(found)
    if len(there) == 1:
        return there[0], ""
    where = f" on {host}" if host and not _is_local(host) else ""
    if not there:
        return None, f"Dynamo's discovery lists no instance{where} yet"
    return None, (
        f"expected one instance{where} in Dynamo's discovery, got {len(there)}; if they all serve, write the "
        "id of this worker, or give it an endpoint of its own"
    )


def one_on_each(found: Mapping[int, str]) -> tuple[dict[int, str], set[int]]:
    """The instances that are the only one on their host, with the host; and the others."""
    on = Counter(found.values())
    alone = {number: host for number, host in found.items() if host and on[host] == 1}
    return alone, {*found} - {*alone}


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")
