"""What a network may do to messages, by name. The same seed does the same to the same messages.

A fault says what one message becomes on its way: itself, nothing, several, something else. What is held back
when a fault ends is lost.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

__all__ = [
    "FAULTS",
    "Fault",
    "corrupt",
    "cut",
    "late",
    "lose",
    "reorder",
    "repeat",
    "whole",
]

#: What becomes of one payload: the payloads that are delivered in its place.
Fault = Callable[[bytes], list[bytes]]
#: The share of messages that a fault strikes, unless said otherwise.
SHARE = 0.3
#: No message of ours begins with this byte: msgpack never uses it.
NEVER = b"\xc1"


def whole(payload: bytes) -> list[bytes]:
    """No fault."""
    return [payload]


def lose(seed: int, share: float = SHARE) -> Fault:
    """Some messages never arrive."""
    return _some(seed, share, lambda payload, _: [])


def repeat(seed: int, share: float = SHARE) -> Fault:
    """Some messages arrive twice."""
    return _some(seed, share, lambda payload, _: [payload, payload])


def cut(seed: int, share: float = SHARE) -> Fault:
    """Of some messages only the beginning arrives."""
    return _some(seed, share, lambda payload, rng: [payload[: rng.randrange(len(payload))]])


def corrupt(seed: int, share: float = SHARE) -> Fault:
    """Some messages arrive as other bytes of the same length, which no reader can take for a message."""
    return _some(seed, share, lambda payload, rng: [NEVER + rng.randbytes(len(payload) - 1)])


def reorder(seed: int, share: float = SHARE) -> Fault:
    """Some messages arrive after the one that follows them."""
    return late(seed, share, by=1)


def late(seed: int, share: float = SHARE, by: int = 5) -> Fault:
    """Some messages arrive after the ``by`` that follow them."""
    rng = random.Random(seed)
    held: deque[tuple[int, bytes]] = deque()
    number = 0

    def fault(payload: bytes) -> list[bytes]:
        nonlocal number
        number += 1
        if rng.random() < share:
            held.append((number + by, payload))
            arrived = []
        else:
            arrived = [payload]
        while held and held[0][0] <= number:
            arrived.append(held.popleft()[1])
        return arrived

    return fault


def _some(seed: int, share: float, strike: Callable[[bytes, random.Random], list[bytes]]) -> Fault:
    rng = random.Random(seed)
    return lambda payload: strike(payload, rng) if rng.random() < share else [payload]


#: Every kind of fault by its name; each takes a seed.
FAULTS: dict[str, Callable[[int], Fault]] = {
    "lose": lose,
    "repeat": repeat,
    "reorder": reorder,
    "corrupt": corrupt,
    "cut": cut,
    "late": late,
}
