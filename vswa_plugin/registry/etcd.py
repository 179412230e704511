"""The registry in etcd: one leased key per worker. The only module that imports etcd3.

etcd3's client is synchronous, so every call runs in a thread. It has no keepalive of its own; ours
refreshes the lease three times per TTL and joins again when the lease is gone (etcd was away for long).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from vswa_plugin.errors import ConfigError, ConnectError, ProtocolError
from vswa_plugin.registry import PREFIX, Entry, _etcd3_compat, decode_entry, encode_entry

import etcd3  # isort: skip  (after the compatibility module)
import etcd3.exceptions  # isort: skip

assert _etcd3_compat is not None

logger = logging.getLogger(__name__)

LEASE_TTL_S = 10
CALL_TIMEOUT_S = 5.0
T = TypeVar("T")


def parse_endpoints(endpoints: str) -> list[tuple[str, int]]:
    """``http://a:2379,b:2380`` -> [("a", 2379), ("b", 2380)]; raises ConfigError on what is neither."""
    parsed = []
    for text in filter(None, (part.strip() for part in endpoints.split(","))):
        parts = urlsplit(text if "://" in text else f"http://{text}")
        try:
            host, port = parts.hostname, parts.port or 2379
        except ValueError as error:
            raise ConfigError(f"ETCD_ENDPOINTS: expected http://host:port, got {text!r}") from error
        if not host or parts.scheme not in ("http", "https"):
            raise ConfigError(f"ETCD_ENDPOINTS: expected http://host:port, got {text!r}")
        parsed.append((host, port))
    if not parsed:
        raise ConfigError("ETCD_ENDPOINTS: expected at least one http://host:port, got none")
    return parsed


class EtcdRegistry:
    """Registry of one process. Constructing it connects to nothing."""

    def __init__(self, endpoints: str, lease_ttl_s: int = LEASE_TTL_S) -> None:
        self._endpoints = parse_endpoints(endpoints)
        self._lease_ttl_s = lease_ttl_s
        self._client: Any = None
        self._lease: Any = None
        self._entry: Entry | None = None
        self._keepalive: asyncio.Task[None] | None = None
        self._busy = asyncio.Lock()  # one call at a time: a failing one swaps the client

    async def join(self, entry: Entry) -> None:
        self._entry = entry
        await self._call(self._put)
        if self._keepalive is None:
            self._keepalive = asyncio.create_task(self._keep_alive(), name="etcd-keepalive")

    async def entries(self) -> list[Entry]:
        found = await self._call(lambda client: list(client.get_prefix(PREFIX)))
        entries = []
        for value, meta in found:
            try:
                entries.append(decode_entry(meta.key.decode(), value))
            except ProtocolError as error:
                logger.warning("registry entry left out: %s", error)
        return entries

    async def leave(self) -> None:
        if self._keepalive is not None:
            self._keepalive.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keepalive
            self._keepalive = None
        lease, self._lease, self._entry = self._lease, None, None
        if lease is not None:
            try:
                await self._call(lambda client: client.revoke_lease(lease.id))
            except ConnectError as error:
                logger.warning("could not leave the registry, the lease will end it: %s", error)
        if self._client is not None:
            client, self._client = self._client, None
            await asyncio.to_thread(client.close)

    def _put(self, client: Any) -> None:
        assert self._entry is not None
        if self._lease is None:
            self._lease = client.lease(self._lease_ttl_s)
        client.put(self._entry.key, encode_entry(self._entry), self._lease)

    async def _keep_alive(self) -> None:
        healthy = True
        while True:
            await asyncio.sleep(self._lease_ttl_s / 3)
            try:
                await self._call(self._refresh)
            except ConnectError as error:
                if healthy:
                    logger.warning("registry lease not refreshed, trying on: %s", error)
                healthy = False
            else:
                if not healthy:
                    logger.info("registry reached again")
                healthy = True

    def _refresh(self, client: Any) -> None:
        if self._lease is not None and self._lease.refresh()[0].TTL > 0:
            return
        # The lease ran out while etcd could not be reached, and our key with it.
        self._lease = None
        self._put(client)

    async def _call(self, use: Callable[[Any], T]) -> T:
        """Run ``use`` with a client in a thread; on a dead connection try each endpoint once."""
        errors = []
        async with self._busy:
            for _ in range(1 + len(self._endpoints)):
                try:
                    return await asyncio.to_thread(self._with_client, use)
                except (etcd3.exceptions.Etcd3Exception, OSError) as error:
                    errors.append(f"{type(error).__name__} {error}".strip())
                    await self._next_endpoint()
        tried = ", ".join(f"{host}:{port}" for host, port in self._endpoints)
        raise ConnectError(
            f"expected etcd at {tried} (ETCD_ENDPOINTS), got {errors[-1]}; is it running and reachable?"
        )

    def _with_client(self, use: Callable[[Any], T]) -> T:
        if self._client is None:
            host, port = self._endpoints[0]
            self._client = etcd3.client(host=host, port=port, timeout=CALL_TIMEOUT_S)
            if self._lease is not None:  # leases outlive a connection, their client does not
                self._lease.etcd_client = self._client
        return use(self._client)

    async def _next_endpoint(self) -> None:
        self._endpoints.append(self._endpoints.pop(0))
        if self._client is not None:
            client, self._client = self._client, None
            await asyncio.to_thread(client.close)
