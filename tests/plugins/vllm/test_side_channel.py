"""Where engines exchange what they need for NIXL."""

from __future__ import annotations

import os
import socket

import pytest
from vswa_plugins.vllm import side_channel as module
from vswa_plugins.vllm.side_channel import HOST, PORT, side_channel

from vswa_plugin.errors import ConfigError


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (HOST, PORT):
        monkeypatch.delenv(name, raising=False)


def test_the_users_own_are_taken_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOST, "10.0.0.7")
    monkeypatch.setenv(PORT, "5600")
    with side_channel(2):
        assert ("10.0.0.7", "5600") == (os.environ[HOST], os.environ[PORT])

    assert ("10.0.0.7", "5600") == (os.environ[HOST], os.environ[PORT])


def test_ports_that_are_taken_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        draws = iter([port - 1, port, port + 1])
        monkeypatch.setattr(module.random, "randrange", lambda *_: next(draws))
        with side_channel(2):
            chosen = int(os.environ[PORT])

    assert chosen == port + 1
    assert PORT not in os.environ


@pytest.mark.parametrize(("port", "ranks"), [("x", 1), ("0", 1), ("65536", 1), ("65535", 2), ("-1", 1)])
def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, port: str, ranks: int) -> None:
    monkeypatch.setenv(PORT, port)
    expected = f"{PORT}: expected a port from 1 to {65536 - ranks}, got '{port}'"
    with pytest.raises(ConfigError, match=expected), side_channel(ranks):
        pass


def test_a_host_that_is_not_this_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOST, "192.0.2.77")
    monkeypatch.setattr(module, "_TRIES", 2)
    with pytest.raises(ConfigError, match=f"{HOST}: expected an address of this machine"), side_channel(1):
        pass
