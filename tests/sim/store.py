"""A registry with leases, as etcd is one, and what a router reads of it: the project's own watch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from vswa_plugin.errors import ConnectError, ProtocolError
from vswa_plugin.registry import Entry, decode_entry, encode_entry
from vswa_plugin.registry.watching import RegistryState, Watcher

TTL_S = 10.0
#: From a change to its watchers.
DELAY_S = 0.01


class Store:
    """What all machines share.

    :ivar away: nobody can read or write it. Leases run on from where they were when it is back.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._entries: dict[str, tuple[bytes, float, object]] = {}
        self._watched: set[asyncio.Event] = set()
        self.away = 0

    def put(self, entry: Entry, owner: object) -> None:
        """Raises ConnectError."""
        self._check()
        self._entries[entry.key] = (encode_entry(entry), self._now() + TTL_S, owner)
        self._changed()

    def keep_alive(self, entry: Entry, owner: object) -> None:
        """Raises ConnectError. An entry that ran out is put again; that of another life stands."""
        self._check()
        held = self._entries.get(entry.key)
        if held is None or held[2] is owner:
            self.put(entry, owner)

    def remove(self, entry: Entry, owner: object) -> None:
        held = self._entries.get(entry.key)
        if held is not None and held[2] is owner and not self.away:
            del self._entries[entry.key]
            self._changed()

    def expire(self) -> None:
        """Called now and then: leases that ran out end."""
        over = [key for key, (_, until, _) in self._entries.items() if until < self._now()]
        for key in [] if self.away else over:
            del self._entries[key]
            self._changed()

    def leave(self, seconds: float) -> None:
        """It is away for so long."""
        self.away += 1
        self._changed()
        asyncio.get_running_loop().call_later(seconds, self._come_back)

    def _come_back(self) -> None:
        self.away -= 1
        until = self._now() + TTL_S
        self._entries = {key: (payload, until, owner) for key, (payload, _, owner) in self._entries.items()}
        self._changed()

    def payloads(self) -> dict[str, bytes]:
        self._check()
        return {key: payload for key, (payload, _, _) in self._entries.items()}

    def entries(self) -> list[Entry]:
        found = []
        for key, payload in self.payloads().items():
            try:
                found.append(decode_entry(key, payload))
            except ProtocolError:
                continue
        return found

    async def follow(self, state: RegistryState) -> None:
        """Write what is there into ``state``, until cancelled."""
        changed = asyncio.Event()
        self._watched.add(changed)
        try:
            while True:
                await asyncio.sleep(DELAY_S)
                if self.away:
                    state.disconnect("the simulated registry is away")
                else:
                    state.replace(self.payloads())
                    state.connect()
                await changed.wait()
                changed.clear()
        finally:
            self._watched.discard(changed)

    def _changed(self) -> None:
        for each in self._watched:
            each.set()

    def _check(self) -> None:
        if self.away:
            raise ConnectError("the simulated registry is away")


class StoreReader:
    """What a fleet needs of a registry."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watchers: list[Watcher] = []

    def watch(self, namespace: str | None = None) -> Watcher:
        follow: Callable[[RegistryState], Coroutine[Any, Any, None]] = self._store.follow
        self._watchers.append(Watcher(follow, "watch the simulated registry"))
        return self._watchers[-1]

    async def close(self) -> None:
        for each in self._watchers:
            await each.close()
