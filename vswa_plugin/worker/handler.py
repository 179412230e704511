"""One request: from Dynamo to the engine and back, with cancellation and a record at its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

from vswa_plugin.dynamo.names import RELEASE
from vswa_plugin.engine.contract import WORKER_ONLY, ChunkDict, Engine, RequestDict
from vswa_plugin.engine.outcomes import COMPLETED, outcome_of
from vswa_plugin.engine.records import RequestRecord
from vswa_plugin.engine.requests import Fields, unchecked_token_ids
from vswa_plugin.errors import InvalidRequest, RequestError, Unavailable
from vswa_plugin.publishing.healing import Claim
from vswa_plugin.publishing.publisher import Publisher
from vswa_plugin.tracing import NO_SPAN, Span, request_span
from vswa_plugin.wire.events import ReuseReport
from vswa_plugin.worker.counts import RequestCounts

logger = logging.getLogger(__name__)


class RequestHandler:
    """Serves requests of one engine until :meth:`drain`.

    :param record: told of each request that ended; must not raise. None: nobody wants to know.
    :param publishers: by dp_rank; given each prompt, and what a finished request proves to be resident.
    :param arrived: told of each request before the engine is; must not raise. None: nobody wants to know.
    """

    def __init__(
        self,
        engine: Engine,
        model: str,
        worker_id: int,
        record: Callable[[RequestRecord], None] | None,
        publishers: Mapping[int, Publisher] | None = None,
        arrived: Callable[[str, RequestDict], None] | None = None,
    ) -> None:
        self._engine = engine
        self._model = model
        self._worker_id = worker_id
        self._record = record
        self._publishers = publishers or {}
        self._arrived = arrived
        #: Grows with each chunk of the engine; :meth:`alive` adds what else shows that it lives.
        self.signs_of_life = 0
        self.counts = RequestCounts()
        self._open: dict[asyncio.Queue[ChunkDict | Exception | None], _Tracked] = {}
        self._failure: str | None = None
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        return len(self._open)

    async def handle(
        self, request: RequestDict, request_id: str, client_gone: Awaitable[bool]
    ) -> AsyncIterator[ChunkDict]:
        """Chunks of one request; ends early when ``client_gone`` is done.

        :raises RequestError: refused; nothing of it stays behind in the engine.
        """
        if RELEASE in request:
            yield {"released": self._release(request[RELEASE])}
            return
        self.counts.received += 1
        span = request_span("vswa.serve", model=self._model, worker_id=self._worker_id)
        try:
            tracked = self._admitted(request, request_id, span)
        except Exception as error:
            self.counts.fail(error)
            span.end(str(error))
            raise
        if self._arrived is not None:
            self._arrived(request_id, request)
        for rank, publisher in self._publishers.items():
            if tracked.may_be_served_by(rank):
                publisher.prompt(*tracked.prompt)
        # Of all ranks: which one serves it is known with its first chunk.
        marks = {rank: publisher.engine_events for rank, publisher in self._publishers.items()}
        chunks: asyncio.Queue[ChunkDict | Exception | None] = asyncio.Queue()

        def ended(_: object) -> None:
            chunks.put_nowait(None)
            gone.cancel()
            self._ended(tracked, chunks)
            publisher = self._publishers.get(tracked.dp_rank)
            if publisher is None:
                return
            if publisher.healing and tracked.reused_here:
                publisher.claim(tracked.claim(marks[tracked.dp_rank]))
            if (report := tracked.report()) is not None:
                publisher.report(report)

        self._open[chunks] = tracked
        self._idle.clear()
        # The engine is read by a task of its own: when a client goes, Dynamo stops asking this generator
        # for chunks without closing it, and nobody would tell the engine.
        reading = asyncio.create_task(self._read(request, tracked, chunks), name=f"request {request_id}")
        gone = asyncio.ensure_future(client_gone)
        reading.add_done_callback(ended)
        gone.add_done_callback(lambda _: reading.cancel())
        try:
            while (chunk := await chunks.get()) is not None:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    def _admitted(self, request: RequestDict, request_id: str, span: Span) -> _Tracked:
        """Raises RequestError where the request cannot be begun."""
        if (failure := self._failure or self._engine.failure()) is not None:
            raise Unavailable(failure)
        if self._draining:
            raise Unavailable("the worker is stopping; another one can serve this")
        return _Tracked(request, request_id, span)

    def _release(self, params: object) -> bool:
        """Let go of a finished prompt that no decode worker will fetch; also while the worker drains."""
        if not isinstance(params, Mapping):
            raise InvalidRequest(f"{RELEASE}: expected disaggregated_params, got {type(params).__name__}")
        release = getattr(self._engine, "release", None)  # not every engine holds prompts, or can let go
        return release is not None and bool(release(params))

    async def _read(
        self,
        request: RequestDict,
        tracked: _Tracked,
        chunks: asyncio.Queue[ChunkDict | Exception | None],
    ) -> None:
        """Put the engine's chunks into the queue, and its error if it raises one."""
        try:
            generated = cast("AsyncGenerator[ChunkDict, None]", self._engine.generate(request))
            async with contextlib.aclosing(generated):
                async for chunk in generated:
                    self.signs_of_life += 1
                    tracked.saw(chunk)
                    chunks.put_nowait(chunk)
        except RequestError as error:
            tracked.failed(error)
            logger.info("request %s refused: %s", tracked.request_id, error)
            chunks.put_nowait(error)
        except Exception as error:
            tracked.failed(error)
            logger.exception("request %s failed in the engine", tracked.request_id)
            chunks.put_nowait(error)

    def _ended(self, tracked: _Tracked, chunks: asyncio.Queue[ChunkDict | Exception | None]) -> None:
        del self._open[chunks]
        tracked.ended()
        if tracked.error is None:
            self.counts.end(tracked.finish_reason)
        else:
            self.counts.fail(tracked.error)
        if not self._open:
            self._idle.set()
        if self._record is not None:
            self._record(tracked.record(self._model, self._worker_id))

    def alive(self) -> None:
        """The engine has given a sign of life other than a chunk. Any thread."""
        self.signs_of_life += 1

    def abandon(self, reason: str) -> None:
        """The engine is given up: requests under way, and those to come, are for other workers."""
        self._failure = reason
        for chunks, tracked in self._open.items():
            error = tracked.error = Unavailable(reason)
            chunks.put_nowait(error)

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those under way; False if some still were after the time-out."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class _Tracked:
    """What is learnt about a request while it is served."""

    def __init__(self, request: RequestDict, request_id: str, span: Span = NO_SPAN) -> None:
        self.request_id = request_id
        self._span, self._began_ns = span, time.time_ns()
        fields = Fields(request)
        self._routing = fields.object("routing").data
        # What is not a rank is the engine's to refuse.
        rank = self._routing.get("dp_rank")
        self._stated_rank = rank if isinstance(rank, int) else None
        self.dp_rank = self._stated_rank or 0
        self._prompt = unchecked_token_ids(fields)
        self._began = time.monotonic()
        self._first_token_s: float | None = None
        self._output_tokens = 0
        self.cached_tokens = 0
        self._transferred_tokens = 0
        self._queue_s: float | None = None
        self._usage_seen = False
        self.finish_reason = "cancelled"
        #: With which it has ended; None: with its last chunk, or cancelled.
        self.error: Exception | None = None

    def may_be_served_by(self, rank: int) -> bool:
        return self._stated_rank in (None, rank)

    @property
    def prompt(self) -> tuple[Sequence[int], str | None, str | None]:
        """Token ids, cache salt and name of the LoRA."""
        return self._prompt, self._routing.get("cache_salt"), self._routing.get("lora_name")

    @property
    def reused_here(self) -> bool:
        """Whether ``cached_tokens`` says something of this worker's cache."""
        return self.cached_tokens > 0 and not self._transferred_tokens

    def saw(self, chunk: ChunkDict) -> None:
        """Learn from a chunk, and take off what is not for Dynamo."""
        told = chunk.pop(WORKER_ONLY, {})
        self.dp_rank = told.get("dp_rank", self.dp_rank)
        self._transferred_tokens = told.get("transferred_tokens", self._transferred_tokens)
        if told:
            self._show_phases(told)
        self._queue_s = told.get("queue_s", self._queue_s)
        tokens = chunk.get("token_ids") or ()
        if tokens and self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._began
            self._span.event("first token")
        self._output_tokens += len(tokens)
        details = (chunk.get("completion_usage") or {}).get("prompt_tokens_details") or {}
        self._usage_seen |= details.get("cached_tokens") is not None
        self.cached_tokens = details.get("cached_tokens", self.cached_tokens)
        if reason := chunk.get("finish_reason"):
            self.finish_reason = str(reason)

    def _show_phases(self, stated: Mapping[str, Any]) -> None:
        """Spans of what the engine says of the time before the first chunk."""
        at = self._began_ns
        for name, key in (("vswa.admission", "queue_s"), ("vswa.transfer", "transfer_s")):
            if (seconds := stated.get(key)) is not None:
                began, at = at, at + round(seconds * 1e9)
                tokens = self._transferred_tokens if key == "transfer_s" else None
                self._span.child(name, began, tokens=tokens).end(at_ns=at)

    def ended(self) -> None:
        """It is over, in whatever way."""
        self._span.set(
            dp_rank=self.dp_rank,
            prompt_tokens=len(self._prompt),
            cached_tokens=self.cached_tokens,
            output_tokens=self._output_tokens,
            finish_reason=self.finish_reason,
        )
        self._span.end(None if self.error is None else str(self.error))

    def failed(self, error: Exception) -> None:
        """It ends with ``error``."""
        self.finish_reason, self.error = "error", error

    def claim(self, mark: int) -> Claim:
        """What this request proves, had it arrived when ``mark`` engine events had been seen."""
        token_ids, salt, lora = self.prompt
        return Claim(tuple(token_ids), self.cached_tokens, mark, salt, lora)

    def report(self) -> ReuseReport | None:
        """What routers learn of it; None: the engine did not complete it, or does not say what it reused.

        Where the prompt was computed by another worker, that one reports it.
        """
        completed = self.error is None and outcome_of(self.finish_reason) == COMPLETED
        if not completed or self._transferred_tokens or not self._usage_seen:
            return None
        return ReuseReport(self.request_id, len(self._prompt), self.cached_tokens, self._queue_s)

    def record(self, model: str, worker_id: int) -> RequestRecord:
        return RequestRecord(
            request_id=self.request_id,
            model=model,
            worker_id=worker_id,
            dp_rank=self.dp_rank,
            prompt_tokens=len(self._prompt),
            cached_tokens=self.cached_tokens,
            output_tokens=self._output_tokens,
            finish_reason=self.finish_reason,
            first_token_s=self._first_token_s,
            total_s=time.monotonic() - self._began,
            transferred_tokens=self._transferred_tokens,
        )
