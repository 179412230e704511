"""What a prefill worker sends a decode worker: Dynamo's ``disaggregated_params``, a JSON object to Dynamo."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from vswa_plugin.errors import InvalidRequest

from .messages import Fingerprint

KIND = "gemma3_cpu"
VERSION = 1

Count = Annotated[int, msgspec.Meta(ge=0)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]


class TransferParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the blocks of a prompt are and how it goes on. Never logged: it holds ticket and token.

    :param host: with ``port``, where the decode worker reaches the prefill worker's server.
    :param prompt_len: tokens.
    :param cached_tokens: prompt tokens that the prefill worker reused; what the client's usage shows.
    :param first_token: token id after the prompt, drawn by the prefill worker.
    :param first_logprob: where the request asked for it.
    :param first_top: (token id, logprob) of the likeliest tokens, where the request asked for them.
    """

    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    ticket: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$", max_length=32)]
    fingerprint: Fingerprint
    prompt_len: Annotated[int, msgspec.Meta(ge=1)]
    cached_tokens: Count
    first_token: TokenId
    first_logprob: float | None = None
    first_top: tuple[tuple[TokenId, float], ...] = ()
    prefill_worker_id: Count | None = None
    prefill_dp_rank: Count | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {"kind": KIND, "version": VERSION, **msgspec.to_builtins(self)}


class _Opening(msgspec.Struct, frozen=True):
    """What every version begins with."""

    kind: str
    version: int


def parse_params(data: object) -> TransferParams:
    """Read what :meth:`TransferParams.to_json` made; unknown fields are ignored.

    :raises InvalidRequest: malformed, of another engine, or of another version.
    """
    try:
        opening = msgspec.convert(data, _Opening)
        if opening.kind != KIND:
            raise _invalid(
                f"kind {KIND!r}, got {opening.kind!r}; prefill and decode workers must run the same engine"
            )
        if opening.version != VERSION:
            raise _invalid(f"version {VERSION}, got {opening.version}; run the same release on both workers")
        params = msgspec.convert(data, TransferParams)
    except msgspec.ValidationError as error:
        raise _invalid(f"what a {KIND} prefill worker sends: {error}") from error
    if params.cached_tokens >= params.prompt_len:
        raise _invalid(
            f"cached_tokens below prompt_len, got {params.cached_tokens} of {params.prompt_len} tokens"
        )
    return params


def _invalid(expected: str) -> InvalidRequest:
    return InvalidRequest(f"prefill_result.disaggregated_params: expected {expected}")
