"""The registry in a directory: one file per worker, for a single machine or shared storage, without etcd.

Follows Dynamo's ``DYN_DISCOVERY_BACKEND=file``: the same directory may serve both (``DYN_FILE_KV``), ours
is a folder of its own in it. Two signs of life, and an entry is gone as soon as one of them fails:

* The writer touches its file three times per TTL, which works on any storage, but takes the TTL to show
  a crash. The reader compares the times of the file with its clock once, then counts its own monotonic
  clock, so that a step of the wall clock ends no entry. Across machines, clocks must agree within the TTL.
* The writer holds ``flock`` on its file, which the kernel frees in the moment of a SIGKILL. Only taken as
  a sign where the entry names the reader's own host: not every shared storage carries locks to others.
  A forked child that outlives its worker keeps the lock; the TTL ends the entry then.

Watching polls: five times a second by default, because inotify does not see other machines.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vswa_plugin.errors import ConnectError, VswaError
from vswa_plugin.registry import Entry, changed, check_key, encode_entry, prefix_of
from vswa_plugin.registry.entry_files import EntryFile, Scanner, sweep
from vswa_plugin.registry.threads import SerialThread
from vswa_plugin.registry.watching import RegistryState, Watcher, Watchers, readable
from vswa_plugin.tasks import Tasks

logger = logging.getLogger(__name__)

TTL_S = 10.0
POLL_S = 0.2
FOLDER = "vswa-v1-workers"
T = TypeVar("T")


class FileRegistry:
    """Registry of one process in ``directory``, which is made with the first call.

    :param ttl_s: an entry that was not touched for so long is gone; the same for all in a directory.
    :param poll_s: how often a watcher looks.
    :param tasks: where the task that touches the entry is watched.
    """

    def __init__(
        self,
        directory: str | Path,
        ttl_s: float = TTL_S,
        poll_s: float = POLL_S,
        tasks: Tasks | None = None,
    ) -> None:
        self._folder = Path(directory).absolute() / FOLDER
        self._ttl_s = ttl_s
        self._poll_s = poll_s
        self._thread = SerialThread("vswa-files")  # the file system may block, e.g. over a network
        self._scanner = Scanner(self._folder, ttl_s, socket.gethostname())
        self._folder_created = False
        self._entry: Entry | None = None
        self._file: EntryFile | None = None
        self._keepalive: asyncio.Task[None] | None = None
        self._watchers = Watchers()
        self._tasks = tasks if tasks is not None else Tasks()

    def __str__(self) -> str:
        return f"directory {self._folder}"

    async def join(self, entry: Entry) -> None:
        check_key(self._entry, entry)
        self._entry = entry
        if self._keepalive is None:
            self._keepalive = self._tasks.start(self._keep_alive(), "keep the registration alive")
        await self._call(self._write)

    async def update(self, **changes: object) -> Entry:
        entry = changed(self._entry, changes)
        await self.join(entry)
        return entry

    async def entries(self, namespace: str | None = None) -> list[Entry]:
        return readable(await self._scan(prefix_of(namespace)))

    def watch(self, namespace: str | None = None) -> Watcher:
        prefix = prefix_of(namespace)
        return self._watchers.start(lambda state: self._follow(prefix, state), prefix)

    async def leave(self) -> None:
        if self._keepalive is not None:
            await self._tasks.stop([self._keepalive])
            self._keepalive = None
        if self._entry is not None:
            self._entry = None
            try:
                await self._call(self._remove)
            except VswaError as error:
                logger.warning("could not leave the registry, the TTL will end it: %s", error)
        if not self._watchers.any_open():
            await self._thread.close()

    async def close(self) -> None:
        await self._watchers.close()
        await self.leave()

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            return await self._thread.run(work)
        except OSError as error:
            raise ConnectError(
                f"expected a directory that can be read and written at {self._folder} (VSWA_REGISTRY), "
                f"got {error.strerror or error}"
            ) from error

    async def _scan(self, prefix: str) -> dict[str, bytes]:
        return await self._call(lambda: self._look(prefix))

    def _look(self, prefix: str) -> dict[str, bytes]:
        # Once: a directory that vanished later is a fault, not an empty registry.
        if not self._folder_created:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder_created = True
        return self._scanner.scan(prefix)

    def _write(self) -> None:
        if self._entry is None:
            return  # left while this call waited for its turn
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._file is None:
            sweep(self._folder, 10 * self._ttl_s)
            self._file = EntryFile(self._folder, self._entry.key)
        self._file.write(encode_entry(self._entry))

    def _remove(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.remove()

    def _touch(self) -> None:
        """Show life; where our file is gone or was never written as it should be, join again."""
        if self._entry is None:
            return
        if self._file is None or not self._file.touch(encode_entry(self._entry)):
            logger.warning("%s is not in %s as it should be: joining again", self._entry.key, self._folder)
            self._write()

    async def _keep_alive(self) -> None:
        healthy = True
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            try:
                await self._call(self._touch)
            except VswaError as error:
                if healthy:
                    logger.warning("registry entry not touched, trying on: %s", error)
                healthy = False
            else:
                healthy = True

    async def _follow(self, prefix: str, state: RegistryState) -> None:
        """Feed ``state`` until cancelled."""
        while True:
            try:
                state.replace(await self._scan(prefix))
                state.connect()
            except VswaError as error:
                state.disconnect(str(error))
            await asyncio.sleep(self._poll_s)
