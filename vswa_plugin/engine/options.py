"""Reading a section of engine options: typed, in bounds, every error with what to do. Pure.

    top = Section(options, source)
    kv = top.section("kv_cache_config")
    kv.check({"tokens_per_block", "max_tokens"})
    block_size = kv.integer("tokens_per_block", 32)

A key that is missing or null means its default. All methods raise :class:`ConfigError` where a value cannot
be used: it names the option with its path, what was expected, what came, and the file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from vswa_plugin.errors import ConfigError, shown

_Integer = TypeVar("_Integer", int, None)
_Text = TypeVar("_Text", str, None)
#: No option has a longer name: it bounds the search for the nearest one.
_LONGEST_NAME = 100
#: More names than these would hide what is wrong.
_MOST_LISTED = 40


class Section:
    """One mapping of options with the words for its errors.

    :param data: as it was loaded; None where there is none.
    :param source: where it came from, e.g. the file's name.
    :param path: dotted path of the mapping; empty for the outermost.
    :raises ConfigError: it is no mapping.
    """

    def __init__(self, data: object, source: str, path: str = "") -> None:
        if data is not None and not isinstance(data, Mapping):
            raise ConfigError(f"{path or 'options'}: expected a mapping, got {shown(data)} (in {source})")
        self.data: Mapping[Any, Any] = {} if data is None else data
        self.source = source
        self.path = path

    def name(self, key: object) -> str:
        """Dotted path of ``key``."""
        return f"{self.path}.{key}" if self.path else str(key)

    def error(self, key: object, expected: str, actual: object, advice: str = "") -> ConfigError:
        """What is wrong with the value ``actual`` of ``key``, to be raised."""
        tail = f"; {advice}" if advice else ""
        return ConfigError(
            f"{self.name(key)}: expected {expected}, got {shown(actual)}{tail} (in {self.source})"
        )

    def section(self, key: str) -> Section:
        """The mapping that is the value of ``key``."""
        return Section(self.data.get(key), self.source, self.name(key))

    def given(self, keys: Iterable[str]) -> list[str]:
        """Dotted names of those of ``keys`` that are there, null or not."""
        return [self.name(key) for key in keys if key in self.data]

    def check(
        self,
        known: Collection[str],
        *,
        otherwise: str = "",
        advice: str = "",
        with_path: bool = True,
        elsewhere: Mapping[str, str] = {},
    ) -> None:
        """Refuse unknown keys, with the nearest known one.

        :param otherwise: the hint where none is near; by default all that are known, where these are few.
        :param advice: a sentence that is added in either case.
        :param with_path: whether the nearest is named with its path.
        :param elsewhere: keys of other tools and releases, each with a sentence that says what to write here.
        """
        for key in self.data:
            if key in known:
                continue
            near = get_close_matches(str(key)[:_LONGEST_NAME], sorted(known), n=1)
            if key in elsewhere:
                hint = elsewhere[key]
            elif near:
                hint = f"did you mean {self.name(near[0]) if with_path else near[0]!r}?"
            else:
                hint = otherwise or _known(known)
            tail = f" {advice}" if advice and key not in elsewhere else ""
            raise ConfigError(f"unknown option {shown(self.name(key))} in {self.source}: {hint}{tail}")

    def only(self, key: str, values: Collection[object], advice: str = "") -> None:
        """Refuse a value other than ``values``; True is not 1."""
        actual = self.data.get(key)
        if actual is None or any(type(actual) is type(value) and actual == value for value in values):
            return
        raise self.error(key, " or ".join(map(repr, values)) or "no value", actual, advice)

    def integer(self, key: Any, default: _Integer, low: int = 1, high: int | None = None) -> int | _Integer:
        """An integer in [low, high]; the default need not be."""
        value = self.data.get(key)
        if value is None:
            return default
        if not is_integer(value) or value < low or (high is not None and value > high):
            bounds = f"of at least {low}" if high is None else f"in [{low}, {high}]"
            raise self.error(key, f"an integer {bounds}", value)
        return int(value)

    def positive_integers(self, key: str, meaning: str = "") -> tuple[int, ...] | None:
        """A list of at least one; None where it is missing.

        :param meaning: added to "a list of positive integers".
        """
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(is_integer(v) and v > 0 for v in value):
            raise self.error(key, f"a list of positive integers {meaning}".rstrip(), value)
        return tuple(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def text(self, key: str, default: _Text) -> str | _Text:
        """A string that is not empty."""
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or not value:
            raise self.error(key, "a string", value)
        return value

    def choice(
        self, key: str, known: Collection[str], default: _Text, *, any_case: bool = False
    ) -> str | _Text:
        """One of ``known``, as it is written there."""
        value = self.data.get(key)
        if value is None:
            return default
        for name in known:
            same = any_case and isinstance(value, str) and value.casefold() == name.casefold()
            if same or value == name:
                return name
        raise self.error(key, f"one of {', '.join(known)}", value)

    def seconds(self, key: str, default: float, *, above_zero: bool = False) -> float:
        """A finite number of at least 0."""
        value = self.data.get(key)
        if value is None:
            return default
        if not is_number(value) or not math.isfinite(value) or value < 0 or (above_zero and not value):
            raise self.error(key, f"seconds {'above' if above_zero else 'of at least'} 0", value)
        return float(value)


def _known(known: Collection[str]) -> str:
    if len(known) > _MOST_LISTED:
        return f"none of the {len(known)} options that are known here is near."
    return f"known: {', '.join(sorted(known)) or 'none'}."


def is_integer(value: object) -> bool:
    """Whether ``value`` is a whole number in JSON and YAML; true is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is a number in JSON; true is none."""
    return is_integer(value) or isinstance(value, float)
