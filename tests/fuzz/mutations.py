"""How a valid message is spoilt: bytes, lengths, numbers and nesting, as MessagePack and JSON have them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Codec(NamedTuple):
    """How a message becomes a value, and back."""

    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]


#: MessagePack that claims to be long, deep, or larger than any number; and bytes that are nothing.
_CLAIMS = [
    *(kind + b"\xff\xff\xff\xff" for kind in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")),
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + b"\x00" * 7,
    b"\xcb\x7f\xf8" + b"\x00" * 6,
    b"\xcb\x7f\xf0" + b"\x00" * 6,
    b"\xa4\xff\xfe\x00\x80",
    b"\x91" * 2_000,
    b"\x81\xa0" * 1_000,
    b"\xc1",
    b"\xc0",
]
#: The same for JSON.
_TEXTS = [
    b"[" * 2_000,
    b'{"a":' * 1_000,
    b"9" * 5_000,
    *(b"1e999", b"-1", b"18446744073709551616", b"NaN", b"null", b"true", b"{}", b"[]"),
    *(b'"\\ud800"', b'""', b"\xff", b"\x00"),
]
#: What a field may be, beside what it should be.
_VALUES: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        1,
        2**31,
        2**53,
        2**63 - 1,
        2**63,
        2**64 - 1,
        0.0,
        -0.5,
        1e308,
        float("inf"),
        float("nan"),
    ),
    *(
        "",
        "x",
        "\x1b[31m",
        "\u202e",
        "device",
        "a" * 300,
        b"",
        b"\x00" * 8,
        [],
        {},
        [[]],
        [0] * 300,
        {"a": None},
    ),
]


def _flip(rng: random.Random, data: bytes, other: bytes) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _set(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return (
        data[:at] + bytes([rng.choice((0x00, 0x7F, 0x80, 0xC1, 0xFF, rng.randrange(256)))]) + data[at + 1 :]
    )


def _cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randint(1, 8) :]


def _insert(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_CLAIMS + _TEXTS) + data[at + rng.choice((0, 1, 5, 9)) :]


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _repeat(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, length = rng.randrange(len(data) + 1), rng.randint(1, 16)
    return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]


_WAYS: Sequence[Callable[[random.Random, bytes, bytes], bytes]] = (
    _flip, _set, _cut, _drop, _insert, _insert, _splice, _repeat,
)  # fmt: skip


def spoilt(rng: random.Random, valid: Sequence[bytes], codec: Codec | None = None) -> bytes:
    """One of the valid messages, spoilt in one to four ways: as bytes or, with a codec, as values too."""
    data, other = rng.choice(valid), rng.choice(valid)
    if codec is not None and rng.random() < 0.6:
        value = codec.decode(data)
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = _reshaped(rng, value)
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # JSON has no bytes, for one
            data = codec.encode(value)
        if rng.random() < 0.8:
            return data
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = rng.choice(_WAYS)(rng, data, other)
    return data


def _reshaped(rng: random.Random, value: Any) -> Any:
    """One place in a value changed: replaced, left out, doubled, moved by one, or swapped with another."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {each: of for each, of in value.items() if each != key}
        return {**value, key: _reshaped(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        way = rng.random()
        if way < 0.1:
            return value[:at] + value[at + 1 :]
        if way < 0.2:
            return value[:at] + [value[at]] * rng.choice((2, 3, 40)) + value[at + 1 :]
        if way < 0.3:
            return rng.sample(value, len(value))
        return [*value[:at], _reshaped(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 32, 2**32))
    return rng.choice(_VALUES)
