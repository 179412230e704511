"""Fields of TensorRT-LLM's event JSON, checked and normalised. Unknown keys are ignored: they grow often.

Everything here raises ProtocolError that names the event, the field, what was expected and what came.
Token ids are never quoted: messages end up in logs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vswa_plugin.engine import EngineHash
from vswa_plugin.errors import ProtocolError

#: TensorRT-LLM's cache levels.
TIERS = ("device", "host", "disk")

_U64 = 1 << 64
_I64_MIN = -(1 << 63)
_MAX_TOKEN_ID = (1 << 32) - 1
_MAX_TOKEN_DIGITS = 10
_DIGEST_DIGITS = 64


class StoredBlock(msgspec.Struct, frozen=True, gc=False):
    """One block of a ``stored`` event.

    :param nameable: False where the tokens alone do not say what the block holds; it then has no tokens.
    """

    hash: EngineHash
    token_ids: tuple[int, ...]
    tier: str
    nameable: bool


class Stored(msgspec.Struct, frozen=True):
    """A ``stored`` event: a chain of blocks below ``parent_hash``.

    :param lora_name: with ``lora_id``, the adapter of the blocks. TensorRT-LLM leaves them out; a worker that
        knows them adds both to ``data``.
    """

    parent_hash: EngineHash | None
    blocks: list[StoredBlock]
    cache_salt: str | None
    lora_name: str | None = None
    lora_id: int | None = None


def mapping(owner: object, key: str, where: str) -> Mapping[str, Any]:
    value = _required(owner, key, where)
    if not isinstance(value, Mapping):
        raise _unexpected(where, key, "an object", value)
    return value


def text(owner: object, key: str, where: str) -> str:
    value = _required(owner, key, where)
    if not isinstance(value, str):
        raise _unexpected(where, key, "a string", value)
    return value


def integer(owner: object, key: str, where: str) -> int:
    value = _required(owner, key, where)
    if type(value) is not int or value < 0:
        raise _unexpected(where, key, "a whole number, 0 or more,", value)
    return value


def optional_integer(owner: Mapping[str, Any], key: str, where: str) -> int | None:
    return None if owner.get(key) is None else integer(owner, key, where)


def stored(data: Mapping[str, Any], block_size: int, where: str) -> Stored:
    """The ``data`` of a ``stored`` event; blocks have at most ``block_size`` tokens."""
    parent = _required(data, "parent_hash", f"{where}, data")
    parent_hash = None if parent is None else _hash(parent, "parent_hash", f"{where}, data")
    raw_blocks = _list(data, "blocks", f"{where}, data")
    blocks = [_block(raw, block_size, f"{where}, block {i}") for i, raw in enumerate(raw_blocks)]
    lora_name = data.get("lora_name")
    return Stored(
        parent_hash,
        blocks,
        _cache_salt(data, raw_blocks, where),
        None if lora_name is None else text(data, "lora_name", where),
        optional_integer(data, "lora_id", where),
    )


def created(data: Mapping[str, Any], where: str) -> int | None:
    """Blocks of a ``created`` event, over all tiers; None where it does not give them."""
    if data.get("num_blocks_per_cache_level") is None:
        return None
    total = 0
    for blocks in _list(data, "num_blocks_per_cache_level", f"{where}, data"):
        if type(blocks) is not int or blocks < 0:
            raise _unexpected(where, "num_blocks_per_cache_level", "whole numbers, 0 or more", blocks)
        total += blocks
    return total


def removed(data: Mapping[str, Any], where: str) -> list[EngineHash]:
    """Block hashes of a ``removed`` event."""
    return [_hash(value, "block_hashes", where) for value in _list(data, "block_hashes", f"{where}, data")]


def updated(data: Mapping[str, Any], where: str) -> tuple[EngineHash, str | None]:
    """Block hash of an ``updated`` event and the tier that it moved to; None where it did not move."""
    where = f"{where}, data"
    block_hash = _hash(_required(data, "block_hash", where), "block_hash", where)
    if data.get("cache_level") is None:
        return block_hash, None
    change = mapping(data, "cache_level", where)
    tier = _tier(_required(change, "new_value", where), where)
    return block_hash, None if change.get("old_value") == change["new_value"] else tier


def _block(raw: object, block_size: int, where: str) -> StoredBlock:
    block_hash = _hash(_required(raw, "block_hash", where), "block_hash", where)
    assert isinstance(raw, Mapping), "it has a field"
    tokens = _list(raw, "tokens", where)
    if not 1 <= len(tokens) <= block_size:
        error = f"{where}, tokens: expected 1 to {block_size} of them, got {len(tokens)} of them"
        mixed = "; block sizes are mixed, or are not the tokens_per_block of the layout"
        raise ProtocolError(error + (mixed if tokens else ""))
    tier = _tier(raw.get("cache_level", 0), where)
    # Without tokens: the ids of a multimodal block stand for nothing.
    token_ids = None if raw.get("mm_keys") else _token_ids(tokens, where)
    return StoredBlock(block_hash, token_ids or (), tier, token_ids is not None)


def _token_ids(tokens: list[Any], where: str) -> tuple[int, ...] | None:
    """The ids, or None if they are not all there is to know of the block."""
    ids = []
    for token in tokens:
        try:
            token_id, extra_id = token["token_id"], token.get("token_extra_id")
        except (TypeError, KeyError, AttributeError):
            raise ProtocolError(f"{where}, tokens: expected objects with a token_id") from None
        if extra_id:
            return None
        if type(token_id) is str:
            if _is_digest(token_id):
                return None
            if token_id.isascii() and token_id.isdigit() and len(token_id) <= _MAX_TOKEN_DIGITS:
                token_id = int(token_id)
        if type(token_id) is not int or not 0 <= token_id <= _MAX_TOKEN_ID:
            kind = type(token_id).__name__
            raise ProtocolError(f"{where}, token_id: expected a number in [0, 2**32), got another {kind}")
        ids.append(token_id)
    return tuple(ids)


def _is_digest(token_id: str) -> bool:
    """Whether a multimodal item's digest stands in a token's place."""
    return len(token_id) == _DIGEST_DIGITS and all(digit in "0123456789abcdefABCDEF" for digit in token_id)


def _cache_salt(data: Mapping[str, Any], blocks: list[Any], where: str) -> str | None:
    default = data.get("cache_salt")
    salts: set[str | None] = set()
    for salt in [block.get("cache_salt", default) for block in blocks] or [default]:
        if salt is not None and not isinstance(salt, str):
            raise _unexpected(where, "cache_salt", "a string or null", salt)
        salts.add(salt)
    if len(salts) > 1:
        raise ProtocolError(f"{where}, cache_salt: expected one for all blocks of a chain, got {len(salts)}")
    return salts.pop()


def _tier(level: object, where: str) -> str:
    if type(level) is not int or not 0 <= level < len(TIERS):
        raise _unexpected(where, "cache_level", "0 (device), 1 (host) or 2 (disk)", level)
    return TIERS[level]


def _hash(value: object, key: str, where: str) -> EngineHash:
    """Unsigned 64-bit, signed taken as the same bits; strings (another hash algorithm) as they are."""
    if isinstance(value, str) and value:
        return value
    if type(value) is not int or not _I64_MIN <= value < _U64:
        raise _unexpected(where, key, "a 64-bit number or a string", value)
    return value % _U64


def _list(owner: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = _required(owner, key, where)
    if not isinstance(value, list | tuple):
        raise _unexpected(where, key, "a list", value)
    return list(value)


def _required(owner: object, key: str, where: str) -> Any:
    if not isinstance(owner, Mapping):
        raise ProtocolError(f"{where}: expected an object with {key}, got {_shown(owner)}")
    if key not in owner:
        raise ProtocolError(
            f"{where}: expected the field {key}, got only {', '.join(map(str, owner)) or 'none'}"
        )
    return owner[key]


def _unexpected(where: str, key: str, expected: str, value: object) -> ProtocolError:
    return ProtocolError(f"{where}, {key}: expected {expected}, got {_shown(value)}")


def _shown(value: object) -> str:
    """Containers may hold token ids, so of them only the type is shown."""
    if isinstance(value, str | int | float | None):
        return repr(value)[:80]
    return f"a {type(value).__name__}"
