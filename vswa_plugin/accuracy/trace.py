"""Engine traces: what an engine's cache did, as JSON Lines, plain, gzip or xz; see ``docs/accuracy.md``.

A trace holds prompts as token ids: with the model they can be read. Written files are their owner's
only (mode 0600).
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any, TypeAlias

import msgspec

from vswa_plugin.accuracy import jsonl
from vswa_plugin.accuracy.headers import (
    Natural,
    TraceGroup,
    TraceHeader,
    TraceLookahead,
    header_of,
    layout_of,
)
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.errors import ConfigError

__all__ = [
    "Trace",
    "TraceEvent",
    "TraceGroup",
    "TraceHeader",
    "TraceHole",
    "TraceLookahead",
    "TraceRecord",
    "TraceRequest",
    "TraceResult",
    "TraceWriter",
    "header_of",
    "open_trace",
]

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class TraceEvent(msgspec.Struct, frozen=True, tag="event"):
    """One event as the engine gave it."""

    event: Any


class TraceRequest(msgspec.Struct, frozen=True, tag="request", omit_defaults=True):
    """One request at the moment it arrived, before the events that it caused.

    :param cached_tokens: tokens of the prompt that the engine reused; None: a result with its id follows.
    :param output_len: tokens that it generated then; None where unknown.
    :param id: its number in this trace.
    :param prompt_logprobs: as the request gave it; with any number, 0 included, the cache is not read.
    :param skip_reading_prefix_cache: as the request gave it; true: the cache is not read.
    :param kv_cache_report_mode: as vLLM's ``extra_args`` gave it: such a trace is refused.
    """

    token_ids: tuple[TokenId, ...]
    cached_tokens: Natural | None = None
    output_len: Natural | None = None
    cache_salt: str | None = None
    lora_name: str | None = None
    id: Natural | None = None
    prompt_logprobs: int | None = None
    skip_reading_prefix_cache: bool | None = None
    kv_cache_report_mode: str | None = None

    def __post_init__(self) -> None:
        if self.cached_tokens is None and self.id is None:
            raise ValueError("expected cached_tokens, or an id for the result to come")
        if self.kv_cache_report_mode is not None:
            raise ValueError(
                f"expected a request without kv_cache_report_mode, got {self.kv_cache_report_mode!r}: the "
                f"engine may then announce blocks that it does not hold, so that what follows cannot be "
                f"predicted; record the trace without it"
            )

    @property
    def reads_cache(self) -> bool:
        """Whether the engine looks its cache up for it. If not, nothing is reused; its blocks are stored."""
        return self.prompt_logprobs is None and not self.skip_reading_prefix_cache


class TraceResult(msgspec.Struct, frozen=True, tag="result", omit_defaults=True):
    """What came of the request with that id, once it is known.

    :param seen: events of the file that came before its first token, and so may have come before its prompt
        was matched; None: all until here.
    """

    id: Natural
    cached_tokens: Natural
    output_len: Natural | None = None
    seen: Natural | None = None


class TraceHole(msgspec.Struct, tag="hole"):
    """The recorder was too slow: so many events and requests are missing here."""

    events: Natural = 0
    requests: Natural = 0


#: One line of a trace after its header.
TraceRecord: TypeAlias = TraceEvent | TraceRequest | TraceResult | TraceHole


class Trace:
    """One trace file, of which the header has been read; :meth:`records` may be called again and again."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.path = path
        self.header = header

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".gz").removesuffix(".xz").removesuffix(".jsonl")

    def layout(self, rule: str | None = None) -> CacheLayout:
        """The cache groups that the header declares, under ``rule`` or the trace's own.

        :raises ConfigError: the header does not say them, or no rule is known for the format.
        """
        try:
            return layout_of(self.header, rule, self.name)
        except ConfigError as error:
            said = str(error)
            raise ConfigError(f"{self.path}{', ' if said.startswith('line') else ': '}{said}") from error

    def records(self, progress: Callable[[int], None] | None = None) -> Iterator[tuple[int, TraceRecord]]:
        """Line number and record of each line after the header.

        :param progress: called from time to time with the bytes of the file that have been read.
        :raises ConfigError: a line that is no such record, with its number; or a file that ends too early.
        """
        with self.path.open("rb") as raw:
            for number, record in _records(self.path, raw):
                if number == 1:
                    continue
                if isinstance(record, TraceHeader):
                    raise ConfigError(f"{self.path}, line {number}: expected one header, got a second")
                yield number, record
                if progress is not None and number % 256 == 0:
                    progress(raw.tell())


def open_trace(path: Path | str) -> Trace:
    """Read the header of a trace.

    :raises ConfigError: there is no such file, or it does not begin with a header.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            number, first = next(_records(path, raw), (1, None))
    except OSError as error:
        raise ConfigError(
            f"expected an engine trace at {path}: {error.strerror or error}. The plugin recorder writes one: "
            "start a worker with VSWA_RECORD=DIRECTORY"
        ) from error
    if not isinstance(first, TraceHeader):
        content = "an empty file" if first is None else f"a record of the type {_type(first)}"
        raise ConfigError(
            f'{path}, line {number}: expected {{"type": "header", "format": "trtllm" or "vllm", ...}} first, '
            f"got {content}; docs/accuracy.md defines the format"
        )
    return Trace(path, first)


class TraceWriter:
    """Writes a trace, gzip where the name ends in ``.gz``. A context manager; one thread at a time.

    :raises ConfigError: the file exists already, or cannot be made.
    """

    def __init__(self, path: Path | str, header: TraceHeader) -> None:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot write a trace to {path}: {error.strerror}") from error
        self._raw = os.fdopen(descriptor, "wb")
        self._zipped = str(path).endswith(".gz")
        self._part: gzip.GzipFile | None = None
        self._encoder = msgspec.json.Encoder()
        self._write(header)

    def event(self, raw: Any) -> None:
        """One event as the engine gave it: a map, or an array for formats that have them."""
        self._write(TraceEvent(raw))

    def request(self, request: TraceRequest) -> None:
        """Before the events that it caused."""
        self._write(request)

    def result(self, result: TraceResult) -> None:
        """Of a request that was written before it."""
        self._write(result)

    def hole(self, hole: TraceHole) -> None:
        """Where something is left out."""
        self._write(hole)

    def checkpoint(self) -> None:
        """What was written until here can be read, whatever happens to this process."""
        if self._part is not None:
            # A file of several parts is one for every reader.
            self._part.close()
            self._part = None
        self._raw.flush()

    def close(self) -> None:
        self.checkpoint()
        self._raw.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: TraceHeader | TraceRecord) -> None:
        line = self._encoder.encode(record) + b"\n"
        if not self._zipped:
            self._raw.write(line)
            return
        if self._part is None:
            self._part = gzip.GzipFile(fileobj=self._raw, mode="wb", compresslevel=_LEVEL, mtime=0)
        self._part.write(line)


_decoder = msgspec.json.Decoder(TraceHeader | TraceEvent | TraceRequest | TraceResult | TraceHole)
#: A third larger than with the highest, in a fifth of the time.
_LEVEL = 3


def _type(record: TraceRecord) -> str:
    return str(record.__struct_config__.tag)


_EXPECTED = "a JSON object of the type header, event or request, or result or hole"


def _records(path: Path, raw: IO[bytes]) -> Iterator[tuple[int, TraceHeader | TraceRecord]]:
    return jsonl.read(path, raw, _decoder, _EXPECTED)
