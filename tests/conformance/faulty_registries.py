"""Registries with one planted fault each: their tests must fail. test_registry_faults.py runs them apart."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from tests.registry_helpers import FileBackend
from vswa_plugin.errors import ConnectError, InvariantError, ProtocolError, VswaError
from vswa_plugin.registry import PREFIX, Entry, prefix_of
from vswa_plugin.registry import watching as watching_module
from vswa_plugin.registry.entry_files import Scanner
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.registry.watching import RegistryState, Watcher
from vswa_plugin.testing.registries import RegistryConformance
from vswa_plugin.testing.registry_backends import RegistryBackend
from vswa_plugin.testing.registry_outages import RegistryOutageConformance


class _Suite(RegistryConformance, RegistryOutageConformance):
    kind: type[FileRegistry] = FileRegistry

    @pytest.fixture
    def backend(self, tmp_path: Path) -> RegistryBackend:
        kind = self.kind

        class Backend(FileBackend):
            patience_s = 1.0

            def registry(self, ttl_s: int | None = None) -> FileRegistry:
                return kind(self._folder, ttl_s or self.ttl_s, poll_s=0.02)

        return Backend(tmp_path)


class TestSound(_Suite):
    """A registry without a fault, and the patience that a busy machine needs."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> RegistryBackend:
        return FileBackend(tmp_path)


class TestJoinsOnce(_Suite):
    class kind(FileRegistry):
        async def join(self, entry: Entry) -> None:
            if self._entry is None:
                await super().join(entry)


class TestUpdatesAnything(_Suite):
    class kind(FileRegistry):
        async def update(self, **changes: object) -> Entry:
            try:
                return await super().update(**changes)
            except InvariantError:
                assert self._entry is not None
                return self._entry


class TestEachJoinIsNews(_Suite):
    class kind(FileRegistry):
        numbers: ClassVar = itertools.count()

        async def join(self, entry: Entry) -> None:
            await super().join(msgspec.structs.replace(entry, pid=next(self.numbers)))


class TestConnectedBeforeTheContent(_Suite):
    class kind(FileRegistry):
        async def _follow(self, prefix: str, view: RegistryState) -> None:
            view.connect()
            await super()._follow(prefix, view)


class TestTheDeadStay(_Suite):
    class kind(FileRegistry):
        def __init__(self, folder: Path, ttl_s: float, poll_s: float) -> None:
            super().__init__(folder, ttl_s, poll_s)
            self._scanner = Scanner(self._folder, 3600, "another host")


class TestNoKeepalive(_Suite):
    class kind(FileRegistry):
        async def _keep_alive(self) -> None:
            await asyncio.Event().wait()


class TestLeavesForOthers(_Suite):
    class kind(FileRegistry):
        def _remove(self) -> None:
            if self._file is not None:
                self._file._path.unlink(missing_ok=True)
            super()._remove()


class TestLosesChanges(_Suite):
    """Once it has listed so many entries it sees no more."""

    class kind(FileRegistry):
        async def _scan(self, prefix: str) -> dict[str, bytes]:
            payloads = await super()._scan(prefix)
            return dict(sorted(payloads.items())[:5])


class TestAnyNamespaceThatBeginsSo(_Suite):
    class kind(FileRegistry):
        async def _scan(self, prefix: str) -> dict[str, bytes]:
            return await super()._scan(prefix if prefix == PREFIX else prefix.rstrip("/"))


class TestMalformedEntriesEndTheWatch(_Suite):
    class kind(FileRegistry):
        async def _scan(self, prefix: str) -> dict[str, bytes]:
            payloads = await super()._scan(prefix)
            for payload in payloads.values():
                msgspec.json.decode(payload, type=Entry)
            return payloads


class TestTakesOddEntries(_Suite):
    @pytest.fixture(autouse=True)
    def _no_oddity(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def decode_entry(key: str, payload: bytes) -> Entry:
            try:
                return msgspec.json.decode(payload, type=Entry)
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                raise ProtocolError(f"expected an entry at {key}") from error

        monkeypatch.setattr(watching_module, "decode_entry", decode_entry)


class TestLogsEachLook(_Suite):
    class kind(FileRegistry):
        async def _follow(self, prefix: str, view: RegistryState) -> None:
            while True:
                view._payloads.clear()
                view.replace(await self._scan(prefix))
                view.connect()
                await asyncio.sleep(0.02)


class TestAnOutageEmptiesIt(_Suite):
    class kind(FileRegistry):
        async def _follow(self, prefix: str, view: RegistryState) -> None:
            while True:
                try:
                    view.replace(await self._scan(prefix))
                    view.connect()
                except VswaError as error:
                    view.replace({})
                    view.disconnect(str(error))
                await asyncio.sleep(0.02)


class TestEndsWithAnOutage(_Suite):
    class kind(FileRegistry):
        async def _follow(self, prefix: str, view: RegistryState) -> None:
            while True:
                view.replace(await self._scan(prefix))
                view.connect()
                await asyncio.sleep(0.02)


class TestSaysNotWhy(_Suite):
    class kind(FileRegistry):
        async def _scan(self, prefix: str) -> dict[str, bytes]:
            try:
                return await super()._scan(prefix)
            except VswaError as error:
                raise ConnectError("out of reach") from error


class TestLeavesATask(_Suite):
    class kind(FileRegistry):
        async def close(self) -> None:
            self._left = asyncio.create_task(asyncio.Event().wait())
            await super().close()


class TestBeginsAgainAfterAnOutage(_Suite):
    """Closed while the place is away, it looks for it without a task, and works on once it is back."""

    class kind(FileRegistry):
        async def close(self) -> None:
            away = not self._folder.exists()
            await super().close()
            if away:
                self._look_again()

        def _look_again(self) -> None:
            loop = asyncio.get_running_loop()
            if self._folder.exists():
                self._again = loop.create_task(self._keep_alive())
            else:
                loop.call_soon(self._look_again)


class TestLeavesAThread(_Suite):
    class kind(FileRegistry):
        async def close(self) -> None:
            await self._watchers.close()


class TestClosingEndsNoIteration(_Suite):
    class kind(FileRegistry):
        def watch(self, namespace: str | None = None) -> Watcher:
            class Deaf(Watcher):
                async def close(self) -> None:
                    """The watch goes on."""

            prefix = prefix_of(namespace)
            return Deaf(lambda view: self._follow(prefix, view), prefix)


class TestOnlyOnce(_Suite):
    class kind(FileRegistry):
        over = False

        async def join(self, entry: Entry) -> None:
            if not self.over:
                await super().join(entry)

        async def close(self) -> None:
            await super().close()
            self.over = True
