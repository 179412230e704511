"""From TensorRT-LLM's outputs to the chunks that Dynamo's frontend reads. Pure.

Every field of a result is checked as it is read: a result of another shape, as a release or one request may
give, ends that request with an error that names the field, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vswa_plugin.engine import ChunkDict
from vswa_plugin.errors import RequestError, shown

#: Token ids are below.
_TOKENS = 2**32
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
        output = _first_output(result)
        tokens = _tokens(output, self._sent)
        reason = self._reason(result, output)
        if len(tokens) == self._sent and reason is None:
            return None
        chunk: ChunkDict = {"token_ids": tokens[self._sent :], "index": 0}
        chunk |= _logprobs(tokens, _field(output, "logprobs", "outputs[0]"), self._sent)
        self._sent = len(tokens)
        if reason is not None:
            chunk["finish_reason"] = reason
            stop_reason = getattr(output, "stop_reason", None)
            if not isinstance(stop_reason, int | str | None):
                raise faulty("outputs[0].stop_reason", "a token id, a text or none", stop_reason)
            if stop_reason is not None:
                chunk["stop_reason"] = stop_reason
            chunk["completion_usage"] = self._usage(result)
            self.finished = True
        return chunk

    def cached_tokens(self, result: Any) -> int:
        """Prompt tokens that the worker which computed the prompt has reused; less than the prompt."""
        cached = self._handed_over
        if cached is None:
            cached = getattr(result, "cached_tokens", None)
            if cached is None:  # not in every release
                cached = 0
            if not _is_integer(cached):
                raise faulty("cached_tokens", "a whole number", cached)
        return max(0, min(cached, self._prompt_len - 1))

    def _reason(self, result: Any, output: Any) -> str | None:
        reason, finished = _field(output, "finish_reason", "outputs[0]"), _field(result, "finished")
        if not isinstance(reason, str | None):
            raise faulty("outputs[0].finish_reason", "a word or none", reason)
        if not isinstance(finished, bool):
            raise faulty("finished", "true or false", finished)
        if reason is None and not finished:
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


def faulty(field: str, expected: str, actual: object) -> RequestError:
    """The error of a request whose result cannot be read."""
    return RequestError(
        f"TensorRT-LLM gave a result that cannot be read: {field}: expected {expected}, got {shown(actual)}"
    )


def _field(holder: Any, name: str, path: str = "") -> Any:
    try:
        return getattr(holder, name)
    except AttributeError:
        raise faulty(f"{path}.{name}" if path else name, "such a field", f"none in {holder!r}") from None


def _first_output(result: Any) -> Any:
    outputs = _field(result, "outputs")
    if not isinstance(outputs, Sequence) or isinstance(outputs, str | bytes) or not outputs:
        raise faulty("outputs", "a list of one output", outputs)
    return outputs[0]


def _tokens(output: Any, sent: int) -> list[int]:
    """All tokens so far; those that were sent before are not looked at again."""
    given = _field(output, "token_ids", "outputs[0]")
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise faulty("outputs[0].token_ids", "a list of token ids", given)
    tokens = list(given)
    if len(tokens) < sent:
        raise faulty(
            "outputs[0].token_ids", f"the {sent} that came before, and more", f"{len(tokens)} of them"
        )
    for token in tokens[sent:]:
        if not _is_integer(token) or not 0 <= token < _TOKENS:
            raise faulty("outputs[0].token_ids", "token ids", token)
    return tokens


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise faulty("outputs[0].logprobs", "numbers", value)
    return float(value)


def _logprobs(tokens: list[int], logprobs: Any, sent: int) -> ChunkDict:
    """Log probabilities, where requested: of each new token, and of the likeliest ones at its place."""
    if logprobs is not None and not isinstance(logprobs, Sequence):
        raise faulty("outputs[0].logprobs", "a list with an entry for each token, or none", logprobs)
    new = list(logprobs or ())[sent : len(tokens)]
    if not new:
        return {}
    if not isinstance(new[0], Mapping):
        return {"log_probs": [_number(value) for value in new]}
    own: list[float] = []
    top: list[list[dict[str, Any]]] = []
    for token, likely in zip(tokens[sent:], new, strict=False):
        if not isinstance(likely, Mapping) or not likely:
            raise faulty("outputs[0].logprobs", "log probabilities by token id", likely)
        ranked = [_ranked(place, each, likely[each]) for place, each in enumerate(likely, 1)]
        drawn = next((each for each in ranked if each["token_id"] == token), ranked[0])
        own.append(drawn["logprob"])
        top.append(sorted(ranked, key=lambda each: each["rank"]))
    return {"log_probs": own, "top_logprobs": top}


def _ranked(place: int, token: object, likely: Any) -> dict[str, Any]:
    rank = _field(likely, "rank", "outputs[0].logprobs") or place
    if not _is_integer(rank) or not _is_integer(token):
        raise faulty("outputs[0].logprobs", "ranks and token ids", (rank, token))
    logprob = _number(_field(likely, "logprob", "outputs[0].logprobs"))
    return {"rank": rank, "token_id": token, "token": None, "logprob": logprob}
