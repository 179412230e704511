"""From TensorRT-LLM's outputs to the chunks that Dynamo's frontend reads. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vswa_plugin.engine import ChunkDict

#: TensorRT-LLM's finish reason -> Dynamo's.
_REASONS = {"stop": "stop", "length": "length", "cancelled": "cancelled", "timeout": "error"}


class Answer:
    """One answer while it comes in: the engine repeats all tokens so far, the frontend wants the new ones.

    :param cached_tokens: what the prefill worker reused; None: this engine's own count is used.
    :ivar finished: the last chunk has been made.
    """

    def __init__(self, prompt_len: int, *, prefill: bool, cached_tokens: int | None = None) -> None:
        self._prompt_len = prompt_len
        self._prefill = prefill
        self._handed_over = cached_tokens
        self._sent = 0
        self.finished = False

    def chunk(self, result: Any) -> ChunkDict | None:
        """The chunk for the next state of the ``RequestOutput``; None where it holds nothing new."""
        output = result.outputs[0]
        tokens = list(output.token_ids or ())
        reason = self._reason(result, output)
        if len(tokens) == self._sent and reason is None:
            return None
        chunk: ChunkDict = {"token_ids": tokens[self._sent :], "index": 0}
        chunk |= _logprobs(tokens, output.logprobs or (), self._sent)
        self._sent = len(tokens)
        if reason is not None:
            self.finished = True
            chunk["finish_reason"] = reason
            if getattr(output, "stop_reason", None) is not None:
                chunk["stop_reason"] = output.stop_reason
            chunk["completion_usage"] = self._usage(result)
        return chunk

    def cached_tokens(self, result: Any) -> int:
        """Prompt tokens that the worker which computed the prompt has reused; less than the prompt."""
        cached = self._handed_over
        if cached is None:
            cached = getattr(result, "cached_tokens", 0) or 0
        return max(0, min(int(cached), self._prompt_len - 1))

    def _reason(self, result: Any, output: Any) -> str | None:
        reason = output.finish_reason
        if reason is None and not result.finished:
            return None
        if self._prefill and reason in (None, "length", "not_finished"):
            # Any other word makes the frontend take the first token for the whole answer.
            return "length"
        return _REASONS.get(str(reason), "error")

    def _usage(self, result: Any) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_len,
            "completion_tokens": self._sent,
            "total_tokens": self._prompt_len + self._sent,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens(result)},
        }


def _logprobs(tokens: list[int], logprobs: Any, sent: int) -> ChunkDict:
    """Log probabilities, where requested: of each new token, and of the likeliest ones at its place."""
    new = list(logprobs)[sent : len(tokens)]
    if not new:
        return {}
    if not isinstance(new[0], Mapping):
        return {"log_probs": [float(value) for value in new]}
    own: list[float] = []
    top: list[list[dict[str, Any]]] = []
    for token, likely in zip(tokens[sent:], new, strict=False):
        drawn = likely.get(token) or next(iter(likely.values()))
        own.append(float(drawn.logprob))
        ranked = [
            {"rank": each.rank or place, "token_id": other, "token": None, "logprob": float(each.logprob)}
            for place, (other, each) in enumerate(likely.items(), 1)
        ]
        top.append(sorted(ranked, key=lambda each: each["rank"]))
    return {"log_probs": own, "top_logprobs": top}
