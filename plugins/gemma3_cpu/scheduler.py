"""Continuous batching: which requests run, and how many tokens of each one step computes.

A step gives every decoding request one token, then prefills in order of arrival until the step's token
budget is spent. A waiting request opens its cache only when there is budget for its first chunk: what earlier
requests committed until then can be reused. One that finds no room keeps those behind it waiting.

Everything here is synchronous and belongs to one thread; others only set :attr:`Generation.cancelled`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vswa_plugin.engine import ChunkDict, RawEvent
from vswa_plugin.errors import InvariantError, RequestError

from .cache import CacheManager, CacheSequence
from .model import Chunk
from .request import GenerationRequest
from .sampling import Sampled, make_rng, sample

logger = logging.getLogger(__name__)

#: Steps that may fail in a row before the engine gives up: a bad request fails once, a broken engine always.
MAX_FAILED_STEPS = 3

#: What a client gets: chunks, the last one with a finish reason; or an error, which is the end too.
Output: TypeAlias = ChunkDict | Exception


class Forward(Protocol):
    """The model with its paged cache: chunks in, logits ``[chunks that want them, vocab]`` out."""

    def __call__(self, chunks: list[Chunk], /) -> npt.NDArray[np.float32]: ...


class Generation:
    """One request from its arrival to its last chunk.

    :param emit: called from the scheduler's thread with each chunk; with an error instead of the last one.
    """

    __slots__ = ("cache", "cancelled", "emit", "finished", "output", "request", "rng")

    def __init__(self, request: GenerationRequest, emit: Callable[[Output], None]) -> None:
        self.request = request
        self.emit = emit
        self.rng = make_rng(request.sampling.seed)
        self.output: list[int] = []
        self.cache: CacheSequence | None = None
        self.cancelled = False
        self.finished = False

    @property
    def opened(self) -> CacheSequence:
        """Its cache; only while it runs."""
        if self.cache is None:
            raise InvariantError("a request runs without a cache sequence")
        return self.cache

    def usage(self) -> dict[str, object]:
        """``completion_usage`` of the last chunk."""
        prompt, completion = len(self.request.prompt), len(self.output)
        cached = self.cache.cached_tokens if self.cache else 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


@dataclass(frozen=True, slots=True)
class Turn:
    """What one step computes for one request: ``tokens`` that follow the computed ones."""

    generation: Generation
    tokens: list[int]
    wants_logits: bool


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    steps: int = 0
    failed_steps: int = 0
    step_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    requests: int = 0

    def as_gauges(self) -> dict[str, float]:
        """All totals by name."""
        return {name: float(getattr(self, name)) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of one step: requests that run, tokens computed, prompt tokens of one request."""

    max_batch_size: int
    max_num_tokens: int
    max_chunk_tokens: int


