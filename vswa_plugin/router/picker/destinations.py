"""Endpoints of frontends, for gateways that let a picker choose the endpoint, as an InferencePool does.

A name stands for all its addresses: with a headless Service of Kubernetes, for all ready pods behind it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

logger = logging.getLogger(__name__)

#: Between two look-ups of the names.
LOOK_UP_S = 5.0


class Destinations:
    """Addresses in turn. Event loop only.

    :param named: ``host:port`` each; a host is a name or an address.
    """

    def __init__(self, named: Sequence[str]) -> None:
        self._named = named
        self._found: tuple[str, ...] = ()
        self._turn = 0
        self._fault: str | None = None

    def next(self, subset: Sequence[str] = ()) -> str | None:
        """The one whose turn it is, among ``subset`` where the gateway gives one; None: there is none."""
        among = subset or self._found
        if not among:
            return None
        self._turn += 1
        return among[self._turn % len(among)]

    async def follow(self) -> None:
        """Look the names up, again and again, until cancelled."""
        while True:
            await self.look_up()
            await asyncio.sleep(LOOK_UP_S)

    async def look_up(self) -> None:
        """Take in what the names stand for now; what cannot be looked up keeps its last addresses."""
        loop, found = asyncio.get_running_loop(), set[str]()
        try:
            for named in self._named:
                host, _, port = named.rpartition(":")
                host = host.strip("[]")
                for *_, address in await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM):
                    ip = str(address[0])
                    found.add(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}")
        except OSError as error:
            if str(error) != self._fault:
                logger.error(
                    "--destination %s: expected addresses, got %s; the last ones stand", named, error
                )
            self._fault = str(error)
            return
        self._fault = None
        if (listed := tuple(sorted(found))) != self._found:
            logger.info("frontends: %s", ", ".join(listed) or "none")
            self._found = listed
