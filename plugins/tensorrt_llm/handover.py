"""``DisaggregatedParams`` over the wire, as Dynamo's own TensorRT-LLM workers send them.

Plain JSON types: the opaque state in base64, log probabilities as lists. So a prefill worker of ours can
serve a decode worker of Dynamo's, and the reverse.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from vswa_plugin.errors import InvalidRequest

from .package import Api

#: Dynamo's decode workers take this key off unread; the others would be an error to them.
_METADATA = "_epd_metadata"
#: Added by Dynamo on the way.
_NOT_THEIRS = (_METADATA, "worker_id")
#: A tensor; the decode worker does not need it.
_LEFT_OUT = ("first_gen_logits",)


def pack(params: Any, cached_tokens: int) -> dict[str, Any]:
    """What a prefill worker sends. Never logged: the state gives access to the prompt's blocks.

    :param params: TensorRT-LLM's ``DisaggregatedParams``.
    :param cached_tokens: prompt tokens that the prefill worker reused.
    """
    packed: dict[str, Any] = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        # Fields that the constructor does not take are internal to the object.
        if value is None or field.name in _LEFT_OUT or not field.init:
            continue
        packed[field.name] = _listed(value) if field.name == "first_gen_log_probs" else _plain(value)
    if "disagg_request_id" in packed:
        # Dynamo's frontend passes nothing on without it; the engine prefers the other where both are there.
        packed.setdefault("ctx_request_id", packed["disagg_request_id"])
    packed[_METADATA] = {"cached_tokens": cached_tokens}
    return packed


def unpack(api: Api, packed: Mapping[str, Any]) -> tuple[Any, int | None]:
    """``DisaggregatedParams`` for the decode phase, and the prefill worker's cached tokens if it sent them.

    :raises InvalidRequest: of another engine, or malformed.
    """
    if "request_type" not in packed:
        raise InvalidRequest(
            "prefill_result.disaggregated_params: expected those of a TensorRT-LLM prefill worker, got the "
            f"fields {', '.join(sorted(map(str, packed)))}; run the same engine on prefill and decode workers"
        )
    field_names = {field.name for field in dataclasses.fields(api.DisaggregatedParams) if field.init}
    values = {key: value for key, value in packed.items() if key in field_names and key not in _NOT_THEIRS}
    metadata = packed.get(_METADATA)
    cached = metadata.get("cached_tokens") if isinstance(metadata, Mapping) else None
    try:
        if isinstance(values.get("opaque_state"), str):
            values["opaque_state"] = base64.b64decode(values["opaque_state"], validate=True)
        if values.get("first_gen_log_probs"):
            values["first_gen_log_probs"] = [_unlisted(api, at) for at in values["first_gen_log_probs"]]
        params = api.DisaggregatedParams(**{**values, "request_type": "generation_only"})
    except (TypeError, ValueError, KeyError, AttributeError, binascii.Error) as error:
        raise InvalidRequest(
            f"prefill_result.disaggregated_params: expected what a TensorRT-LLM prefill worker sends: "
            f"{type(error).__name__}: {error}"
        ) from error
    # Computed and in the KV cache already.
    if getattr(params, "multimodal_embedding_handles", None):
        params.multimodal_embedding_handles = None
    return params, cached if isinstance(cached, int) else None


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _listed(value: Any) -> Any:
    """Log probabilities: positions, or beams of them, each a number or those of the likeliest tokens."""
    if isinstance(value, Mapping):
        return [
            {"token_id": token, "logprob": each.logprob, "rank": each.rank} for token, each in value.items()
        ]
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value


def _unlisted(api: Api, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if all(isinstance(item, Mapping) for item in value):
        return {item["token_id"]: api.Logprob(item["logprob"], item.get("rank")) for item in value}
    return [_unlisted(api, each) for each in value]
