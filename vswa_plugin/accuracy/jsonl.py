"""Files of JSON Lines, plain, gzip or xz, read line by line in bounded memory. Errors name file and line."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeVar, cast

import msgspec

from vswa_plugin.errors import ConfigError
from vswa_plugin.files import read_json_lines

_GZIP = b"\x1f\x8b"
_XZ = b"\xfd7zXZ\x00"
_Line = TypeVar("_Line")


def read(
    path: Path, raw: IO[bytes], decoder: msgspec.json.Decoder[_Line], expected: str
) -> Iterator[tuple[int, _Line]]:
    """Number and content of each line of ``raw`` that is not empty.

    :param path: of ``raw``, for messages.
    :param expected: what a line should be, for messages.
    :raises ConfigError: a line that is not, that is too long or nested too deeply, or a file that is cut off.
    """
    lines = _unpacked(raw)
    number = 0
    try:
        for number, line in read_json_lines(lines, path, expected):
            yield number, decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeError, OverflowError) as error:
        raise ConfigError(f"{path}, line {number}: expected {expected}: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        program = "xz" if isinstance(lines, lzma.LZMAFile) else "gzip"
        raise ConfigError(
            f"{path}, after line {number}: the file is cut off or damaged: {error}. What can be read of it: "
            f"{program} -dc {path} | head -n {number} > part.jsonl"
        ) from error


def _unpacked(raw: IO[bytes]) -> IO[bytes]:
    """The lines of a file, which is packed where its first bytes say so."""
    head = raw.read(len(_XZ))
    raw.seek(0)
    if head.startswith(_GZIP):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    return lzma.LZMAFile(raw) if head == _XZ else raw
