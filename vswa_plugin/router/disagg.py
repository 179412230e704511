"""A request in two phases: a prefill worker computes the prompt, a decode worker goes on from there. Pure.

What a prefill worker hands over to a decode worker is passed on as it is, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vswa_plugin.dynamo.client import WorkerHttpError
from vswa_plugin.engine.contract import ChunkDict, RequestDict
from vswa_plugin.engine.requests import Fields
from vswa_plugin.wire.events import Rank

#: Prefill workers that are tried for one request before it fails, and decode workers for one prompt.
PREFILL_TRIES = DECODE_TRIES = 3


class PrefillAnswer:
    """The answer of a prefill worker for one prompt.

    :param rank: that computed it.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.finish_reason = ""
        self._params: Any = None
        self._usage: Mapping[str, Any] = {}
        self._last: ChunkDict = {}

    @property
    def complete(self) -> bool:
        """Whether its last chunk has come."""
        return bool(self.finish_reason)

    @property
    def cached_tokens(self) -> int | None:
        """Of the prompt, what the worker reused; None where it does not say so.

        Read from its usage, or where it sends none, from what it hands over.
        """
        cached = cached_tokens_of(self._usage)
        if cached is None and isinstance(self._params, Mapping):
            cached = self._params.get("cached_tokens")
        return cached if isinstance(cached, int) else None

    @property
    def whole(self) -> ChunkDict | None:
        """The chunk that answers the request already, or None where a decode worker has to go on.

        :raises WorkerHttpError: the worker has nothing to hand over, which breaks its contract.
        """
        if self.finish_reason != "length":
            return {name: value for name, value in self._last.items() if name != "disaggregated_params"}
        if self._params is None:
            raise WorkerHttpError(
                500,
                f"prefill worker {self.rank.worker_id}: expected disaggregated_params in its last chunk, "
                "got none; does it run with --mode prefill?",
            )
        return None

    @property
    def held(self) -> Mapping[str, Any] | None:
        """What names the finished prompt to the worker, which holds it for a decode worker; None: nothing."""
        handed_over = self.finish_reason == "length" and isinstance(self._params, Mapping)
        return self._params if handed_over else None

    def saw(self, chunk: ChunkDict) -> bool:
        """Take in a chunk; returns whether it completes the answer."""
        if self.complete:
            return False
        self._params = chunk.get("disaggregated_params", self._params)
        self._usage = chunk.get("completion_usage") or self._usage
        self._last = chunk
        self.finish_reason = str(chunk.get("finish_reason") or "")
        return self.complete

    def handed_over(self) -> dict[str, Any]:
        """``prefill_result`` of the decode request."""
        details = self._usage.get("prompt_tokens_details")
        return {"disaggregated_params": self._params, "prompt_tokens_details": details}


def cached_tokens_of(usage: Mapping[str, Any]) -> int | None:
    """``cached_tokens`` of a ``completion_usage``; None where it says nothing."""
    cached: int | None = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return cached


def prefill_request(request: RequestDict, rank: Rank) -> dict[str, Any]:
    """The request as a prefill worker gets it: its prompt, and one token that shows its end.

    :raises InvalidRequest: a part of it is no object.
    """
    stop = {**Fields(request).object("stop_conditions").data, "max_tokens": 1}
    if stop.get("min_tokens"):
        stop["min_tokens"] = 1
    return {**addressed(request, rank, prefill=rank), "stop_conditions": stop}


def decode_request(request: RequestDict, rank: Rank, answer: PrefillAnswer) -> dict[str, Any]:
    """The request as a decode worker gets it: with what the prefill worker hands over."""
    return {**addressed(request, rank, prefill=answer.rank), "prefill_result": answer.handed_over()}


def addressed(request: RequestDict, rank: Rank, prefill: Rank | None = None) -> dict[str, Any]:
    """The request as the chosen rank gets it: with its dp_rank and the worker of its prompt."""
    routing = {**Fields(request).object("routing").data, "dp_rank": rank.dp_rank}
    if prefill is not None:
        routing |= {"prefill_worker_id": prefill.worker_id, "prefill_dp_rank": prefill.dp_rank}
    return {**request, "routing": routing}


def set_cached_tokens(chunk: ChunkDict, cached_tokens: int) -> None:
    """Put into a decode worker's usage what was reused: its own count is of what it received."""
    usage = chunk.get("completion_usage")
    if usage:
        details = {**(usage.get("prompt_tokens_details") or {}), "cached_tokens": cached_tokens}
        chunk["completion_usage"] = {**usage, "prompt_tokens_details": details}
