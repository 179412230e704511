"""One rank's trace: what happens is put into a bounded buffer, and a thread of its own writes it."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from vswa_plugin.accuracy.trace import TraceHeader, TraceHole, TraceRequest, TraceResult, TraceWriter
from vswa_plugin.engine import RawEvent, RequestRecord

from .hiding import Hiding

logger = logging.getLogger(__name__)


class Limits(msgspec.Struct, frozen=True):
    """What may wait for the writing thread.

    :param blocks: of engine events; with 32 tokens some 10 kB each.
    :param tokens: of prompts.
    """

    blocks: int = 20_000
    tokens: int = 4_000_000
    write_every_s: float = 0.1


_Item: TypeAlias = Sequence[RawEvent] | TraceRequest | TraceResult | TraceHole


class _Size(msgspec.Struct):
    blocks: int = 0
    tokens: int = 0


class _Open(msgspec.Struct):
    """A request that has not ended."""

    number: int
    arrived_s: float


#: Times kept to tell how many events came before a first token.
_MAX_MARKS = 100_000


class Recording:
    """Writes one file. Its methods never wait for the disk and never raise; call them from any thread.

    :param hiding: replaces token ids and hashes; None: they are written as they are.
    :raises ConfigError: the file exists already, or cannot be made.
    """

    def __init__(
        self, path: Path, header: TraceHeader, hiding: Hiding | None = None, limits: Limits | None = None
    ) -> None:
        self.path = path
        self.lost_events = 0
        self.lost_requests = 0
        self._hiding = hiding
        self._limits = limits or Limits()
        self._writer = TraceWriter(path, header)
        self._writer.checkpoint()
        # Taken by those who tell, never by the writing thread: nobody waits for the disk.
        self._lock = threading.Lock()
        self._waiting: deque[_Item] = deque()
        self._taken = _Size()
        self._written = _Size()
        self._hole = TraceHole()
        self._requests = 0
        self._open: dict[str, _Open] = {}
        #: Event lines of the file, and when there were how many.
        self._events = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=_MAX_MARKS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"record {path.name}", daemon=True)
        self._thread.start()

    def events(self, events: Sequence[RawEvent]) -> None:
        """The engine's events, in its order."""
        size = _Size(blocks=sum(map(_blocks, events)))
        with self._lock:
            if not self._has_room(size):
                self._lose(len(events), 0)
            elif events and not self._closing.is_set():
                self._events += len(events)
                self._marks.append((time.monotonic(), self._events))
                self._put(events, size)

    def arrived(
        self,
        request_id: str,
        token_ids: Sequence[int],
        cache_salt: str | None,
        lora_name: str | None,
        prompt_logprobs: int | None = None,
    ) -> None:
        """A request, before the engine sees it."""
        size = _Size(tokens=len(token_ids))
        with self._lock:
            if not self._has_room(size):
                self._lose(0, 1)
            elif request_id not in self._open and not self._closing.is_set():
                self._requests += 1
                self._open[request_id] = _Open(self._requests, time.monotonic())
                request = TraceRequest(
                    tuple(token_ids),
                    cache_salt=cache_salt,
                    lora_name=lora_name,
                    id=self._requests,
                    prompt_logprobs=prompt_logprobs,
                )
                self._put(request, size)

    def finished(self, record: RequestRecord, *, elsewhere: bool = False) -> None:
        """The same request at its end. Without a first token it says nothing of the cache.

        :param elsewhere: another rank has served it.
        """
        with self._lock:
            known = self._open.pop(record.request_id, None)
            if known is None or elsewhere or record.first_token_s is None or not _says_reuse(record):
                return
            seen = self._events_until(known.arrived_s + record.first_token_s)
            result = TraceResult(known.number, record.cached_tokens, record.output_tokens, seen=seen)
            self._put(result, _Size())

    def finish(self) -> None:
        """Take nothing any more, and let the thread write what is waiting and close the file."""
        with self._lock:
            self._end_hole()
            self._closing.set()

    def close(self, timeout_s: float = 10.0) -> bool:
        """Finish, and wait for the thread: whether the file is closed. May be called twice."""
        self.finish()
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _has_room(self, size: _Size) -> bool:
        blocks = self._taken.blocks - self._written.blocks + size.blocks
        tokens = self._taken.tokens - self._written.tokens + size.tokens
        return blocks <= self._limits.blocks and tokens <= self._limits.tokens

    def _put(self, item: _Item, size: _Size) -> None:
        self._end_hole()
        self._taken.blocks += size.blocks
        self._taken.tokens += size.tokens
        self._waiting.append(item)

    def _lose(self, events: int, requests: int) -> None:
        if not self.lost_events and not self.lost_requests:
            logger.warning("%s: cannot keep up; the trace says what is left out, and where", self.path)
        self.lost_events += events
        self.lost_requests += requests
        self._hole.events += events
        self._hole.requests += requests

    def _end_hole(self) -> None:
        """Behind what was left out comes something again: say so in the file."""
        if self._hole != TraceHole():
            self._waiting.append(self._hole)
            self._hole = TraceHole()

    def _events_until(self, at_s: float) -> int | None:
        """Event lines that were there at that time; None: too long ago."""
        marks = bisect_right(self._marks, (at_s, self._events))
        if marks:
            return self._marks[marks - 1][1]
        return 0 if len(self._marks) < _MAX_MARKS else None

    def _run(self) -> None:
        try:
            closing = False
            while not closing:
                closing = self._closing.wait(self._limits.write_every_s)
                self._write()
        except Exception:
            # A full disk, above all. What was written until then can be read.
            logger.exception("%s: recording has ended, serving goes on", self.path)
            self._closing.set()
            self._waiting.clear()
        finally:
            self._writer.close()

    def _write(self) -> None:
        if not self._waiting:
            return
        while self._waiting:
            match self._waiting.popleft():
                case TraceRequest() as request:
                    self._writer.request(self._hidden(request))
                    self._written.tokens += len(request.token_ids)
                case TraceResult() as result:
                    self._writer.result(result)
                case TraceHole() as hole:
                    self._writer.hole(hole)
                case events:
                    for raw in events:
                        self._writer.event(raw if self._hiding is None else self._hiding.event(raw))
                    self._written.blocks += sum(map(_blocks, events))
        self._writer.checkpoint()

    def _hidden(self, request: TraceRequest) -> TraceRequest:
        if self._hiding is None:
            return request
        return msgspec.structs.replace(
            request,
            token_ids=self._hiding.prompt(request.token_ids),
            cache_salt=self._hiding.text(request.cache_salt),
            lora_name=self._hiding.text(request.lora_name),
        )


def _blocks(event: Any) -> int:
    """How large an event is, without knowing its format; one at least."""
    if not isinstance(event, Mapping):
        return 1 + sum(len(part) for part in event if isinstance(part, list)) // 16
    data = event.get("data")
    inner = data if isinstance(data, Mapping) else event
    listed = inner.get("blocks") or inner.get("block_hashes") or ()
    return 1 + len(listed)


def _says_reuse(record: RequestRecord) -> bool:
    """Whether ``cached_tokens`` was told, and is this cache's."""
    ended_badly = record.finish_reason.startswith(("cancelled", "error"))
    return not ended_badly and not record.transferred_tokens
