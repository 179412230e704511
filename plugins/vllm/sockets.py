"""Where an engine publishes its events, as vLLM binds it and as a subscriber of this machine connects. Pure.

vLLM adds the number of a data-parallel rank to the number at the end of each address. Unless the user wants a
port, the addresses are sockets in a directory of this process alone: the events hold people's prompts, and a
port of vLLM's is open to the network.
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: Addresses of ports that vLLM binds.
_BOUND = re.compile(r"tcp://(?:\*|\[::\]|\[::1\]|127\.0\.0\.1):\d+")
#: vLLM takes the endpoint of events for one to connect to unless it is one of these.
_WILDCARDS = ("tcp://*:", "tcp://[::]:")
#: What a path of a Unix socket may have, less the digits of a rank.
_LONGEST_PATH = 100
_PORTS = range(1, 1 << 16)


class Sockets(NamedTuple):
    """Addresses of rank 0, as vLLM's ``KVEventsConfig`` takes them."""

    endpoint: str
    replay_endpoint: str

    def of_rank(self, dp_rank: int) -> Sockets:
        """The addresses to connect to for the events of one rank."""
        return Sockets(_reached(self.endpoint, dp_rank), _reached(self.replay_endpoint, dp_rank))


def private_sockets(directory: str) -> Sockets | None:
    """Sockets in ``directory``; None where its path is too long for the system."""
    if len(directory) > _LONGEST_PATH - len("/events-tcp:1"):
        return None
    # vLLM looks for "tcp" in the address, and for the number behind the last colon: without both it knows no
    # second rank.
    return Sockets(f"ipc://{directory}/events-tcp:1", f"ipc://{directory}/replay-tcp:1")


def problem(endpoint: str, ranks: int, *, published: bool) -> str | None:
    """What is wrong with an address that a user gives: what was expected; None where it can be used.

    :param published: whether events are published there; else they are asked for again.
    """
    if not _BOUND.fullmatch(endpoint) or (published and not endpoint.startswith(_WILDCARDS)):
        return "an address that vLLM binds, such as tcp://*:5557"
    first = port_of(endpoint)
    if first not in _PORTS or first + ranks - 1 not in _PORTS:
        return f"a port from {_PORTS[0]} to {_PORTS[-1]} for each of {ranks} data-parallel ranks"
    return None


def port_of(endpoint: str) -> int:
    """The number at the end of an address."""
    return int(endpoint.rpartition(":")[2])


def _reached(endpoint: str, dp_rank: int) -> str:
    before, _, number = endpoint.rpartition(":")
    before = before.replace("tcp://*", "tcp://127.0.0.1").replace("tcp://[::]", "tcp://[::1]")
    return f"{before}:{int(number) + dp_rank}"
