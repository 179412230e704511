"""A request as vLLM runs it, read from Dynamo's ``PreprocessedRequest``. Pure.

fields.py names what becomes of each field; no part of a request is ignored without a reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import (
    Fields,
    RequestDict,
    dp_rank,
    is_number,
    outside,
    prefill_result,
    reads_cache,
    temperature,
    token_ids,
)
from vswa_plugin.errors import InvalidRequest

from .fields import FIELDS, GUIDED, NO_CACHE, SAMPLING
from .handover import FOR_PREFILL, received


class Limits(msgspec.Struct, frozen=True):
    """What requests are checked against.

    :param vocab_size: None: not known, vLLM checks.
    :param ranks: data-parallel ranks.
    :param layout: of which blocks are handed over.
    :param priorities: whether vLLM orders its queue by priorities.
    :param mode: of this worker, one of ``vswa_plugin.engine.MODES``.
    """

    context_length: int
    vocab_size: int | None
    ranks: int
    layout: CacheLayout
    priorities: bool = False
    mode: str = "agg"


class VllmRequest(msgspec.Struct, frozen=True):
    """One request, checked.

    :param sampling: keyword arguments of ``SamplingParams``, but for ``structured_outputs``.
    :param guided: keyword arguments of ``StructuredOutputsParams``; None: free text.
    :param dp_rank: the rank that is to serve it; None: any.
    :param priority: as vLLM has it, lower first.
    :param transfer: vLLM's ``kv_transfer_params``; None: nothing is handed over.
    :param cached_tokens: what the prefill worker reused of the prompt; None: this worker counts.
    """

    prompt: list[int]
    sampling: dict[str, Any]
    guided: dict[str, Any] | None = None
    cache_salt: str | None = None
    lora_name: str | None = None
    dp_rank: int | None = None
    priority: int = 0
    transfer: dict[str, Any] | None = None
    cached_tokens: int | None = None


def parse_request(request: RequestDict, limits: Limits) -> VllmRequest:
    """Check and read one request.

    :raises InvalidRequest: states what was expected and what came.
    """
    FIELDS.check(request)
    fields = Fields(request)
    result = prefill_result(fields, limits.mode)
    prompt = token_ids(fields, limits.context_length)
    if out_of_range := outside(prompt, limits.vocab_size):
        raise fields.error("token_ids", f"ids in [0, {limits.vocab_size or 1 << 32})", out_of_range)
    routing, options = fields.object("routing"), fields.object("sampling_options")
    sampling = {
        # Dynamo's frontend turns tokens into text.
        "detokenize": False,
        **_stopping(fields, limits.context_length - len(prompt), limits.mode),
        **_sampling(options),
        **_logprobs(fields.object("output_options")),
    }
    if not reads_cache(fields):
        sampling[NO_CACHE] = True
    transfer, cached = _handed_over(result, limits)
    nvext = fields.object("extra_args").object("nvext")
    return VllmRequest(
        prompt=prompt,
        sampling=sampling,
        guided=_guided(options.object("guided_decoding")),
        cache_salt=routing.text("cache_salt") or nvext.text("cache_salt"),
        lora_name=routing.text("lora_name"),
        dp_rank=dp_rank(routing, limits.ranks, f"this worker has {limits.ranks} data-parallel ranks"),
        priority=_priority(routing) if limits.priorities else 0,
        transfer=transfer,
        cached_tokens=cached,
    )


def _handed_over(result: Fields, limits: Limits) -> tuple[dict[str, Any] | None, int | None]:
    """``kv_transfer_params`` of the request, and what the prefill worker reused."""
    if limits.mode == "agg":
        return None, None
    if limits.mode == "prefill":
        return dict(FOR_PREFILL), None
    return received(result, limits.layout)


def _stopping(request: Fields, room: int, mode: str) -> dict[str, Any]:
    stop = request.object("stop_conditions")
    if mode == "prefill":
        # The one token says that the prompt is computed; the decode worker draws it again, and stops there
        # where it ends the answer. To end here with another reason would skip the decode worker.
        return {"max_tokens": 1, "ignore_eos": True}
    params: dict[str, Any] = {"max_tokens": min(stop.integer("max_tokens", room, low=1), room)}
    if min_tokens := stop.integer("min_tokens", 0, low=0):
        params["min_tokens"] = min(min_tokens, params["max_tokens"])
    kinds = ("stop_token_ids", "stop_token_ids_visible", "stop_token_ids_hidden")
    ids = {token for kind in kinds for token in stop.ids(kind)}
    eos = set(request.ids("eos_token_ids"))
    if stop.data.get("ignore_eos"):
        params["ignore_eos"] = True
        # Dynamo lists the eos ids among the hidden stop ids as well.
        ids -= eos
    else:
        ids |= eos
    if ids:
        params["stop_token_ids"] = sorted(ids)
    return params


def _sampling(options: Fields) -> dict[str, Any]:
    # vLLM draws at temperature 1 where it gets none; Dynamo's own engines are greedy then.
    given = {**options.data, "temperature": temperature(options.data) or 0.0}
    params: dict[str, Any] = {}
    for name in SAMPLING:
        value = given.get(name)
        if value is None:
            continue
        if not is_number(value):
            raise options.error(name, "a number", repr(value))
        params[name] = value
    return params


def _logprobs(output: Fields) -> dict[str, Any]:
    count = output.integer("logprobs", None, low=0)
    return {} if count is None else {"logprobs": count}


def _guided(given: Fields) -> dict[str, Any] | None:
    guide = {key: given.data[key] for key in GUIDED if given.data.get(key) not in (None, False)}
    if len(guide) > 1:
        kinds = [given.shown(key) for key in guide]
        raise InvalidRequest(f"{' and '.join(kinds)}: expected one way to guide the answer, got {len(kinds)}")
    if not guide:
        return None
    if isinstance(tag := guide.get("structural_tag"), Mapping):
        guide["structural_tag"] = json.dumps(tag)
    if (pattern := given.text("whitespace_pattern")) is not None:
        guide["whitespace_pattern"] = pattern
    return guide


def _priority(routing: Fields) -> int:
    """Dynamo's priorities are higher for what goes first, vLLM's lower."""
    value = routing.data.get("priority")
    if value is None:
        return 0
    if not is_number(value):
        raise routing.error("priority", "a number", repr(value))
    return -int(value)
