"""Files of JSON Lines, plain or gzip, line by line. Errors name the file and the line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from vswa_plugin.errors import ConfigError

_GZIP = b"\x1f\x8b"
_Line = TypeVar("_Line")


def read(
    path: Path, raw: IO[bytes], decoder: msgspec.json.Decoder[_Line], expected: str
) -> Iterator[tuple[int, _Line]]:
    """Number and content of each line of ``raw`` that is not empty.

    :param path: of ``raw``, for messages.
    :param expected: what a line should be, for messages.
    :raises ConfigError: a line that is not, or a file that is cut off.
    """
    zipped = raw.read(2) == _GZIP
    raw.seek(0)
    lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if zipped else raw
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ConfigError(f"{path}, line {number}: expected {expected}: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"{path}, after line {number}: the file is cut off or damaged: {error}. What can be read of it: "
            f"gzip -dc {path} | head -n {number} > part.jsonl"
        ) from error
