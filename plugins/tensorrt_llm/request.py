"""A request as TensorRT-LLM runs it, read from Dynamo's ``PreprocessedRequest``. Pure.

Half of a request is never ignored: what is not passed on to the engine is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from vswa_plugin.engine import RequestDict
from vswa_plugin.errors import InvalidRequest

#: Dynamo's sampling option -> TensorRT-LLM's; both mean the same.
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "include_stop_str_in_output": "include_stop_str_in_output",
}
#: Options with the only values that are served: one answer per request, no beams.
ONLY = {"n": (1,), "best_of": (1,), "use_beam_search": (False,), "length_penalty": (1, 1.0)}

_REFUSED = {
    "multi_modal_data": "no images or audio: this worker serves text",
    "prompt_embeds": "no prompt embeddings: send token ids",
}
_GUIDED = ("json", "regex", "grammar", "json_object", "structural_tag")


class Limits(msgspec.Struct, frozen=True):
    """What requests are checked against, in tokens; None: not known, the engine checks.

    :param max_prompt: the longest prompt that is computed here.
    :param ranks: attention-DP ranks.
    """

    context_length: int
    max_prompt: int | None
    vocab_size: int | None
    mode: str
    ranks: int


class TrtllmRequest(msgspec.Struct, frozen=True):
    """One request, checked.

    :param sampling: keyword arguments of ``SamplingParams``, but for ``guided_decoding``.
    :param guided: keyword arguments of ``GuidedDecodingParams``; None: free text.
    :param dp_rank: the rank that is to serve it; None: any.
    :param handover: what a prefill worker has computed of it, as it came.
    :param prefill_cached_tokens: of the prefill worker, as Dynamo's own workers tell it.
    """

    prompt: list[int]
    sampling: dict[str, Any]
    guided: dict[str, Any] | None = None
    cache_salt: str | None = None
    lora_name: str | None = None
    dp_rank: int | None = None
    priority: float | None = None
    handover: Mapping[str, Any] | None = None
    prefill_cached_tokens: int | None = None


def parse_request(request: RequestDict, limits: Limits) -> TrtllmRequest:
    """Check and read one request; None anywhere means the default.

    :raises InvalidRequest: says what was expected and what came.
    """
    for name, expected in _REFUSED.items():
        if request.get(name):
            raise InvalidRequest(f"{name}: expected {expected}")
    handover, prefill_cached = _handover(request, limits)
    prompt = _prompt(request.get("token_ids"), limits, computed_here=handover is None)
    routing = _mapping(request, "routing")
    options = _mapping(request, "sampling_options")
    priority = request.get("priority")
    if priority is not None and not _is_number(priority):
        raise InvalidRequest(f"priority: expected a number in [0, 1], got {priority!r}")
    return TrtllmRequest(
        prompt=prompt,
        sampling={
            # Dynamo's frontend turns tokens into text.
            "detokenize": False,
            **_stopping(request, limits.context_length - len(prompt), limits.mode),
            **_sampling(options),
            **_logprobs(_mapping(request, "output_options")),
        },
        guided=_guided(options.get("guided_decoding")),
        cache_salt=_cache_salt(request),
        lora_name=_text(routing, "lora_name"),
        dp_rank=_dp_rank(routing, limits),
        priority=priority,
        handover=handover,
        prefill_cached_tokens=prefill_cached,
    )


def _prompt(value: Any, limits: Limits, *, computed_here: bool) -> list[int]:
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
    if computed_here and limits.max_prompt is not None and len(tokens) > limits.max_prompt:
        raise InvalidRequest(
            f"prompt of {len(tokens)} tokens: expected at most max_num_tokens, {limits.max_prompt}, because "
            "this worker runs without enable_chunked_prefill; shorten the prompt"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (limits.vocab_size is not None and high >= limits.vocab_size):
        raise InvalidRequest(f"token_ids: expected ids in [0, {limits.vocab_size}), got {low} to {high}")
    return [int(token) for token in tokens]


def _stopping(request: RequestDict, room: int, mode: str) -> dict[str, Any]:
    stop = _mapping(request, "stop_conditions")
    own = {*_ids(stop, "stop_token_ids"), *_ids(stop, "stop_token_ids_hidden")}
    visible = set(_ids(stop, "stop_token_ids_visible"))
    max_tokens = _count(stop, "max_tokens", room, low=1)
    asked: dict[str, Any] = {"max_tokens": 1 if mode == "prefill" else min(max_tokens, room)}
    if min_tokens := _count(stop, "min_tokens", 0, low=0):
        asked["min_tokens"] = min_tokens
    if stop.get("ignore_eos") or visible:
        # The engine drops a token that it stops at; one that is to be seen is stopped at by the frontend.
        asked["ignore_eos"] = True
    elif ids := own | set(_ids(request, "eos_token_ids")):
        asked["stop_token_ids"] = sorted(ids)
    return asked


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    for name, allowed in ONLY.items():
        value = options.get(name)
        if value is not None and value not in allowed:
            raise InvalidRequest(f"sampling_options.{name}: expected {allowed[0]!r}, got {value!r}")
    asked: dict[str, Any] = {}
    for name, theirs in SAMPLING.items():
        value = options.get(name)
        if value is None:
            continue
        if not _is_number(value) and not isinstance(value, bool):
            raise InvalidRequest(f"sampling_options.{name}: expected a number, got {value!r}")
        # Dynamo says -1 for "all", TensorRT-LLM 0.
        asked[theirs] = max(value, 0) if name == "top_k" else value
    return asked


def _logprobs(output: Mapping[str, Any]) -> dict[str, Any]:
    if output.get("prompt_logprobs") is not None:
        raise InvalidRequest("output_options.prompt_logprobs: expected none; not served by this worker")
    if output.get("logprobs") is None:
        return {}
    # 0 asks for the drawn token's own, which is one.
    return {"logprobs": max(1, _count(output, "logprobs", 0, low=0))}


def _guided(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"guided_decoding: expected an object, got {type(value).__name__}")
    asked = {key: value[key] for key in _GUIDED if value.get(key) not in (None, False)}
    choice = [text for text in value.get("choice") or () if text is not None]
    if choice and "regex" not in asked:
        asked["regex"] = f"({'|'.join(re.escape(str(text)) for text in choice)})"
    return asked or None


def _handover(request: RequestDict, limits: Limits) -> tuple[Mapping[str, Any] | None, int | None]:
    result = _mapping(request, "prefill_result")
    params = result.get("disaggregated_params")
    if params is None:
        return None, None
    if limits.mode != "decode":
        raise InvalidRequest(
            f"prefill_result: expected none in mode {limits.mode}; only a worker with --mode decode goes on "
            "where a prefill worker ended"
        )
    if not isinstance(params, Mapping):
        raise InvalidRequest(
            f"prefill_result.disaggregated_params: expected an object, got {type(params).__name__}"
        )
    details = _mapping(result, "prompt_tokens_details")
    cached = details.get("cached_tokens")
    return params, cached if isinstance(cached, int) else None


def _dp_rank(routing: Mapping[str, Any], limits: Limits) -> int | None:
    rank = routing.get("dp_rank")
    if rank is None:
        return None
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < limits.ranks:
        raise InvalidRequest(
            f"routing.dp_rank: expected a rank in [0, {limits.ranks - 1}], got {rank!r}; this worker has "
            f"{limits.ranks} attention-DP ranks"
        )
    return rank


def _cache_salt(request: RequestDict) -> str | None:
    extra = _mapping(request, "extra_args")
    for owner in (_mapping(request, "routing"), _mapping(extra, "nvext")):
        if salt := _text(owner, "cache_salt"):
            return salt
    return None


def _ids(data: Mapping[str, Any], name: str) -> list[int]:
    value = data.get(name)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(token, int) for token in value):
        raise InvalidRequest(f"{name}: expected a list of token ids")
    return list(value)


def _mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name}: expected an object, got {type(value).__name__}")
    return value


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"{name}: expected a string, got {type(value).__name__}")
    return value or None


def _count(data: Mapping[str, Any], name: str, default: int, *, low: int) -> int:
    value = data.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InvalidRequest(f"{name}: expected an integer of at least {low}, got {value!r}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
