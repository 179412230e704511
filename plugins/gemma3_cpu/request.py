"""A request as this engine runs it, read from Dynamo's ``PreprocessedRequest``.

Everything that the engine does not have (images, LoRA, constrained decoding) is refused here: an answer that
ignores half of the request would be worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vswa_plugin.engine import RequestDict
from vswa_plugin.errors import InvalidRequest

from .sampling import SamplingParams, parse_sampling
from .transfer.params import TransferParams, parse_params

_REFUSED = {
    "multi_modal_data": "images and audio: gemma3_cpu serves the text part of the model",
    "prompt_embeds": "prompt embeddings: send token ids",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are checked against.

    :param context_length: prompt and answer together, in tokens.
    :param pool_tokens: tokens that the smallest pool of a global group holds; bounds the answer of a request
        that does not say ``max_tokens``.
    :param eos_ids: end-of-sequence ids where the request names none.
    :param mode: of the worker, one of ``vswa_plugin.engine.MODES``.
    :param data_parallel_size: ranks.
    """

    context_length: int
    pool_tokens: int
    vocab_size: int
    eos_ids: frozenset[int] = frozenset()
    mode: str = "agg"
    data_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, checked.

    :param prompt: token ids, at least one.
    :param max_new_tokens: at least 1; prompt and answer fit the context.
    :param min_tokens: tokens before which nothing in ``stop_ids`` ends the answer.
    :param stop_ids: token ids that end it: end-of-sequence and the request's own.
    :param dp_rank: the rank that is to serve it; None: any.
    :param handover: what a prefill worker has computed of it.
    """

    prompt: list[int]
    max_new_tokens: int
    min_tokens: int
    stop_ids: frozenset[int]
    sampling: SamplingParams
    cache_salt: str | None = None
    dp_rank: int | None = None
    handover: TransferParams | None = None


def parse_request(request: RequestDict, limits: Limits) -> GenerationRequest:
    """Check and read one request; None anywhere means the default.

    :raises InvalidRequest: says what was expected and what came.
    """
    for name, what in _REFUSED.items():
        if request.get(name):
            raise InvalidRequest(f"{name}: expected none; this worker does not take {what}")
    prompt = _prompt(request.get("token_ids"), limits)
    routing = _mapping(request, "routing")
    stop = _mapping(request, "stop_conditions")
    room = limits.context_length - len(prompt)
    max_new = _count(stop, "max_tokens", None, low=1)
    if limits.mode == "prefill":
        max_new = 1
    elif max_new is None:
        max_new = max(1, limits.pool_tokens - len(prompt))
    salt = routing.get("cache_salt")
    if salt is not None and not isinstance(salt, str):
        raise InvalidRequest(f"routing.cache_salt: expected a string, got {type(salt).__name__}")
    return GenerationRequest(
        prompt=prompt,
        max_new_tokens=min(max_new, room),
        min_tokens=_count(stop, "min_tokens", 0, low=0) or 0,
        stop_ids=_stop_ids(request, stop, limits),
        sampling=parse_sampling(_mapping(request, "sampling_options"), _mapping(request, "output_options")),
        cache_salt=salt or None,
        dp_rank=_dp_rank(routing, limits),
        handover=_handover(request, limits),
    )


def _prompt(value: Any, limits: Limits) -> list[int]:
    if isinstance(value, (bytes, bytearray)):
        # Dynamo may pack token ids as little-endian 32-bit integers.
        if len(value) % 4:
            raise InvalidRequest(f"token_ids: expected 4 bytes per token, got {len(value)} bytes")
        value = np.frombuffer(value, dtype="<i4")
    if value is None or not len(value):
        raise InvalidRequest("token_ids: expected at least one token id, got none")
    tokens = np.asarray(value)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InvalidRequest("token_ids: expected a list of integers, got something else")
    if len(tokens) >= limits.context_length:
        raise InvalidRequest(
            f"prompt of {len(tokens)} tokens: expected at most {limits.context_length - 1}, so that one "
            f"token of the answer fits the context of {limits.context_length} tokens; shorten the prompt"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= limits.vocab_size:
        raise InvalidRequest(f"token_ids: expected ids in [0, {limits.vocab_size - 1}], got {low} to {high}")
    return [int(token) for token in tokens]


def _dp_rank(routing: Mapping[str, Any], limits: Limits) -> int | None:
    if routing.get("lora_name"):
        raise InvalidRequest("routing.lora_name: expected none; gemma3_cpu has no LoRA adapters")
    rank = routing.get("dp_rank")
    if rank is None:
        return None
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < limits.data_parallel_size:
        raise InvalidRequest(
            f"routing.dp_rank: expected a rank in [0, {limits.data_parallel_size - 1}], got {rank!r}; this "
            f"worker's --data-parallel-size is {limits.data_parallel_size}"
        )
    return rank


def _handover(request: RequestDict, limits: Limits) -> TransferParams | None:
    result = _mapping(request, "prefill_result")
    if not result:
        return None
    if limits.mode != "decode":
        raise InvalidRequest(
            f"prefill_result: expected none in mode {limits.mode}; only a worker with --mode decode goes on "
            "where a prefill worker ended"
        )
    params = result.get("disaggregated_params")
    if params is None:
        return None
    handover = parse_params(params)
    if handover.first_token >= limits.vocab_size:
        raise InvalidRequest(
            "prefill_result.disaggregated_params.first_token: expected a token id below "
            f"{limits.vocab_size}, got {handover.first_token}"
        )
    return handover


def _stop_ids(request: RequestDict, stop: Mapping[str, Any], limits: Limits) -> frozenset[int]:
    own = {*_ids(stop, "stop_token_ids"), *_ids(stop, "stop_token_ids_hidden")}
    eos = set(_ids(request, "eos_token_ids")) or limits.eos_ids
    if stop.get("ignore_eos"):
        # Dynamo lists the eos ids among the hidden stop ids as well.
        return frozenset(own - eos)
    return frozenset(own | eos)


def _ids(data: Mapping[str, Any], name: str) -> list[int]:
    value = data.get(name)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(token, int) for token in value):
        raise InvalidRequest(f"{name}: expected a list of token ids")
    return list(value)


def _mapping(request: RequestDict, name: str) -> Mapping[str, Any]:
    value = request.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name}: expected an object, got {type(value).__name__}")
    return value


def _count(data: Mapping[str, Any], name: str, default: int | None, *, low: int) -> int | None:
    value = data.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InvalidRequest(f"{name}: expected an integer of at least {low}, got {value!r}")
    return value
