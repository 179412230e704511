"""What a client's request says about its model and its routing, as Dynamo's frontend would read it. Pure.

Only what a choice depends on is looked at. Whether the request is right is the frontend's to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from vswa_plugin.errors import RequestError
from vswa_plugin.router.picker.headers import METADATA, SESSION

#: Parts of a message whose tokens do not say what they consist of.
_MEDIA = re.compile(rb'"type"\s*:\s*"(?:image|input_image|video|audio|input_audio|file)')


class Unreadable(RequestError):
    """The frontend will refuse it, and says why better than anybody else."""


class _NvExt(msgspec.Struct):
    """Fields of ``nvext`` that the frontend passes on as ``routing``; null and missing mean the same."""

    cache_salt: str | None = None
    backend_instance_id: int | None = None
    decode_worker_id: int | None = None
    dp_rank: int | None = None
    prefill_worker_id: int | None = None
    prefill_dp_rank: int | None = None
    routing_constraints: dict[str, Any] | None = None


class _Wishes(msgspec.Struct):
    model: str
    cache_salt: str | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    nvext: _NvExt | None = None


class ClientRequest(msgspec.Struct, frozen=True):
    """:param fields: of its body, as they came.
    :param routed: as much of Dynamo's ``PreprocessedRequest`` as a choice depends on.
    :param scorable: False: no reuse is promised, see :class:`~vswa_plugin.router.decide.PromptHashes`.
    :param metadata: as plugins are told it.
    """

    model: str
    fields: Mapping[str, msgspec.Raw]
    routed: Mapping[str, Any]
    scorable: bool
    metadata: Mapping[str, str]


_wishes_decoder = msgspec.json.Decoder(_Wishes)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read(body: bytes, headers: Mapping[str, str]) -> ClientRequest:
    """The request in ``body``; raises Unreadable."""
    try:
        wishes = _wishes_decoder.decode(body)
        fields = _fields_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Unreadable(f"expected a request for a model as JSON, got {len(body)} bytes: {error}") from error
    nvext = wishes.nvext or _NvExt()
    routing = {name: value for name, value in msgspec.structs.asdict(nvext).items() if value is not None}
    if wishes.cache_salt is not None:
        routing.setdefault("cache_salt", wishes.cache_salt)
    all_computed = wishes.prompt_logprobs is not None or bool(wishes.echo)
    media = _MEDIA.search(fields.get("messages", b"")) is not None
    return ClientRequest(
        wishes.model,
        fields,
        {"routing": routing, "agent_context": {"session_id": headers.get(SESSION)}},
        not all_computed and not media,
        {name.removeprefix(METADATA): text for name, text in headers.items() if name.startswith(METADATA)},
    )
