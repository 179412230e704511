"""The registry in etcd: one leased key per worker.

The lease has no keepalive of its own in the client; ours refreshes it three times per TTL and joins
again when lease or key is gone (etcd was away for long, or came back empty).
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from vswa_plugin.errors import VswaError
from vswa_plugin.registry import Entry, changed, check_key, encode_entry, prefix_of
from vswa_plugin.registry._etcd3_client import FAILURES, Connection, is_lost_lease
from vswa_plugin.registry.etcd_settings import EtcdSecurity, parse_endpoints
from vswa_plugin.registry.etcd_watch import RECONCILE_S, follow
from vswa_plugin.registry.watching import Watcher, Watchers, readable
from vswa_plugin.tasks import Tasks

logger = logging.getLogger(__name__)

LEASE_TTL_S = 10


class EtcdRegistry:
    """Registry of one process. Constructing it connects to nothing.

    :param endpoints: as ETCD_ENDPOINTS.
    :param security: credentials; None: from the environment.
    :param reconcile_s: how often a watcher lists what is there, in case its stream died silently.
    :param tasks: where the task that keeps the lease alive is watched.
    :raises ConfigError: an endpoint or a credential is not one; the message names the variable.
    """

    def __init__(
        self,
        endpoints: str,
        lease_ttl_s: int = LEASE_TTL_S,
        security: EtcdSecurity | None = None,
        reconcile_s: float = RECONCILE_S,
        tasks: Tasks | None = None,
    ) -> None:
        security = EtcdSecurity.from_env(os.environ) if security is None else security
        self._connection = Connection(parse_endpoints(endpoints), security)
        self._lease_ttl_s = lease_ttl_s
        self._reconcile_s = reconcile_s
        self._lease_id: int | None = None  # touched in the connection's thread only
        self._entry: Entry | None = None
        self._unwritten = False
        self._keepalive: asyncio.Task[None] | None = None
        self._watchers = Watchers()
        self._tasks = tasks if tasks is not None else Tasks()

    def __str__(self) -> str:
        return str(self._connection)

    async def join(self, entry: Entry) -> None:
        check_key(self._entry, entry)
        self._entry, self._unwritten = entry, True
        if self._keepalive is None:
            self._keepalive = self._tasks.start(self._keep_alive(), "keep the registration alive")
        await self._connection.call(self._put)

    async def update(self, **changes: object) -> Entry:
        entry = changed(self._entry, changes)
        await self.join(entry)
        return entry

    async def entries(self, namespace: str | None = None) -> list[Entry]:
        listing = await self._connection.call(lambda client: client.list_prefix(prefix_of(namespace)))
        return readable(listing.content)

    def watch(self, namespace: str | None = None) -> Watcher:
        prefix = prefix_of(namespace)
        return self._watchers.start(
            lambda state: follow(self._connection, prefix, state, self._reconcile_s), prefix
        )

    async def leave(self) -> None:
        if self._keepalive is not None:
            await self._tasks.stop([self._keepalive])
            self._keepalive = None
        if self._entry is not None:
            self._entry = None
            try:
                await self._connection.call(self._revoke)
            except VswaError as error:
                logger.warning("could not leave the registry, the lease will end it: %s", error)
                self._lease_id = None
        if not self._watchers.any_open():
            await self._connection.close()

    async def close(self) -> None:
        await self._watchers.close()
        await self.leave()

    def _put(self, client: Any) -> None:
        entry = self._entry
        if entry is None:
            return  # left while this call waited for its turn
        try:
            self._put_leased(client, entry)
        except FAILURES as error:
            if not is_lost_lease(error):
                raise
            self._lease_id = None
            self._put_leased(client, entry)
        self._unwritten = self._entry is not entry

    def _put_leased(self, client: Any, entry: Entry) -> None:
        if self._lease_id is None:
            self._lease_id = client.lease(self._lease_ttl_s).id
        client.put(entry.key, encode_entry(entry), self._lease_id)

    def _refresh(self, client: Any) -> None:
        """Keep the lease; where it or our key is gone, join again."""
        entry = self._entry
        if entry is None:
            return
        if self._lease_id is not None:
            if not any(response.TTL > 0 for response in client.refresh_lease(self._lease_id)):
                self._lease_id = None
            elif not self._unwritten and client.get(entry.key)[0] is not None:
                return
        logger.warning("%s is not in etcd as it should be: joining again", entry.key)
        self._put(client)

    def _revoke(self, client: Any) -> None:
        if self._lease_id is not None:
            client.revoke_lease(self._lease_id)
            self._lease_id = None

    async def _keep_alive(self) -> None:
        healthy = True
        while True:
            await asyncio.sleep(self._lease_ttl_s / 3)
            try:
                await self._connection.call(self._refresh)
            except VswaError as error:
                if healthy:
                    logger.warning("registry lease not refreshed, trying on: %s", error)
                healthy = False
            else:
                if not healthy:
                    logger.info("registry reached again")
                healthy = True
