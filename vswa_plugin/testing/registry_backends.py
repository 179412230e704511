"""What the conformance suites of registries need: the place of a registry, entries, and a strict reader."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from socket import gethostname
from typing import Any, Protocol

import msgspec

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.registry import (
    Change,
    Connected,
    Disconnected,
    Entry,
    Joined,
    Left,
    Registry,
    Updated,
    encode_entry,
)
from vswa_plugin.registry.watching import Watcher

__all__ = [
    "InterruptibleBackend",
    "KillableWorker",
    "Reader",
    "RegistryBackend",
    "content_of",
    "entry",
    "joined_and_watched",
    "nothing_runs_after_close",
    "plant_entry",
    "remote",
]

#: Seconds within which a change reaches a watcher, on a machine that is busy with other things.
PATIENCE_S = 20.0
ENTRY = Entry(
    namespace="ns",
    component="backend",
    worker_id=0xABC,
    mode="agg",
    engine="gemma3_cpu",
    served_model_name="gemma",
    model_path="/models/gemma",
    context_length=8192,
    block_size=32,
    rule="trtllm_v2",
    hash_scheme="dynamo-xxh3-1337",
    groups=(CacheGroup(0, 512, 32), CacheGroup(1, None, 32)),
    epochs={0: 2**63, 1: 5},
    total_kv_blocks=100,
    host=gethostname(),
)


def entry(worker_id: int, epoch: int = 1, namespace: str = "ns") -> Entry:
    """An entry of this machine."""
    return msgspec.structs.replace(ENTRY, worker_id=worker_id, epochs={0: epoch}, namespace=namespace)


def remote(worker_id: int, epoch: int = 1, namespace: str = "ns") -> Entry:
    """An entry of another machine: planted, it lives for a TTL."""
    return msgspec.structs.replace(entry(worker_id, epoch, namespace), host="elsewhere")


class KillableWorker(Protocol):
    """A process of its own that has joined a registry."""

    def kill(self) -> None:
        """Send SIGKILL."""

    async def wait(self) -> object:
        """Return once the process has ended."""


class RegistryBackend(Protocol):
    """One place where registries meet, empty at the start of each test, and ways to reach past the registry.

    :ivar run: runs a coroutine to its end. ``asyncio.run`` serves a place that belongs to no event loop.
    :ivar patience_s: seconds within which a change must reach a watcher; ``PATIENCE_S`` is a fair one.
    :ivar outlives_s: seconds in which an entry with a TTL of one second would be gone without its keepalive.
    """

    run: Callable[[Coroutine[Any, Any, Any]], Any]
    patience_s: float
    outlives_s: float

    def registry(self, ttl_s: int | None = None) -> Registry:
        """A new registry of this place; None: entries live for longer than a test without a keepalive."""

    async def start_worker(self, joined: Entry) -> KillableWorker:
        """Start a process that joins with ``joined``; it need not have joined on return."""

    async def plant(self, key: str, payload: bytes) -> None:
        """Put ``payload`` under ``key``, whatever it is, at once and without a keepalive."""

    async def remove(self, key: str) -> None:
        """Delete what is under ``key``."""


class InterruptibleBackend(RegistryBackend, Protocol):
    """A place that can be out of reach for a while.

    Tasks that it leaves are told from the registry's by their code, which lies in another folder.

    :ivar settings: names of the settings that say where the registry is; each ``Disconnected`` names one.
    """

    settings: tuple[str, ...]

    async def go_away(self) -> None:
        """From now on the place cannot be reached."""

    async def come_back(self) -> None:
        """The place can be reached again, with its content as it was."""


class Reader:
    """Applies changes, and fails at those that do not fit what it holds.

    :ivar content: key -> entry, as the changes so far have it.
    :ivar seen: all changes so far.
    """

    def __init__(self, watcher: Watcher, patience_s: float = PATIENCE_S) -> None:
        self._watcher = watcher
        self._patience_s = patience_s
        self.content: dict[str, Entry] = {}
        self.seen: list[Change] = []
        self.connected = False

    def apply(self, change: Change) -> None:
        """Apply one change.

        :raises AssertionError: it does not fit the content.
        """
        self.seen.append(change)
        match change:
            case Joined(new):
                assert new.key not in self.content, (
                    f"expected Updated for an entry that is there, got {change}"
                )
                self.content[new.key] = new
            case Updated(new):
                assert self.content[new.key] != new, f"expected no change for an equal entry, got {change}"
                self.content[new.key] = new
            case Left(old):
                assert self.content.pop(old.key) == old, f"expected the entry as it was last, got {change}"
            case Connected():
                assert not self.connected, "expected Connected once after each Disconnected, got it again"
                self.connected = True
            case Disconnected(reason):
                assert reason, "expected a reason in Disconnected, got none"
                self.connected = False

    async def until(self, reached: Callable[[Reader], bool]) -> None:
        """Read changes until ``reached``.

        :raises TimeoutError: it was not reached within the patience.
        """
        async with asyncio.timeout(self._patience_s):
            while not reached(self):
                self.apply(await anext(self._watcher))

    async def until_holds(self, *entries: Entry) -> None:
        """Read until exactly ``entries`` are held, and the watcher is connected."""
        expected = {each.key: each for each in entries}
        await self.until(lambda reader: reader.content == expected and reader.connected)


@asynccontextmanager
async def joined_and_watched(
    worker: Registry, router: Registry, patience_s: float = PATIENCE_S
) -> AsyncIterator[Reader]:
    """``worker`` has joined with ``entry(1)``, and ``router`` watches it; both are closed at the end."""
    await worker.join(entry(1))
    async with router.watch() as watcher:
        reader = Reader(watcher, patience_s)
        await reader.until_holds(entry(1))
        yield reader
    await asyncio.gather(worker.close(), router.close())


async def plant_entry(backend: RegistryBackend, planted: Entry) -> None:
    """Put an entry of a worker that needs no keepalive and whose life no lock shows."""
    await backend.plant(planted.key, encode_entry(planted))


async def content_of(registry: Registry, namespace: str | None = None) -> dict[str, Entry]:
    """Key -> entry, of one namespace or of all."""
    return {each.key: each for each in await registry.entries(namespace)}


def nothing_runs_after_close(
    backend: RegistryBackend, interruptible: InterruptibleBackend | None = None
) -> None:
    """Check that no task and no thread is left once the registries of ``backend`` are closed.

    :param interruptible: the same backend where it is to be out of reach meanwhile.
    """
    for thread in backend.run(_left_after_close(backend, interruptible)):
        thread.join(backend.patience_s)  # a client library's threads may end by themselves a little later
        assert not thread.is_alive(), f"expected no thread after close(), got {thread.name} still running"


async def _left_after_close(
    backend: RegistryBackend, interruptible: InterruptibleBackend | None
) -> list[threading.Thread]:
    """Threads of the registries that have not ended yet; none of ours may be among them."""
    if interruptible is not None:
        await asyncio.to_thread(int)  # to go away, a place may use this thread, which is the loop's and stays
    before, tasks = set(threading.enumerate()), asyncio.all_tasks()
    worker, router = backend.registry(), backend.registry()
    await worker.join(entry(1))
    watchers = [router.watch(), router.watch("ns"), worker.watch()]
    for watcher in watchers:
        await Reader(watcher, backend.patience_s).until_holds(entry(1))
    opening = router.watch()  # closed while it connects
    if interruptible is not None:
        await interruptible.go_away()
    await asyncio.gather(worker.close(), router.close())
    assert opening.closed
    assert asyncio.all_tasks() <= tasks, "expected no task of the registries after close()"
    if interruptible is not None:
        await interruptible.come_back()
        await _connect(backend)  # what begins again on the way back has had as long as a registry needs
        revived = [each for each in asyncio.all_tasks() - tasks if _is_of(worker, each)]
        assert [] == revived, "expected no task of the registries once the place is back"
    # asyncio waits for a child process in a thread of its own.
    left = [
        each for each in set(threading.enumerate()) - before if not each.name.startswith("asyncio-waitpid")
    ]
    assert [] == [each.name for each in left if each.name.startswith("vswa")]
    return left


async def _connect(backend: RegistryBackend) -> None:
    """Return once a new registry has read the place."""
    registry = backend.registry()
    async with registry.watch() as watcher:
        await Reader(watcher, backend.patience_s).until(lambda reader: reader.connected)
    await registry.close()


def _is_of(registry: Registry, task: asyncio.Task[Any]) -> bool:
    """Whether a task runs code from beside one of the registry's classes; the backend has tasks as well."""
    code = getattr(task.get_coro(), "cr_code", None)
    modules = (sys.modules.get(kind.__module__) for kind in type(registry).__mro__)
    files = (getattr(module, "__file__", None) for module in modules)
    return code is not None and Path(code.co_filename).parent in {Path(file).parent for file in files if file}
