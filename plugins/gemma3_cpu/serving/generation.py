"""One request from its arrival to its last chunk, and the chunks that its client gets."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vswa_plugin.engine import ChunkDict
from vswa_plugin.errors import InvariantError, RequestError

from ..model.sampling import Sampled, make_rng, sample
from .guided import Guide
from .request import GenerationRequest

if TYPE_CHECKING:
    from ..cache.api import CacheSequence

logger = logging.getLogger(__name__)

#: What a client gets: chunks, the last one with a finish reason; or an error, which is the end too.
Output: TypeAlias = ChunkDict | Exception


class Generation:
    """One request.

    :param emit: called from the scheduler's thread with each chunk; with an error instead of the last one.
    :param guide: keeps the answer to its format; None: free text.
    :ivar cancelled: the answer is not awaited any more; set from any thread.
    :ivar finished: its last chunk has been made.
    :ivar transferred_tokens: prompt tokens that a prefill worker computed and that were received.
    :ivar queue_s: seconds that it waited to be admitted; None: it still waits.
    :ivar transfer_s: seconds that these tokens took to come.
    """

    __slots__ = (
        "cache",
        "came_at",
        "cancelled",
        "emit",
        "finished",
        "guide",
        "handover",
        "output",
        "queue_s",
        "request",
        "rng",
        "transfer_s",
        "transferred_tokens",
    )

    def __init__(
        self, request: GenerationRequest, emit: Callable[[Output], None], guide: Guide | None = None
    ) -> None:
        self.request = request
        self.emit = emit
        self.guide = guide
        self.rng = make_rng(request.sampling.seed)
        self.output: list[int] = []
        self.cache: CacheSequence | None = None
        self.cancelled = False
        self.finished = False
        #: What a prefill worker has computed of it; None once that is of no use any more.
        self.handover = request.handover
        self.transferred_tokens = 0
        self.came_at = time.monotonic()
        self.queue_s: float | None = None
        self.transfer_s: float | None = None

    def for_worker(self, dp_rank: int) -> dict[str, Any]:
        """What only the worker reads of its first chunk; see ``vswa_plugin.engine.WORKER_ONLY``."""
        stated = {
            "dp_rank": dp_rank,
            "transferred_tokens": self.transferred_tokens,
            "queue_s": self.queue_s,
            "transfer_s": self.transfer_s,
        }
        return {name: value for name, value in stated.items() if value is not None}

    @property
    def first(self) -> Sampled:
        """The token that the prefill worker drew."""
        if self.handover is None:
            raise InvariantError("a first token was expected from a prefill worker")
        return Sampled(self.handover.first_token, self.handover.first_logprob, self.handover.first_top)

    @property
    def opened(self) -> CacheSequence:
        """Its cache; only while it runs."""
        if self.cache is None:
            raise InvariantError("a request runs without a cache sequence")
        return self.cache

    def usage(self) -> dict[str, Any]:
        """``completion_usage`` of the last chunk."""
        prompt, completion = len(self.request.prompt), len(self.output)
        cached = self.cache.cached_tokens if self.cache else 0
        if self.handover is not None and self.transferred_tokens:
            cached = self.handover.cached_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def draw(self, logits: npt.NDArray[np.float32]) -> Sampled:
        """The next token; not yet part of the output.

        :raises FloatingPointError: NaN or infinity in the logits.
        :raises RequestError: no token may follow by the format of the answer.
        """
        request = self.request
        early = len(self.output) < request.min_tokens
        return sample(
            logits,
            request.sampling,
            self.rng,
            request.prompt,
            self.output,
            banned=request.stop_ids if early else (),
            allowed=None if self.guide is None else self.guide.allowed(),
        )

    def take(self, token: int) -> str | None:
        """Append a token to the output; why the answer ends with it, or None.

        :raises RequestError: the token is none that the format of the answer allows.
        """
        reason = self.ends_with(token)
        self.output.append(token)
        if self.guide is not None and token not in self.request.stop_ids:
            self.guide.take(token)
            if reason is None and self.guide.finished:
                reason = "stop"
        return reason

    def ends_with(self, token: int) -> str | None:
        """Why the answer ends if ``token`` comes next, or None."""
        count = len(self.output) + 1
        if token in self.request.stop_ids and count > self.request.min_tokens:
            return "stop"
        return "length" if count >= self.request.max_new_tokens else None

    def chunk(self, sampled: Sampled) -> ChunkDict:
        """The chunk of a token that was just appended to the output."""
        chunk: ChunkDict = {"token_ids": [sampled.token], "index": 0}
        if sampled.logprob is not None:
            chunk["log_probs"] = [sampled.logprob]
            if sampled.top:
                chunk["top_logprobs"] = [[_top_logprob(*ranked) for ranked in enumerate(sampled.top, 1)]]
        return chunk

    def last_chunk(self, sampled: Sampled, reason: str) -> ChunkDict:
        """The chunk of the last token."""
        return {**self.chunk(sampled), "finish_reason": reason, "completion_usage": self.usage()}

    def cancelled_chunk(self) -> ChunkDict:
        """What a client gets whose request is ended from outside."""
        return {
            "token_ids": [],
            "index": 0,
            "finish_reason": "cancelled",
            "completion_usage": self.usage(),
        }

    def close(self) -> None:
        """It is over: give its blocks back."""
        self.finished = True
        self.close_cache()

    def close_cache(self) -> None:
        """Give its blocks back."""
        cache, self.cache = self.cache, None
        if cache is not None:
            cache.close(self.output)


def _top_logprob(rank: int, likely: tuple[int, float]) -> dict[str, Any]:
    token, logprob = likely
    return {"rank": rank, "token_id": token, "token": None, "logprob": logprob}


def request_error(error: Exception) -> RequestError:
    """A new error for one request: one exception raised in several tasks would share its traceback."""
    if isinstance(error, RequestError):
        return type(error)(*error.args)
    wrapped = RequestError(f"the engine failed while it ran this request: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
