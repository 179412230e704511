"""A request as TensorRT-LLM runs it, read from Dynamo's ``PreprocessedRequest``. Pure.

fields.py names what becomes of each field; no part of a request is ignored without a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from vswa_plugin.engine import (
    Fields,
    RequestDict,
    dp_rank,
    is_number,
    outside,
    prefill_result,
    temperature,
    token_ids,
)
from vswa_plugin.errors import InvalidRequest

from .fields import FIELDS, GUIDED, SAMPLING


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
    :param prefill_cached_tokens: of the prefill worker, as Dynamo's own workers send it.
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

    :raises InvalidRequest: states what was expected and what came.
    """
    FIELDS.check(request)
    fields = Fields(request)
    handover, prefill_cached = _handover(fields, limits)
    prompt = _prompt(fields, limits, computed_here=handover is None)
    routing, options = fields.object("routing"), fields.object("sampling_options")
    priority = request.get("priority")
    if priority is not None and not is_number(priority):
        raise fields.error("priority", "a number in [0, 1]", repr(priority))
    return TrtllmRequest(
        prompt=prompt,
        sampling={
            # Dynamo's frontend turns tokens into text.
            "detokenize": False,
            **_stopping(fields, limits.context_length - len(prompt), limits.mode),
            **_sampling(options),
            **_logprobs(fields.object("output_options")),
        },
        guided=_guided(options.object("guided_decoding")),
        cache_salt=_cache_salt(fields),
        lora_name=routing.text("lora_name"),
        dp_rank=dp_rank(routing, limits.ranks, f"this worker has {limits.ranks} attention-DP ranks"),
        priority=priority,
        handover=handover,
        prefill_cached_tokens=prefill_cached,
    )


def _prompt(request: Fields, limits: Limits, *, computed_here: bool) -> list[int]:
    prompt = token_ids(request, limits.context_length)
    if computed_here and limits.max_prompt is not None and len(prompt) > limits.max_prompt:
        raise InvalidRequest(
            f"prompt of {len(prompt)} tokens: expected at most max_num_tokens, {limits.max_prompt}, because "
            "this worker runs without enable_chunked_prefill; shorten the prompt"
        )
    if out_of_range := outside(prompt, limits.vocab_size):
        raise request.error("token_ids", f"ids in [0, {limits.vocab_size or 1 << 32})", out_of_range)
    return prompt


def _stopping(request: Fields, room: int, mode: str) -> dict[str, Any]:
    stop = request.object("stop_conditions")
    own = {*stop.ids("stop_token_ids"), *stop.ids("stop_token_ids_hidden")}
    visible = stop.ids("stop_token_ids_visible")
    max_tokens = stop.integer("max_tokens", room, low=1)
    params: dict[str, Any] = {"max_tokens": 1 if mode == "prefill" else min(max_tokens, room)}
    if min_tokens := stop.integer("min_tokens", 0, low=0):
        params["min_tokens"] = min_tokens
    if stop.data.get("ignore_eos") or visible:
        # The engine drops a token that it stops at; one that is to be seen is stopped at by the frontend.
        params["ignore_eos"] = True
    elif ids := own.union(request.ids("eos_token_ids")):
        params["stop_token_ids"] = sorted(ids)
    return params


def _sampling(options: Fields) -> dict[str, Any]:
    params: dict[str, Any] = {}
    # The engine is greedy where it gets neither temperature, top_p nor top_k.
    given = {**options.data, "temperature": temperature(options.data)}
    for name, theirs in SAMPLING.items():
        value = given.get(name)
        if value is None:
            continue
        if not is_number(value) and not isinstance(value, bool):
            raise options.error(name, "a number", repr(value))
        # Dynamo says -1 for "all", TensorRT-LLM 0.
        params[theirs] = max(value, 0) if name == "top_k" else value
    return params


def _logprobs(output: Fields) -> dict[str, Any]:
    count = output.integer("logprobs", None, low=0)
    # 0 asks for the drawn token's own, which is one.
    return {} if count is None else {"logprobs": max(1, count)}


def _guided(given: Fields) -> dict[str, Any] | None:
    guide = {key: given.data[key] for key in GUIDED if given.data.get(key) not in (None, False)}
    choice = [text for text in given.data.get("choice") or () if text is not None]
    if len(guide) + bool(choice) > 1:
        kinds = [given.shown(key) for key in (*guide, *(["choice"] if choice else []))]
        raise InvalidRequest(f"{' and '.join(kinds)}: expected one way to guide the answer, got {len(kinds)}")
    if choice:
        guide["regex"] = f"({'|'.join(re.escape(str(text)) for text in choice)})"
    if isinstance(tag := guide.get("structural_tag"), Mapping):
        guide["structural_tag"] = json.dumps(tag)
    return guide or None


def _handover(request: Fields, limits: Limits) -> tuple[Mapping[str, Any] | None, int | None]:
    result = prefill_result(request, limits.mode)
    if result.data.get("disaggregated_params") is None:
        return None, None
    cached = result.object("prompt_tokens_details").data.get("cached_tokens")
    return result.object("disaggregated_params").data, cached if isinstance(cached, int) else None


def _cache_salt(request: Fields) -> str | None:
    nvext = request.object("extra_args").object("nvext")
    return request.object("routing").text("cache_salt") or nvext.text("cache_salt")
