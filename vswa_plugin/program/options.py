"""What command lines check alike: numbers with a range, and options that need or exclude another one."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

from vswa_plugin.errors import ConfigError, shown

Number = TypeVar("Number", int, float)


def port(text: str) -> int:
    """A TCP port as an argparse type; 0 is for a free one."""
    return _number(text, int, lambda value: 0 <= value < 65_536, "a port from 0 to 65535")


def at_least_one(text: str) -> int:
    """A count as an argparse type."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def zero_or_more(text: str) -> int:
    """A whole number from 0 on as an argparse type."""
    return _number(text, int, lambda value: value >= 0, "a whole number, 0 or more")


def encodable(text: str) -> str:
    """A name that others are given, as an argparse type: not empty, and text in every encoding."""
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected a name of printable characters, got {shown(text)}")
    return text


def whole_number(text: str) -> int | None:
    """The number that ``text`` is, in ASCII digits; None where it is none, or beyond 18 digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def integer(text: str) -> int:
    """Any whole number as an argparse type."""
    return _number(text, int, lambda _: True, "a whole number")


def real(text: str) -> float:
    """Any number as an argparse type."""
    return _number(text, float, lambda _: True, "a number")


def read_number(text: str, kind: Callable[[str], Number]) -> Number:
    """``text`` as a number of ``kind``, int or float, in ASCII digits.

    Python alone also takes the digits of other scripts, an underscore between digits, and blanks around them.

    :raises ValueError: it is none.
    """
    if not text.isascii() or "_" in text or text != text.strip():
        raise ValueError(text)
    return kind(text)


def seconds(text: str) -> float:
    """A time-out as an argparse type."""
    return _number(text, float, lambda value: 0 < value < math.inf, "more than 0 seconds")


def positive(text: str) -> float:
    """A rate or a share of work as an argparse type."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a finite number above 0")


def requires(option: str, given: object, other: str, present: object) -> None:
    """Refuse ``option`` where it is given without ``other``.

    :param given: its value; None and False: not given.
    :raises ConfigError: it would have no effect.
    """
    if _is_given(given) and not _is_given(present):
        raise ConfigError(f"{option}: expected {other} with it, got none; without {other} it has no effect")


def excludes(option: str, given: object, other: str, present: object) -> None:
    """Refuse ``option`` where it is given together with ``other``; see :func:`requires`."""
    if _is_given(given) and _is_given(present):
        raise ConfigError(f"{option}: expected no {other} with it, got both; with {other} it has no effect")


def _is_given(value: object) -> bool:
    return value is not None and value is not False


def _number(
    text: str, kind: Callable[[str], Number], fits: Callable[[Number], bool], expected: str
) -> Number:
    refused = argparse.ArgumentTypeError(f"expected {expected}, got {shown(text)}")
    try:
        value = read_number(text, kind)
    except ValueError:
        raise refused from None
    if not fits(value):
        raise refused
    return value
