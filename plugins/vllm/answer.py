"""From vLLM's outputs to the chunks that Dynamo's frontend reads. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vswa_plugin.engine import ChunkDict
from vswa_plugin.errors import RequestError, Unavailable

from .handover import pack

#: vLLM's finish reason -> Dynamo's.
_REASONS = {"stop": "stop", "length": "length", "repetition": "stop", "abort": "cancelled"}


class Answer:
    """One answer while it comes in; the engine gives the new tokens alone (``RequestOutputKind.DELTA``).

    :param logprobs: how many of the likeliest tokens the request wants; None: none.
    :param prefill: whether a decode worker goes on from it.
    :param cached_tokens: what the prefill worker reused; None: this engine's own count is used.
    :ivar finished: the last chunk has been made.
    :ivar cached_tokens: prompt tokens that the engine reused; less than the prompt.
    """

    def __init__(
        self,
        prompt_len: int,
        logprobs: int | None,
        *,
        prefill: bool = False,
        cached_tokens: int | None = None,
    ) -> None:
        self._prompt_len = prompt_len
        self._logprobs = logprobs
        self._prefill = prefill
        self._sent = 0
        self._cached = cached_tokens
        self._arrives = cached_tokens is not None
        self.finished = False

    @property
    def cached_tokens(self) -> int:
        return max(0, min(self._cached or 0, self._prompt_len - 1))

    def chunk(self, output: Any) -> ChunkDict | None:
        """The chunk for the next ``RequestOutput``; None where it holds nothing new.

        :raises RequestError: it is not as vLLM's outputs are, which ends this request alone.
        """
        try:
            return self._chunk(output)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"vLLM gave an output that cannot be read: {type(error).__name__}: {error}"
            ) from error

    def _chunk(self, output: Any) -> ChunkDict | None:
        made = output.outputs[0]
        tokens = [int(token) for token in made.token_ids]
        if self._cached is None and output.num_cached_tokens is not None:
            # The first admission's: vLLM looks the prompt up again when it has preempted the request.
            self._cached = int(output.num_cached_tokens)
        if not tokens and made.finish_reason is None:
            return None
        chunk: ChunkDict = {"token_ids": tokens, "index": 0}
        self._sent += len(tokens)
        if self._logprobs is not None and made.logprobs:
            chunk |= _logprobs(tokens, made.logprobs, self._logprobs)
        if made.finish_reason is not None:
            if self._arrives and made.finish_reason == "error" and not self._sent:
                raise Unavailable(
                    "the prompt's blocks could not be fetched from the prefill worker; vLLM's log says why"
                )
            chunk["finish_reason"] = _REASONS.get(str(made.finish_reason), "error")
            if made.stop_reason is not None:
                chunk["stop_reason"] = made.stop_reason
            chunk["completion_usage"] = self._usage()
            if self._prefill and chunk["finish_reason"] == "length":
                chunk["disaggregated_params"] = pack(output.kv_transfer_params, self.cached_tokens)
            self.finished = True
        return chunk

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_len,
            "completion_tokens": self._sent,
            "total_tokens": self._prompt_len + self._sent,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def _logprobs(tokens: Sequence[int], given: Sequence[Mapping[int, Any]], most: int) -> ChunkDict:
    """Log probabilities of each new token, and of the likeliest ones at its place.

    vLLM adds the drawn token to the ``most`` likeliest ones, whatever its rank.
    """
    own = [float(at[token].logprob) for token, at in zip(tokens, given, strict=True)]
    top = [
        sorted(
            (
                {"rank": each.rank, "token_id": int(other), "token": None, "logprob": float(each.logprob)}
                for other, each in at.items()
                if each.rank <= most or (not most and other == token)
            ),
            key=lambda entry: entry["rank"],
        )
        for token, at in zip(tokens, given, strict=True)
    ]
    return {"log_probs": own, "top_logprobs": top}
