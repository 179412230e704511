"""The conformance suite of registries that can be out of reach: outages, and how they end."""

from __future__ import annotations

from vswa_plugin.registry import Disconnected
from vswa_plugin.testing.registry_backends import (
    InterruptibleBackend,
    Reader,
    nothing_runs_after_close,
    plant_entry,
    remote,
)

__all__ = [
    "RegistryOutageConformance",
]


class RegistryOutageConformance:
    """What a registry promises while its place cannot be reached.

    It adds to :class:`~vswa_plugin.testing.registries.RegistryConformance`. An author
    subclasses it with a fixture ``backend``: an
    :class:`~vswa_plugin.testing.registry_backends.InterruptibleBackend` that is empty.
    """

    def test_while_the_registry_is_away_the_last_known_state_stands(
        self, backend: InterruptibleBackend
    ) -> None:
        async def body() -> list[object]:
            router = backend.registry()
            await plant_entry(backend, remote(1))
            await plant_entry(backend, remote(2))
            async with router.watch() as watcher:
                reader = Reader(watcher, backend.patience_s)
                await reader.until_holds(remote(1), remote(2))
                await backend.go_away()
                await reader.until(lambda reader: not reader.connected)
                connected.append(watcher.connected)
                assert len(reader.content) == 2
                await backend.come_back()
                await backend.remove(remote(1).key)
                await plant_entry(backend, remote(2, 7))
                await reader.until_holds(remote(2, 7))
                connected.append(watcher.connected)
            await router.close()
            return [type(change).__name__ for change in reader.seen]

        connected: list[bool] = []
        kinds = backend.run(body())
        assert connected == [False, True]
        assert kinds[:4] == ["Joined", "Joined", "Connected", "Disconnected"]
        assert sorted(kinds[4:]) == ["Connected", "Left", "Updated"]

    def test_a_watch_may_begin_while_the_registry_is_away(self, backend: InterruptibleBackend) -> None:
        async def body() -> list[str]:
            router = backend.registry()
            await router.entries()
            await plant_entry(backend, remote(1))
            await backend.go_away()
            async with router.watch() as watcher:
                reader = Reader(watcher, backend.patience_s)
                await reader.until(lambda reader: bool(reader.seen))
                await backend.come_back()
                await reader.until_holds(remote(1))
            await router.close()
            return [type(change).__name__ for change in reader.seen]

        assert backend.run(body()) == ["Disconnected", "Joined", "Connected"]

    def test_disconnected_says_where_and_which_setting(self, backend: InterruptibleBackend) -> None:
        async def body() -> str:
            router = backend.registry()
            async with router.watch() as watcher:
                reader = Reader(watcher, backend.patience_s)
                await reader.until_holds()
                await backend.go_away()
                await reader.until(lambda reader: not reader.connected)
                await backend.come_back()
            await router.close()
            (reason,) = [change.reason for change in reader.seen if isinstance(change, Disconnected)]
            return reason

        reason = backend.run(body())
        assert any(setting in reason for setting in backend.settings), reason

    def test_nothing_runs_any_more_after_a_close_during_an_outage(
        self, backend: InterruptibleBackend
    ) -> None:
        nothing_runs_after_close(backend, backend)
