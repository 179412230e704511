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
_GLOBAL_KINDS = ("full_attention", "mla_attention", "sink_full_attention")
_SLIDING_KINDS = ("sliding_window", "sliding_window_mla")


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


def window(event: Stored) -> tuple[bool, int | None]:
    """Whether the event says what its group attends to, and the window in tokens (None: everything)."""
    kind = event.kv_cache_spec_kind
    if kind is None:
        return False, None
    if kind in _GLOBAL_KINDS:
        return True, None
    if kind not in _SLIDING_KINDS:
        known = ", ".join((*_GLOBAL_KINDS, *_SLIDING_KINDS))
        raise ProtocolError(f"BlockStored: expected a kv_cache_spec_kind of {known}, got {kind!r}")
    if not event.kv_cache_spec_sliding_window:
        raise ProtocolError(f"BlockStored of kind {kind}: expected kv_cache_spec_sliding_window, got none")
    return True, event.kv_cache_spec_sliding_window
