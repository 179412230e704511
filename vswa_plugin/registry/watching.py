"""What watching a registry means, for every backend: content in, changes out.

A backend writes what it sees into a :class:`RegistryState`, as single keys or as whole listings; the state
emits the differences to its content so far, so that a listing repairs whatever went missing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any

from vswa_plugin.errors import ProtocolError
from vswa_plugin.registry import (
    MAX_ENTRIES,
    Change,
    Connected,
    Disconnected,
    Entry,
    Joined,
    Left,
    Updated,
    decode_entry,
)

logger = logging.getLogger(__name__)

_TOO_MANY = "the registry: expected at most %d entries, got %d; the others are left out"


def readable(payloads: Mapping[str, bytes]) -> list[Entry]:
    """The entries in a listing, in order of their keys; malformed ones are logged and left out."""
    entries = []
    if len(payloads) > MAX_ENTRIES:
        logger.warning(_TOO_MANY, MAX_ENTRIES, len(payloads))
    for key in sorted(payloads)[:MAX_ENTRIES]:
        try:
            entries.append(decode_entry(key, payloads[key]))
        except ProtocolError as error:
            logger.warning("registry entry left out: %s", error)
    return entries


class RegistryState:
    """The registry's content as far as it is known. Pure but for ``emit`` and the log."""

    def __init__(self, emit: Callable[[Change], None]) -> None:
        self._emit = emit
        self._payloads: dict[str, bytes] = {}  # malformed ones too: each is logged once
        self.entries: dict[str, Entry] = {}
        self.connected = False
        self._outage = ""
        self._overfull = False

    def put(self, key: str, payload: bytes) -> None:
        """Key and payload as they are now. A malformed entry is none."""
        if self._payloads.get(key) == payload or self._is_full_for(key):
            return
        self._payloads[key] = payload
        try:
            entry = decode_entry(key, payload)
        except ProtocolError as error:
            logger.warning("registry entry left out: %s", error)
            self._forget(key)
            return
        former = self.entries.get(key)
        self.entries[key] = entry
        if former is None:
            self._emit(Joined(entry))
        elif former != entry:
            self._emit(Updated(entry))

    def remove(self, key: str) -> None:
        """The key is gone."""
        self._payloads.pop(key, None)
        self._overfull = False
        self._forget(key)

    def replace(self, payloads: Mapping[str, bytes]) -> None:
        """The whole content as it is now."""
        for key in [key for key in self._payloads if key not in payloads]:
            self.remove(key)
        for key in sorted(payloads):
            self.put(key, payloads[key])

    def differs(self, payloads: Mapping[str, bytes]) -> bool:
        """Whether :meth:`replace` would change anything."""
        if len(payloads) > MAX_ENTRIES:
            full = len(self._payloads) >= MAX_ENTRIES
            return not full or any(payloads.get(key) != known for key, known in self._payloads.items())
        return self._payloads != payloads

    def connect(self) -> None:
        """The content is complete."""
        if not self.connected:
            self.connected, self._outage = True, ""
            self._emit(Connected())

    def disconnect(self, reason: str) -> None:
        """The content cannot be read any more; emitted once per outage."""
        if self.connected or not self._outage:
            self.connected, self._outage = False, reason
            logger.warning("registry not readable, the last known state stands: %s", reason)
            self._emit(Disconnected(reason))

    def _is_full_for(self, key: str) -> bool:
        """Whether there is no room for one more entry; logged once, until an entry has gone."""
        full = len(self._payloads) >= MAX_ENTRIES and key not in self._payloads
        if full and not self._overfull:
            self._overfull = True
            logger.warning(_TOO_MANY, MAX_ENTRIES, len(self._payloads) + 1)
        return full

    def _forget(self, key: str) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self._emit(Left(entry))


class Watcher:
    """Changes of a registry, in order, as an async iterator; made by :meth:`Registry.watch`.

    First a ``Joined`` for each entry that is there, then ``Connected``, then what happens. A reader
    that applies ``Joined``, ``Updated`` and ``Left`` holds exactly what the registry holds whenever nothing
    is under way, after any outage too: changes of that time may come as their net difference.
    Between ``Disconnected`` and ``Connected`` the last known state stands. A reader that is slow loses
    nothing. Close it, or use it with ``async with``; iteration ends then.
    """

    def __init__(self, follow: Callable[[RegistryState], Coroutine[Any, Any, None]], name: str) -> None:
        """Runs ``follow``, which feeds the state until it is cancelled. Needs a running event loop."""
        self._changes: asyncio.Queue[Change | None] = asyncio.Queue()  # registrations change rarely
        self._state = RegistryState(self._changes.put_nowait)
        self._closed = False
        self._task = asyncio.create_task(follow(self._state), name=name)
        self._task.add_done_callback(lambda _: self._changes.put_nowait(None))

    @property
    def connected(self) -> bool:
        """Whether the registry can be read right now; may be ahead of the changes taken so far."""
        return self._state.connected

    @property
    def closed(self) -> bool:
        return self._closed

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> Change:
        change = None if self._closed else await self._changes.get()
        if change is not None and not self._closed:
            return change
        self._changes.put_nowait(None)  # for others that wait, and for the next call
        if self._task.done() and not self._task.cancelled() and (error := self._task.exception()):
            raise error
        raise StopAsyncIteration

    async def close(self) -> None:
        """End the watch and all that runs for it."""
        self._closed = True
        self._task.cancel()
        await asyncio.wait({self._task})

    async def __aenter__(self) -> Watcher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Watchers:
    """The watchers that one registry has made."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()

    def start(self, follow: Callable[[RegistryState], Coroutine[Any, Any, None]], prefix: str) -> Watcher:
        """A new :class:`Watcher` of the keys under ``prefix``."""
        watcher = Watcher(follow, f"watch {prefix}")
        self._forget_closed()
        self._watchers.add(watcher)
        return watcher

    def any_open(self) -> bool:
        self._forget_closed()
        return bool(self._watchers)

    async def close(self) -> None:
        await asyncio.gather(*(watcher.close() for watcher in self._watchers))

    def _forget_closed(self) -> None:
        self._watchers = {watcher for watcher in self._watchers if not watcher.closed}
