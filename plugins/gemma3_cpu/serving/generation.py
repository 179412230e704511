"""One request from its arrival to its last chunk, and the chunks that its client gets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vswa_plugin.engine import ChunkDict
from vswa_plugin.errors import InvariantError, RequestError

from ..model.sampling import Sampled, make_rng, sample
from .request import GenerationRequest

if TYPE_CHECKING:
    from ..cache.api import CacheSequence

logger = logging.getLogger(__name__)

#: What a client gets: chunks, the last one with a finish reason; or an error, which is the end too.
Output: TypeAlias = ChunkDict | Exception


class Generation:
    """One request.

    :param emit: called from the scheduler's thread with each chunk; with an error instead of the last one.
    :ivar cancelled: the answer is not awaited any more; set from any thread.
    :ivar finished: its last chunk has been made.
    :ivar transferred_tokens: prompt tokens that a prefill worker computed and that were received.
    """

    __slots__ = (
        "cache",
        "cancelled",
        "emit",
        "finished",
        "handover",
        "output",
        "request",
        "rng",
        "transferred_tokens",
    )

    def __init__(self, request: GenerationRequest, emit: Callable[[Output], None]) -> None:
        self.request = request
        self.emit = emit
        self.rng = make_rng(request.sampling.seed)
        self.output: list[int] = []
        self.cache: CacheSequence | None = None
        self.cancelled = False
        self.finished = False
        #: What a prefill worker has computed of it; None once that is of no use any more.
        self.handover = request.handover
        self.transferred_tokens = 0

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
        )

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
