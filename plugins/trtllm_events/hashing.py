"""Block hashes as TensorRT-LLM's algorithm ``v1_block_key`` makes them, of text without extra ids. Pure.

A hash names a block's tokens, all tokens before them, the LoRA and the cache salt; never the window. With it
an adapter can tell whether the tokens of an event are all there is to know of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from vswa_plugin.engine import EngineHash

HASH_ALGO = "v1_block_key"

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B9
_FACTOR = 0x45D9F3B
_PARENT_FACTOR = 0xBF58476D1CE4E5B9
_SALT_FACTOR = 0x94D049BB133111EB


def salt_id(cache_salt: str) -> int:
    """Manager V2's number of a cache salt; V1's depends on its C++ library and cannot be computed here."""
    return int.from_bytes(hashlib.sha256(cache_salt.encode()).digest()[:8], "little")


def block_key(
    tokens: Sequence[int], parent_hash: int | None, lora_id: int | None = None, salt: int | None = None
) -> int:
    """Unsigned 64-bit hash of one block.

    :param tokens: token ids below 2**32.
    :param parent_hash: hash of the block before it; None for the first block of a prompt.
    :param lora_id: the engine's number of the adapter; part of every block.
    :param salt: :func:`salt_id`; part of a first block only, the chain carries it from there.
    """
    seed = len(tokens) ^ ((parent_hash or 0) * _PARENT_FACTOR & _MASK64)
    if salt is not None and not parent_hash:
        seed = _mix64(seed, salt)
    # Once per stored block: spelt out instead of calling a function per token.
    for token in tokens:
        mixed = ((token >> 16) ^ token) * _FACTOR & _MASK32
        mixed = ((mixed >> 16) ^ mixed) * _FACTOR & _MASK32
        mixed = ((mixed >> 16) ^ mixed) + _GOLDEN & _MASK32
        seed ^= mixed + (seed << 6) + (seed >> 2) & _MASK64
    return seed if lora_id is None else _mix64(seed, lora_id)


def names(
    block_hash: EngineHash, tokens: Sequence[int], parent: EngineHash | None, lora_id: int | None
) -> bool:
    """Whether ``block_hash`` is the hash of these tokens behind the block named ``parent``."""
    return not isinstance(parent, str) and block_hash == block_key(tokens, parent, lora_id)


def chain_keys(
    tokens: Sequence[int], block_size: int, lora_id: int | None = None, salt: int | None = None
) -> list[int]:
    """Hashes of the full blocks of a prompt, first to last."""
    keys: list[int] = []
    for first in range(0, len(tokens) - block_size + 1, block_size):
        parent = keys[-1] if keys else None
        keys.append(block_key(tokens[first : first + block_size], parent, lora_id, salt))
    return keys


def _mix64(seed: int, value: int) -> int:
    value = ((value >> 30) ^ value) * _PARENT_FACTOR & _MASK64
    value = ((value >> 27) ^ value) * _SALT_FACTOR & _MASK64
    value = (value >> 31) ^ value
    return seed ^ (value + _GOLDEN + (seed << 6) + (seed >> 2) & _MASK64)
