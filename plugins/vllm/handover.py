"""What a prefill worker sends with its answer, and what a decode worker reads of it. Pure.

The fields are those of Dynamo's own vLLM workers, ``kv_transfer_params`` as vLLM's connector made them. So a
prefill worker of ours can serve a decode worker of Dynamo's, and the reverse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import Fields, is_number
from vswa_plugin.errors import InvalidRequest, shown

#: In ``disaggregated_params``, and in vLLM's ``SamplingParams.extra_args``.
KEY = "kv_transfer_params"
#: What a prefill request carries: keep the blocks for a decode worker.
FOR_PREFILL: Mapping[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
#: Of the prompt, what the prefill worker reused; vLLM's decode side answers with it.
_CACHED = "remote_prefill_cached_tokens"
_TEXTS = ("remote_engine_id", "remote_request_id", "remote_host")
_NUMBERS = ("remote_port", "tp_size")
_ADVICE = "run the same engine, with the same model and options, on prefill and decode workers"


class Received(NamedTuple):
    """What a decode worker starts from.

    :ivar params: vLLM's ``kv_transfer_params``.
    :ivar cached_tokens: prompt tokens that the prefill worker reused.
    """

    params: dict[str, Any]
    cached_tokens: int


def pack(params: Any, cached_tokens: int) -> dict[str, Any]:
    """``disaggregated_params`` of a finished prefill. Never logged: they give access to the prompt's blocks.

    :param params: ``RequestOutput.kv_transfer_params``.
    :raises TypeError, ValueError: it is no JSON.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"{KEY}: expected an object, got {shown(params)}")
    # Tuples of block ids become lists, as on the wire.
    plain = json.loads(json.dumps(dict(params), allow_nan=False))
    return {KEY: {_CACHED: cached_tokens, **plain}}


def received(result: Fields, layout: CacheLayout) -> Received:
    """Read ``prefill_result`` for the decode phase.

    :raises InvalidRequest: there is none, it is of another engine, or of blocks unlike those of ``layout``.
    """
    if not result.data:
        raise InvalidRequest(
            "prefill_result: expected what a prefill worker has answered, got none; a worker with "
            "--mode decode does not compute prompts"
        )
    packed = result.object("disaggregated_params")
    if not isinstance(packed.data.get(KEY), Mapping):
        raise packed.error(
            KEY, f"those of a vLLM prefill worker; {_ADVICE}", f"only {sorted(map(str, packed.data))}"
        )
    params = packed.object(KEY)
    for name in _TEXTS:
        if not params.text(name):
            raise params.error(name, "a text", "none")
    for name in _NUMBERS:
        if params.integer(name, None, low=1) is None:
            raise params.error(name, "a number", "none")
    if params.data.get("do_remote_prefill") is not True:
        raise params.error("do_remote_prefill", "true", shown(params.data.get("do_remote_prefill")))
    _check_blocks(params, layout)
    return Received(dict(params.data), _cached(params, result))


def _cached(params: Fields, result: Fields) -> int:
    """Prefill workers of older releases name it in their usage alone."""
    cached = params.integer(_CACHED, None, low=0)
    if cached is None:
        cached = result.object("prompt_tokens_details").integer("cached_tokens", 0, low=0)
    return int(cached or 0)


def _check_blocks(params: Fields, layout: CacheLayout) -> None:
    """The blocks say which groups and block size the prefill worker has; its connector compares the rest."""
    ids = params.data.get("remote_block_ids")
    if not _is_block_ids(ids):
        raise params.error("remote_block_ids", "lists of block ids, one for each cache group", shown(ids))
    if len(ids) != len(layout.groups):
        raise params.error(
            "remote_block_ids",
            f"those of {len(layout.groups)} cache groups, as this worker has",
            f"{len(ids)}; {_ADVICE}",
        )
    tokens = params.integer("remote_num_tokens", 0, low=0)
    for group, blocks in zip(layout.groups, ids, strict=True):
        expected = -(-tokens // group.block_size)
        # With speculative decoding there may be a block ahead of the prompt.
        if tokens and group.window_size is None and not expected <= len(blocks) <= expected + 1:
            raise params.error(
                "remote_block_ids",
                f"{expected} blocks of {group.block_size} tokens for the {tokens} tokens of the prompt",
                f"{len(blocks)}: the prefill worker has another block size; {_ADVICE}",
            )


def _is_block_ids(ids: object) -> TypeGuard[Sequence[Sequence[int]]]:
    return isinstance(ids, Sequence) and all(
        isinstance(group, Sequence) and not isinstance(group, str) and all(is_number(each) for each in group)
        for group in ids
    )