class Scheduler:
    """Runs requests step by step.

    :param publish: called with the cache's events after each step, before the step's chunks are emitted:
        who has seen an answer can rely on its events having been handed over.
    """

    def __init__(
        self,
        forward: Forward,
        manager: CacheManager,
        budget: Budget,
        publish: Callable[[Sequence[RawEvent]], None],
    ) -> None:
        self._forward = forward
        self._manager = manager
        self._budget = budget
        self._publish = publish
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.counters = Counters()
        self._failed_in_a_row = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, generation: Generation) -> None:
        """Put a request, checked before, at the end of the queue."""
        self.counters.requests += 1
        self.waiting.append(generation)

    def step(self) -> None:
        """Compute one batch and emit what it gave.

        A failure inside ends the requests of that step with an error, and only those.

        :raises Exception: the engine cannot go on: the cache's invariants are broken, or
            :data:`MAX_FAILED_STEPS` steps failed in a row. Call :meth:`end_all` then.
        """
        began = time.perf_counter()
        outputs: list[tuple[Generation, Output]] = []
        fatal: Exception | None = None
        self._drop_cancelled()
        turns = self._plan(outputs)
        if turns:
            self.counters.steps += 1
            try:
                outputs += self._compute(turns)
                self._failed_in_a_row = 0
            except Exception as error:
                fatal = self._fail(turns, error)
                outputs += [(turn.generation, _request_error(error)) for turn in turns]
        self._publish(self._manager.flush_events())
        self.counters.step_seconds += time.perf_counter() - began
        for generation, output in outputs:
            generation.emit(output)
        if fatal is not None:
            raise fatal

    def end_all(self, error: Exception | None = None) -> None:
        """End every request: with ``error``, or as cancelled."""
        ended = [*self.running, *self.waiting]
        self.running.clear()
        self.waiting.clear()
        for generation in ended:
            last = _last_chunk(generation, [], "cancelled") if error is None else _request_error(error)
            try:
                _close(generation)
            except Exception:
                logger.exception("the cache of a request could not be closed; the engine is ending anyway")
            generation.emit(last)
        self._publish(self._manager.flush_events())

    def _drop_cancelled(self) -> None:
        for generation in self.running:
            if generation.cancelled:
                _close(generation)
        self.running = [g for g in self.running if not g.finished]
        if any(g.cancelled for g in self.waiting):
            self.waiting = deque(g for g in self.waiting if not g.cancelled)

    def _plan(self, outputs: list[tuple[Generation, Output]]) -> list[Turn]:
        """Turns of this step, decoding requests first; opens waiting requests while budget and room last."""
        left = self._budget.max_num_tokens
        turns: list[Turn] = []
        prefilling: list[Generation] = []
        for generation in self.running:
            if generation.output:
                turns.append(Turn(generation, generation.output[-1:], True))
                left -= 1
            else:
                prefilling.append(generation)
        for generation in prefilling:
            if left > 0:
                turns.append(self._prefill_turn(generation, left))
                left -= len(turns[-1].tokens)
        while left > 0:
            opened = self._open_next(outputs)
            if opened is None:
                return turns
            turns.append(self._prefill_turn(opened, left))
            left -= len(turns[-1].tokens)
        return turns

    def _prefill_turn(self, generation: Generation, left: int) -> Turn:
        start, prompt = generation.opened.computed_tokens, generation.request.prompt
        end = min(len(prompt), start + min(left, self._budget.max_chunk_tokens))
        return Turn(generation, prompt[start:end], end == len(prompt))

    def _open_next(self, outputs: list[tuple[Generation, Output]]) -> Generation | None:
        """Move the first waiting request to the running ones; None where there is none or no room."""
        while self.waiting and len(self.running) < self._budget.max_batch_size:
            generation = self.waiting[0]
            request = generation.request
            try:
                generation.cache = self._manager.open(
                    request.prompt, request.max_new_tokens, cache_salt=request.cache_salt
                )
                if generation.cache is None and not self.running:
                    raise InvariantError("an empty cache has no room for a request that was found to fit")
            except Exception as error:
                logger.exception("a request could not be admitted")
                self.waiting.popleft()
                generation.finished = True
                outputs.append((generation, _request_error(error)))
                continue
            if generation.cache is None:
                return None
            self.waiting.popleft()
            self.running.append(generation)
            self.counters.cached_tokens += generation.cache.cached_tokens
            return generation
        return None

    def _compute(self, turns: list[Turn]) -> list[tuple[Generation, Output]]:
        """One batched forward, then one token for each request whose prompt is done."""
        chunks = []
        for turn in turns:
            cache = turn.generation.opened
            start = cache.computed_tokens
            cache.reserve(start + len(turn.tokens))
            tokens = np.asarray(turn.tokens, dtype=np.int64)
            chunks.append(Chunk(tokens, start, cache.tables, turn.wants_logits))
        logits = self._forward(chunks)
        for turn in turns:
            turn.generation.opened.advance(len(turn.tokens))
            if turn.generation.output:
                self.counters.decode_tokens += 1
            else:
                self.counters.prefill_tokens += len(turn.tokens)
        wanting = [turn.generation for turn in turns if turn.wants_logits]
        outputs = [(g, _next_output(g, row)) for g, row in zip(wanting, logits, strict=True)]
        self.running = [generation for generation in self.running if not generation.finished]
        return outputs

    def _fail(self, turns: list[Turn], error: Exception) -> Exception | None:
        """Close the requests of a step that failed; the error with which the engine cannot go on, if any."""
        self._failed_in_a_row += 1
        self.counters.failed_steps += 1
        logger.error("a step failed; its %d requests are ended", len(turns), exc_info=error)
        fatal = error if self._failed_in_a_row >= MAX_FAILED_STEPS else None
        try:
            for turn in turns:
                _close(turn.generation)
            self._manager.check()
        except Exception as broken:
            fatal = broken
        self.running = [generation for generation in self.running if not generation.finished]
        return fatal


def _next_output(generation: Generation, logits: npt.NDArray[np.float32]) -> Output:
    """Draw one token and say what the client gets; closes the request where this ends it."""
    request = generation.request
    early = len(generation.output) < request.min_tokens
    try:
        sampled = sample(
            logits,
            request.sampling,
            generation.rng,
            request.prompt,
            generation.output,
            banned=request.stop_ids if early else (),
        )
    except Exception as error:
        logger.exception("a token could not be drawn; its request is ended")
        _close(generation)
        return _request_error(error)
    generation.output.append(sampled.token)
    reason = None
    if sampled.token in request.stop_ids:
        reason = "stop"
    elif len(generation.output) >= request.max_new_tokens:
        reason = "length"
    if reason is None:
        return _chunk([sampled])
    last = _last_chunk(generation, [sampled], reason)
    _close(generation)
    return last


def _close(generation: Generation) -> None:
    generation.finished = True
    cache, generation.cache = generation.cache, None
    if cache is not None:
        cache.close()


def _chunk(sampled: list[Sampled]) -> ChunkDict:
    chunk: ChunkDict = {"token_ids": [s.token for s in sampled], "index": 0}
    if sampled and sampled[0].logprob is not None:
        chunk["log_probs"] = [s.logprob for s in sampled]
        if sampled[0].top:
            chunk["top_logprobs"] = [
                [
                    {"rank": rank, "token_id": token, "token": None, "logprob": logprob}
                    for rank, (token, logprob) in enumerate(s.top, start=1)
                ]
                for s in sampled
            ]
    return chunk


def _last_chunk(generation: Generation, sampled: list[Sampled], reason: str) -> ChunkDict:
    return {**_chunk(sampled), "finish_reason": reason, "completion_usage": generation.usage()}


def _request_error(error: Exception) -> RequestError:
    """A new error for one request: one exception raised in several tasks would share its traceback."""
    if isinstance(error, RequestError):
        return type(error)(*error.args)
    wrapped = RequestError(f"the engine failed while it ran this request: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
