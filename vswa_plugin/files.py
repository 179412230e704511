"""Reads files and JSON that others wrote: size, depth and repeated keys are checked, in bounded memory.

Whatever such a file holds, the outcome is its content or one ConfigError of one line.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from vswa_plugin.errors import ConfigError, shown

__all__ = [
    "MAX_JSON_BYTES",
    "MAX_JSON_DEPTH",
    "MAX_JSON_LINE",
    "json_depth",
    "parse_json",
    "parse_json_object",
    "read_bounded",
    "read_json_lines",
    "read_json_object",
]

#: Bytes of a JSON file. The largest that people have, Gemma's tokenizer_config.json, has 1.2 MB.
MAX_JSON_BYTES = 16 << 20
#: Arrays and objects around a value. No configuration that we know has more than ten.
MAX_JSON_DEPTH = 64
#: Bytes of a line of JSON Lines, unpacked. A prompt of a million tokens has 7 MB.
MAX_JSON_LINE = 16 << 20
#: Characters of an outside value, or of a parser's message, in one of our messages.
_MAX_SHOWN = 120

# A text that is not closed reaches to the end: then no place of the input is scanned twice.
_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+"?', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


def read_bounded(path: Path | str, expected: str, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a file, of which no more than ``most_bytes`` are ever in memory.

    :param expected: what the file should be, for messages.
    :raises FileNotFoundError: there is none; the caller knows what that means.
    :raises ConfigError: it cannot be read, or is larger.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise ConfigError(f"{path}: expected {expected}, got: {error}") from error
    if len(content) > most_bytes:
        raise ConfigError(f"{path}: expected {expected} of at most {most_bytes} bytes, got a larger file")
    return content


def json_depth(text: bytes) -> int:
    """How deep the arrays and objects of a JSON text are nested; in one pass, without recursion.

    Of a text that is no JSON it is at least the depth that a parser reaches before it says so.
    """
    steps = _TEXTS.sub(b"", text).translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(array("b", steps)), default=0)


def parse_json(
    text: str | bytes, where: object, expected: str = "JSON", most_depth: int = MAX_JSON_DEPTH
) -> Any:
    """The value of a JSON text in UTF-8.

    :param where: file or option, and :param expected: what it should hold, for messages.
    :raises ConfigError: no JSON, nested too deeply, or an object that has one key twice.
    """
    try:
        raw = text.encode() if isinstance(text, str) else text
        if (depth := json_depth(raw)) > most_depth:
            raise ConfigError(
                f"{where}: expected {expected}, nested at most {most_depth} levels deep, got {depth} levels"
            )
        value = json.loads(raw.decode(), object_pairs_hook=_object)
        if _SURROGATE.search(raw):  # half a character cannot be encoded, which whoever uses it would find out
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: expected {expected}, got: {str(error)[:_MAX_SHOWN]}") from error


def parse_json_object(
    text: str | bytes, where: object, expected: str = "a JSON object", most_depth: int = MAX_JSON_DEPTH
) -> dict[str, Any]:
    """As :func:`parse_json`, of an object.

    :raises ConfigError: as there, or another value.
    """
    value = parse_json(text, where, expected, most_depth)
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected {expected}, got {type(value).__name__}")
    return value


def read_json_object(path: Path | str, expected: str = "a JSON object") -> dict[str, Any]:
    """The object in a JSON file.

    :raises FileNotFoundError, ConfigError: as :func:`read_bounded` and :func:`parse_json_object`.
    """
    return parse_json_object(read_bounded(path, expected), path, expected)


def read_json_lines(file: IO[bytes], where: object, expected: str) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not empty, to be parsed by the caller; one at a time in memory.

    :param where: the file, and :param expected: what a line should hold, for messages.
    :raises ConfigError: a line that is longer, or nested deeper, than any that is meant.
    """
    number = 0
    while line := file.readline(MAX_JSON_LINE + 1):
        number += 1
        refused = f"{where}, line {number}: expected {expected}"
        if len(line) > MAX_JSON_LINE:
            raise ConfigError(f"{refused} of at most {MAX_JSON_LINE} bytes, got a longer line")
        # Most lines are cleared by the first condition, which costs next to nothing.
        brackets = line.count(b"[") + line.count(b"{")
        if brackets > MAX_JSON_DEPTH and (depth := json_depth(line)) > MAX_JSON_DEPTH:
            raise ConfigError(f"{refused}, nested at most {MAX_JSON_DEPTH} levels deep, got {depth} levels")
        if line.strip():
            yield number, line


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} twice in one object")
        found[key] = value
    return found
