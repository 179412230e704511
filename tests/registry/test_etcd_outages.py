"""etcd's watch and keepalive while etcd, or the way to it, is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tests.conftest import Run
from tests.registry_fixtures import etcd as etcd
from tests.registry_fixtures import etcd_place as etcd_place
from tests.registry_helpers import (
    PATIENCE_S,
    EtcdBackend,
    Reader,
    content_of,
    entry,
    joined_and_watched,
    plant_entry,
)
from vswa_plugin.registry import Change, Connected, Joined, Left
from vswa_plugin.registry import _etcd3_client as client_module
from vswa_plugin.registry.etcd import EtcdRegistry
from vswa_plugin.registry.etcd_settings import EtcdSecurity


def names(reader: Reader) -> list[str]:
    return [type(change).__name__ for change in reader.seen]


def test_a_restart_on_the_same_data_loses_nothing_that_happened_right_after_it(
    run: Run[Any], etcd: EtcdBackend
) -> None:
    async def body() -> list[str]:
        router = etcd.registry()
        await plant_entry(etcd, entry(1))
        await plant_entry(etcd, entry(2))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1), entry(2))
            for round_ in range(2):
                await etcd.go_away()
                await reader.until(lambda reader: not reader.connected)
                await etcd.come_back()
                await etcd.remove(entry(1 + round_).key)
                await plant_entry(etcd, entry(3 + round_, round_))
                await reader.until_holds(entry(2 + round_, 1 - round_), entry(3 + round_, round_))
        await router.close()
        return names(reader)

    assert run(body())[:4] == ["Joined", "Joined", "Connected", "Disconnected"]


def test_a_registry_that_came_back_empty_is_told_and_its_workers_join_again(
    run: Run[Any], etcd: EtcdBackend
) -> None:
    async def body() -> None:
        worker, router = etcd.registry(), etcd.registry()
        await worker.join(entry(1))
        for number in range(30):  # so that the empty one is at an earlier revision
            await plant_entry(etcd, entry(2, number))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1), entry(2, 29))
            await etcd.go_away()
            await etcd.come_back(empty=True)
            await reader.until(lambda reader: Left(entry(2, 29)) in reader.seen)
            await reader.until_holds(entry(1))
            await plant_entry(etcd, entry(3))  # and the stream follows the new revisions
            await reader.until_holds(entry(1), entry(3))
        await asyncio.gather(worker.close(), router.close())

    run(body())


class Proxy:
    """A TCP proxy before etcd whose connections can be cut, or go dead without a word."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self._mute: set[asyncio.StreamWriter] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, back]
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if writer not in self._mute:
                    writer.write(data)
        finally:
            writer.close()

    def mute(self) -> None:
        """Nothing passes through the connections that there are; new ones work."""
        self._mute.update(self._writers)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        self.cut()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()


@pytest.mark.parametrize("fault", [Proxy.cut, Proxy.mute], ids=["cut", "dead without a word"])
def test_a_broken_connection_loses_nothing(
    run: Run[Any], etcd: EtcdBackend, fault: Callable[[Proxy], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "CALL_TIMEOUT_S", 0.3)

    async def body() -> list[str]:
        proxy = Proxy(etcd.port)
        router = EtcdRegistry(await proxy.start(), security=EtcdSecurity(), reconcile_s=0.2)
        await plant_entry(etcd, entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            fault(proxy)
            await plant_entry(etcd, entry(2))
            await etcd.remove(entry(1).key)
            await reader.until_holds(entry(2))
            await plant_entry(etcd, entry(2, 2))
            await reader.until_holds(entry(2, 2))
        await router.close()
        await proxy.stop()
        return names(reader)

    assert run(body())[0] == "Joined"


def test_the_watch_goes_on_at_the_next_endpoint(run: Run[Any], etcd: EtcdBackend) -> None:
    """Two proxies before one etcd stand for two members of a cluster."""

    async def body() -> list[Change]:
        first, second = Proxy(etcd.port), Proxy(etcd.port)
        urls = [await first.start(), await second.start()]
        router = EtcdRegistry(",".join(urls), security=EtcdSecurity(), reconcile_s=60)
        await plant_entry(etcd, entry(1))
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            await first.stop()
            await plant_entry(etcd, entry(2))
            await reader.until_holds(entry(1), entry(2))
        await router.close()
        await second.stop()
        return reader.seen

    assert run(body()) == [Joined(entry(1)), Connected(), Joined(entry(2))]


def test_an_etcd_that_is_away_is_asked_with_a_growing_pause(
    run: Run[Any], etcd: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[float] = []
    original = client_module.Connection.call

    async def call(connection: Any, use: Any) -> Any:
        attempts.append(time.monotonic())
        return await original(connection, use)

    async def body() -> None:
        router = etcd.registry()
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds()
            await etcd.go_away()
            await reader.until(lambda reader: not reader.connected)
            monkeypatch.setattr(client_module.Connection, "call", call)
            async with asyncio.timeout(PATIENCE_S):
                while len(attempts) < 4:
                    await asyncio.sleep(0.02)
            monkeypatch.undo()
            await etcd.come_back()
            await reader.until_holds()
        assert await content_of(router) == {}
        await router.close()

    run(body())
    pauses = [later - sooner for sooner, later in pairwise(attempts)]
    assert pauses == sorted(pauses)
    assert pauses[0] >= 0.05


def test_a_worker_whose_update_found_etcd_away_puts_it_when_it_is_back(
    run: Run[Any], etcd: EtcdBackend
) -> None:
    async def body() -> None:
        worker, router = etcd.registry(), etcd.registry()
        async with joined_and_watched(worker, router) as reader:
            await etcd.go_away()
            with pytest.raises(ConnectionError, match="ETCD_ENDPOINTS"):
                await worker.update(epochs={0: 5})
            await etcd.come_back()
            await reader.until_holds(entry(1, 5))

    run(body())
