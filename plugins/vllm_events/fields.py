"""vLLM's events, of either encoding, as checked structs. Unknown fields are ignored: they grow often.

Everything here raises ProtocolError that names the event and the field. Token ids are never quoted:
messages end up in logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import msgspec

from vswa_plugin.engine import EngineHash
from vswa_plugin.errors import ProtocolError, unknown_choice

#: A map with the key ``type`` (vLLM 0.24 and later), or an array that begins with it.
RawVllmEvent: TypeAlias = Mapping[str, Any] | Sequence[Any]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Natural = Annotated[int, msgspec.Meta(ge=0)]

_U64 = 1 << 64
_I64_MIN = -(1 << 63)


class Stored(msgspec.Struct, frozen=True):
    """Blocks of one group and range of tokens; in sliding groups often only some blocks of the range.

    :param parent_block_hash: the block before the *range*, None where the range begins at token 0.
    :param extra_keys: per listed block: what its hash covers beside its tokens.
    :param lookahead_token_ids: per listed block: the tokens after it that its hash covers.
    """

    block_hashes: list[Any]
    parent_block_hash: Any
    token_ids: list[TokenId]
    block_size: Annotated[int, msgspec.Meta(gt=0)]
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: Natural | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: Natural | None = None
    lookahead_token_ids: list[list[TokenId]] | None = None


class Removed(msgspec.Struct, frozen=True):
    """One copy less of each of these blocks in one group."""

    block_hashes: list[Any]
    medium: str | None = None
    group_idx: Natural | None = None


class Cleared(msgspec.Struct, frozen=True):
    """The whole prefix cache was reset."""


_KINDS: Mapping[str, type[Stored | Removed | Cleared]] = {
    "BlockStored": Stored,
    "BlockRemoved": Removed,
    "AllBlocksCleared": Cleared,
}
#: With which vLLM's events are about its own pool; copies elsewhere are not looked at by its cache manager.
_DEVICE = (None, "GPU", "DEVICE")
#: As a CacheGroup calls them.
FULL, SLIDING, CHUNKED, RECURRENT = "full", "sliding", "chunked", "recurrent"
KINDS = (FULL, SLIDING, CHUNKED, RECURRENT)
_GROUP_KINDS: Mapping[str, str] = {
    "full_attention": FULL,
    "mla_attention": FULL,
    "sink_full_attention": FULL,
    "sliding_window": SLIDING,
    "sliding_window_mla": SLIDING,
    "mamba": RECURRENT,
    "chunked_local_attention": CHUNKED,
}
#: What vLLM calls chunked layers; its events do not say how large chunks are.
CHUNKED_KIND = "chunked_local_attention"


def parse(raw: object) -> Stored | Removed | Cleared:
    """The event in ``raw``."""
    if isinstance(raw, Mapping):
        tag, fields = raw.get("type"), dict(raw)
    elif isinstance(raw, list | tuple) and raw:
        tag, fields = raw[0], {}
    else:
        raise ProtocolError(f"expected a KV event as a map or an array, got {type(raw).__name__}")
    kind = _KINDS.get(tag) if isinstance(tag, str) else None
    if kind is None:
        shown = tag if isinstance(tag, str) else type(tag).__name__
        raise ProtocolError(f"KV event: {unknown_choice('type', shown, _KINDS)}")
    if not isinstance(raw, Mapping):
        fields = dict(zip(kind.__struct_fields__, raw[1:], strict=False))
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{tag}: {error}") from None


def on_device(event: Stored | Removed) -> bool:
    return event.medium in _DEVICE


def hashes(event: Stored | Removed) -> list[EngineHash]:
    """The listed blocks' names."""
    return [engine_hash(value) for value in event.block_hashes]


def parent(event: Stored) -> EngineHash | None:
    return None if event.parent_block_hash is None else engine_hash(event.parent_block_hash)


def engine_hash(value: object) -> EngineHash:
    """Unsigned 64-bit, signed taken as the same bits; whole digests as hexadecimal text."""
    if type(value) is int and _I64_MIN <= value < _U64:
        return value % _U64
    if isinstance(value, bytes) and value:
        return value.hex()
    if isinstance(value, str) and value:
        return value
    raise ProtocolError(f"block_hashes: expected 64-bit numbers or digests, got {type(value).__name__}")


def kind(event: Stored) -> tuple[str, int | None] | None:
    """What the event says of its group: its kind, as in a CacheGroup, and its window in tokens.

    None: it does not say. A kind that is not known is given by vLLM's own name for it.
    """
    stated = event.kv_cache_spec_kind
    if stated is None:
        return None
    known = _GROUP_KINDS.get(stated, stated)
    if known != SLIDING:
        return known, None
    if not event.kv_cache_spec_sliding_window:
        raise ProtocolError(f"BlockStored of kind {stated}: expected kv_cache_spec_sliding_window, got none")
    return SLIDING, event.kv_cache_spec_sliding_window


def odd(event: Stored) -> bool:
    """Whether the hashes of the event cover more than tokens, a salt and the name of a LoRA."""
    lora = event.lora_id is not None or event.lora_name is not None
    if lora and event.lora_name is None:
        return True
    for index, keys in enumerate(event.extra_keys or []):
        more = (keys or [])[lora:]
        first = index == 0 and event.parent_block_hash is None  # where a salt is, if there is one
        if more and not (first and len(more) == 1 and isinstance(more[0], str)):
            return True
    return False
