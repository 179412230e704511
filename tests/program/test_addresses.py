"""Addresses to listen on: what cannot be one is refused by the option that named it."""

from __future__ import annotations

import socket

import pytest

from vswa_plugin.errors import ConfigError
from vswa_plugin.program.addresses import check_address, http_url, local_url


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("0.0.0.0", "0.0.0.0")]
)
def test_a_free_address_is_returned_as_a_number(host: str, address: str) -> None:
    assert address == check_address(host, 0)


def test_a_port_on_which_something_listens_is_refused_by_its_option() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ConfigError) as refused:
            check_address("127.0.0.1", port, port_option="--nats-port")
    message = str(refused.value)

    assert message.startswith(f"--nats-port: expected a port of 127.0.0.1 that is free, got {port}")
    assert "Address already in use" in message
    assert "127.0.0.1" == check_address("127.0.0.1", port)


@pytest.mark.parametrize(
    "host", ["", "203.0.113.7", "nowhere.invalid", "x" * 5_000, "a b", "1.2.3.4.5", "é\0"]
)
def test_a_host_that_is_no_address_of_this_machine_is_refused_by_its_option(host: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_address(host, 0, host_option="--status-host")

    assert str(refused.value).startswith("--status-host: expected an address of this machine, got ")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9"),
        ("0.0.0.0", "http://127.0.0.1:9"),
        ("10.0.0.0", "http://10.0.0.0:9"),
        ("host", "http://host:9"),
        ("::1", "http://[::1]:9"),
        ("::", "http://[::1]:9"),
    ],
)
def test_an_ipv6_address_is_in_brackets_and_all_addresses_are_reached_at_the_local_one(
    host: str, url: str
) -> None:
    assert url == local_url(host, 9)
    assert (url == http_url(host, 9)) is (host not in ("0.0.0.0", "::"))
