"""The record of a finished request that observers get. Pure; no token ids."""

from __future__ import annotations

import msgspec


class RequestRecord(msgspec.Struct, frozen=True):
    """One request that ended, however it ended.

    Durations are seconds since the request reached the worker; None for what never happened.

    :param request_id: the frontend's id of the request.
    :param model: name under which the model is served.
    :param worker_id: number by which the router addresses the worker.
    :param dp_rank: data-parallel rank that served it.
    :param prompt_tokens: length of the prompt.
    :param cached_tokens: prompt tokens whose KV was reused; at most ``prompt_tokens - 1``.
    :param output_tokens: tokens generated.
    :param finish_reason: the last chunk's: ``stop``, ``eos``, ``length``, ``cancelled``, ``error``; an
        engine may have others.
    :param first_token_s: until its first token.
    :param total_s: until it ended.
    :param transferred_tokens: prompt tokens that a prefill worker computed and this one received; unless 0,
        ``cached_tokens`` is the prefill worker's count and says nothing of this worker's cache.
    """

    request_id: str
    model: str
    worker_id: int
    dp_rank: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finish_reason: str
    first_token_s: float | None
    total_s: float
    transferred_tokens: int = 0
