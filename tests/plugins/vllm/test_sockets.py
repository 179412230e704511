"""Where events are published: what vLLM binds, and what a subscriber connects to."""

from __future__ import annotations

import pytest
from vswa_plugins.vllm.sockets import Sockets, private_sockets, problem


def test_a_port_of_all_addresses_is_reached_by_the_loopback_address() -> None:
    sockets = Sockets("tcp://*:5557", "tcp://[::]:6000")

    assert Sockets("tcp://127.0.0.1:5557", "tcp://[::1]:6000") == sockets.of_rank(0)


def test_each_rank_has_the_port_and_its_number() -> None:
    assert "tcp://127.0.0.1:5560" == Sockets("tcp://*:5557", "tcp://*:6000").of_rank(3).endpoint


def test_private_sockets_have_a_path_for_each_rank() -> None:
    sockets = private_sockets("/tmp/x")
    assert sockets is not None
    paths = [address for rank in range(3) for address in sockets.of_rank(rank)]

    assert sockets == sockets.of_rank(0)
    assert 6 == len(set(paths)) and all(path.startswith("ipc:///tmp/x/") for path in paths)


def test_no_path_is_longer_than_a_unix_socket_takes() -> None:
    directory = "/" + "d" * 86
    sockets = private_sockets(directory)
    assert sockets is not None

    assert max(map(len, sockets.of_rank(99_999))) - len("ipc://") <= 107
    assert private_sockets(directory + "d" * 20) is None


@pytest.mark.parametrize(
    ("endpoint", "published"),
    [
        ("tcp://*:5557", True),
        ("tcp://[::]:1", True),
        ("tcp://127.0.0.1:5558", False),
        ("tcp://*:65535", False),
    ],
)
def test_addresses_that_vllm_binds_are_taken(endpoint: str, published: bool) -> None:
    assert problem(endpoint, 1, published=published) is None


@pytest.mark.parametrize(
    ("endpoint", "published", "expected"),
    [
        ("tcp://127.0.0.1:5557", True, "an address that vLLM binds"),  # vLLM would connect to it
        ("tcp://10.0.0.1:5557", False, "an address that vLLM binds"),
        ("inproc://x", True, "an address that vLLM binds"),
        ("ipc:///tmp/x", True, "an address that vLLM binds"),
        ("tcp://*:0", True, "a port from 1 to 65535"),
        ("tcp://*:65535", True, "for each of 2 data-parallel ranks"),
        ("tcp://*:99999999999999999999", True, "a port from 1 to 65535"),
    ],
)
def test_other_addresses_are_refused(endpoint: str, published: bool, expected: str) -> None:
    assert expected in str(problem(endpoint, 2, published=published))
