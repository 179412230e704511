"""Endpoints of frontends: names stand for all their addresses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vswa_plugin.router.picker.destinations import Destinations


class Names:
    """Stands for the system's resolver."""

    def __init__(self, **addresses: list[str]) -> None:
        self.addresses = addresses

    async def getaddrinfo(self, host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        if host not in self.addresses:
            raise OSError(f"{host} is not known")
        return [(0, 0, 0, "", (address, port)) for address in self.addresses[host]]


def test_a_name_stands_for_all_its_addresses_and_keeps_the_last_ones_while_it_is_not_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = Names(frontends=["10.0.0.2", "10.0.0.1"], six=["fd00::1"])

    async def body() -> list[list[str | None]]:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", names.getaddrinfo)
        destinations = Destinations(["frontends:8000", "six:80"])
        rounds = [[destinations.next()]]
        for addresses in (["10.0.0.2", "10.0.0.1"], ["10.0.0.3"], None, None):
            if addresses is None:
                names.addresses.pop("frontends", None)
            else:
                names.addresses["frontends"] = addresses
            await destinations.look_up()
            rounds.append(sorted({str(destinations.next()) for _ in range(6)}))
        return [*rounds, [destinations.next(["10.9.9.9:1"])]]

    *found, among = asyncio.run(body())

    assert [None] == found[0]
    assert ["10.0.0.1:8000", "10.0.0.2:8000", "[fd00::1]:80"] == found[1]
    assert ["10.0.0.3:8000", "[fd00::1]:80"] == found[2] == found[3] == found[4]
    assert ["10.9.9.9:1"] == among
    assert 1 == caplog.text.count("frontends is not known")
