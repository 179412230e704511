"""Continuous batching: which requests run, and how many tokens of each one step computes.

A step gives every decoding request one token, then prefills in order of arrival until the step's token
budget is spent. A waiting request opens its cache only when there is budget for its first chunk: what earlier
requests committed until then can be reused. One that finds no room keeps those behind it waiting.

Where phases run apart, the scheduler of a prefill worker leaves finished prompts to :class:`.KeptPrompts`,
and that of a decode worker has :class:`.FetchedPrompts` bring those of others while it goes on stepping.

Everything here is synchronous and belongs to one thread; others only set :attr:`.Generation.cancelled`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vswa_plugin.engine import RawEvent
from vswa_plugin.errors import InvariantError, RequestError

from ..cache.api import CacheManager
from ..model.model import Chunk
from ..model.sampling import Sampled
from .disagg import FetchedPrompts, KeptPrompts
from .generation import Generation, Output, request_error

logger = logging.getLogger(__name__)

#: Steps that may fail in a row before the engine gives up: a bad request fails once, a broken engine always.
MAX_FAILED_STEPS = 3


class Forward(Protocol):
    """The model with its paged cache: chunks in, logits ``[chunks that want them, vocab]`` out."""

    def __call__(self, chunks: list[Chunk], /) -> npt.NDArray[np.float32]: ...


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
    decode_cached_tokens: int = 0
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
        with an answer, its events have always been handed over.
    :param keeper: in a prefill worker: every request ends with its first token.
    :param arrivals: in a decode worker.
    """

    def __init__(
        self,
        forward: Forward,
        manager: CacheManager,
        budget: Budget,
        publish: Callable[[Sequence[RawEvent]], None],
        *,
        keeper: KeptPrompts | None = None,
        arrivals: FetchedPrompts | None = None,
    ) -> None:
        self._forward = forward
        self._manager = manager
        self._budget = budget
        self._publish = publish
        self._keeper = keeper
        self._arrivals = arrivals
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.counters = Counters()
        self._failed_in_a_row = 0
        self._fatal: Exception | None = None
        #: After how many seconds a step may do something though nothing has happened; None: never.
        self.retry_s: float | None = None

    @property
    def has_work(self) -> bool:
        """Whether a step may do anything."""
        return bool(self.waiting or self.running)

    def stats(self) -> dict[str, float]:
        """Totals and gauges by name; from any thread."""
        transfers = self._arrivals if self._keeper is None else self._keeper
        return self.counters.as_gauges() | (transfers.as_gauges() if transfers is not None else {})

    @property
    def in_cache(self) -> int:
        """Requests that have been admitted and are not done."""
        return len(self.running) + (len(self._arrivals) if self._arrivals is not None else 0)

    def add(self, generation: Generation) -> None:
        """Put a request, checked before, at the end of the queue."""
        self.counters.requests += 1
        if generation.handover is not None and not self._elsewhere.accepts(generation):
            generation.handover = None
        self.waiting.append(generation)

    def step(self) -> bool:
        """Compute one batch and emit what it gave; False where nothing can be done until something happens.

        A failure inside ends the requests of that step with an error, and only those.

        :raises Exception: the engine cannot go on: the cache's invariants are broken, or
            :data:`MAX_FAILED_STEPS` steps failed in a row. Call :meth:`end_all` then.
        """
        began = time.perf_counter()
        self.retry_s = None
        outputs: list[tuple[Generation, Output]] = []
        self._drop_cancelled()
        self._land(outputs)
        turns = self._plan(outputs)
        if turns:
            self.counters.steps += 1
            self._attempt([turn.generation for turn in turns], partial(self._compute, turns), outputs)
        self._publish(self._manager.flush_events())
        self.counters.step_seconds += time.perf_counter() - began
        for generation, output in outputs:
            generation.emit(output)
        if self._fatal is not None:
            raise self._fatal
        return bool(turns or outputs)

    def end_all(self, error: Exception | None = None) -> None:
        """End every request: with ``error``, or as cancelled. Blocks kept for others are given back."""
        arriving = self._arrivals.close_all() if self._arrivals is not None else []
        ended = [*self.running, *arriving, *self.waiting]
        self.running.clear()
        self.waiting.clear()
        for generation in ended:
            last = generation.cancelled_chunk() if error is None else request_error(error)
            try:
                generation.close()
            except Exception:
                logger.exception("the cache of a request could not be closed; the engine is ending anyway")
            generation.emit(last)
        if self._keeper is not None:
            self._keeper.close_all()
        self._publish(self._manager.flush_events())

    def _drop_cancelled(self) -> None:
        for generation in self.running:
            if generation.cancelled:
                generation.close()
        self._sweep()
        if any(g.cancelled for g in self.waiting):
            for generation in self.waiting:
                if generation.cancelled and generation.handover is not None:
                    self._elsewhere.decline(generation)
            self.waiting = deque(g for g in self.waiting if not g.cancelled)

    def _land(self, outputs: list[tuple[Generation, Output]]) -> None:
        """Go on with the requests whose transfer has ended: with their first token, or from the start."""
        for generation, complete in self._arrivals.landed() if self._arrivals is not None else ():
            if generation.cancelled:
                generation.close()
            elif complete:
                self.running.append(generation)
                self._attempt([generation], partial(self._received, generation), outputs)
            else:
                # First in the queue, where it stood: it computes its prompt itself now.
                generation.close_cache()
                generation.handover = None
                self.waiting.appendleft(generation)

    def _received(self, generation: Generation) -> list[tuple[Generation, Output]]:
        cache = generation.opened
        generation.transferred_tokens = len(generation.request.prompt) - cache.cached_tokens
        self.counters.decode_cached_tokens += cache.cached_tokens
        cache.receive()
        return [(generation, _first_chunk(generation))]

    def _plan(self, outputs: list[tuple[Generation, Output]]) -> list[Turn]:
        """Turns of this step, decoding requests first; opens waiting requests while budget and room last."""
        tokens_left = self._budget.max_num_tokens
        turns: list[Turn] = []
        prefilling: list[Generation] = []
        for generation in self.running:
            if generation.output:
                turns.append(Turn(generation, generation.output[-1:], True))
                tokens_left -= 1
            else:
                prefilling.append(generation)
        for generation in prefilling:
            if tokens_left > 0:
                turns.append(self._prefill_turn(generation, tokens_left))
                tokens_left -= len(turns[-1].tokens)
        while tokens_left > 0:
            opened = self._open_next(outputs)
            if opened is None:
                return turns
            turns.append(self._prefill_turn(opened, tokens_left))
            tokens_left -= len(turns[-1].tokens)
        return turns

    def _prefill_turn(self, generation: Generation, tokens_left: int) -> Turn:
        start, prompt = generation.opened.computed_tokens, generation.request.prompt
        end = min(len(prompt), start + min(tokens_left, self._budget.max_chunk_tokens))
        return Turn(generation, prompt[start:end], end == len(prompt))

    def _open_next(self, outputs: list[tuple[Generation, Output]]) -> Generation | None:
        """Admit waiting requests up to one whose prompt is computed here; None: no such one, or no room."""
        while self.waiting and self.in_cache < self._budget.max_batch_size:
            generation = self.waiting[0]
            try:
                if not self._admit(generation, outputs):
                    return None
            except Exception as error:
                logger.exception("a request could not be admitted")
                self.waiting.popleft()
                generation.close()
                outputs.append((generation, request_error(error)))
                continue
            self.waiting.popleft()
            generation.queue_s = time.monotonic() - generation.came_at
            if generation.handover is None:
                self.running.append(generation)
                self.counters.cached_tokens += generation.opened.cached_tokens
                return generation
        return None

    def _admit(self, generation: Generation, outputs: list[tuple[Generation, Output]]) -> bool:
        """Open the cache of a request and fetch what others computed; False where there is no room."""
        request, handover = generation.request, generation.handover
        if handover is not None and generation.ends_with(handover.first_token) is not None:
            generation.transferred_tokens = len(request.prompt)
            outputs.append((generation, _first_chunk(generation)))
            self._elsewhere.decline(generation)
            return True
        generation.cache = self._manager.open(
            request.prompt, request.max_new_tokens, cache_salt=request.cache_salt
        )
        if generation.cache is None:
            if not self.in_cache and (self._keeper is None or not len(self._keeper)):
                raise InvariantError("an empty cache has no room for a request that was found to fit")
            if self._keeper is not None:
                self.retry_s = self._keeper.make_room()
            return False
        if handover is not None:
            self._elsewhere.begin(generation)
        return True

    @property
    def _elsewhere(self) -> FetchedPrompts:
        if self._arrivals is None:
            raise InvariantError("a prompt was computed elsewhere, and this is not a decode worker")
        return self._arrivals

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
        outputs = [(g, self._draw(g, row)) for g, row in zip(wanting, logits, strict=True)]
        self._sweep()
        return outputs

    def _draw(self, generation: Generation, logits: npt.NDArray[np.float32]) -> Output:
        """Draw one token and say what the client gets."""
        try:
            sampled = generation.draw(logits)
            if self._keeper is not None:
                return _kept_chunk(generation, sampled, self._keeper)
        except Exception as error:
            logger.exception("a token could not be drawn or handed over; its request is ended")
            generation.close()
            return request_error(error)
        return _next_chunk(generation, sampled)

    def _attempt(
        self,
        generations: list[Generation],
        work: Callable[[], list[tuple[Generation, Output]]],
        outputs: list[tuple[Generation, Output]],
    ) -> None:
        """Do what belongs to these requests; they end, and only they, where it fails."""
        try:
            outputs += work()
            self._failed_in_a_row = 0
        except Exception as error:
            self._fatal = self._fail(generations, error) or self._fatal
            outputs += [(generation, request_error(error)) for generation in generations]

    def _fail(self, generations: list[Generation], error: Exception) -> Exception | None:
        """Close the requests of a step that failed; the error with which the engine cannot go on, if any."""
        self._failed_in_a_row += 1
        self.counters.failed_steps += 1
        logger.error("a step failed; its %d requests are ended", len(generations), exc_info=error)
        fatal = error if self._failed_in_a_row >= MAX_FAILED_STEPS else None
        try:
            for generation in generations:
                generation.close()
            self._manager.check()
        except Exception as broken:
            fatal = broken
        self._sweep()
        return fatal

    def _sweep(self) -> None:
        self.running = [generation for generation in self.running if not generation.finished]


def _next_chunk(generation: Generation, sampled: Sampled) -> Output:
    """Append a token to the output; closes the request where this ends it."""
    try:
        reason = generation.take(sampled.token)
    except RequestError as error:  # a first token of another worker, or a format that grew too complex
        generation.close()
        return error
    if reason is None:
        return generation.chunk(sampled)
    last = generation.last_chunk(sampled, reason)
    generation.close()
    return last


def _kept_chunk(generation: Generation, first: Sampled, keeper: KeptPrompts) -> Output:
    """The only chunk of a prefill worker: the first token, and how to fetch what it came from."""
    if generation.cancelled:
        # No decode worker would fetch it, and its blocks would be held until their deadline.
        generation.close()
        return generation.cancelled_chunk()
    generation.output.append(first.token)
    # Whatever the token is: after "stop" Dynamo's frontend would leave out the decode worker.
    last = generation.last_chunk(first, "length")
    return {**last, "disaggregated_params": keeper.keep(generation, first)}


def _first_chunk(generation: Generation) -> Output:
    """The chunk of the token that the prefill worker drew."""
    # The prefill worker made the first draw of this request's seed.
    generation.rng.random()
    return _next_chunk(generation, generation.first)
