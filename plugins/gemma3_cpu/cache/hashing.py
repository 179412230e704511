"""Block hashes as TensorRT-LLM's algorithm ``v1_block_key`` makes them, text only. Pure.

Unsigned 64-bit and chained: a hash names the block's tokens, all tokens before them, and the cache salt.
The window is no part of it, so one block has one hash in every cache group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

HASH_ALGO = "v1_block_key"

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B9
_FACTOR = 0x45D9F3B
_PARENT_FACTOR = 0xBF58476D1CE4E5B9
_SALT_FACTOR = 0x94D049BB133111EB


#: Blocks whose keys are kept: some 20 MB at 32 tokens a block.
_REMEMBERED = 1 << 14


def salt_id(cache_salt: str) -> int:
    """The number that stands for a cache salt: the first 8 bytes of its SHA-256, little-endian."""
    return int.from_bytes(hashlib.sha256(cache_salt.encode()).digest()[:8], "little")


def block_key(tokens: Sequence[int], parent_hash: int | None, salt: int | None = None) -> int:
    """Hash of one block.

    :param tokens: token ids below 2**32.
    :param parent_hash: hash of the block before it; None for the first block of a prompt.
    :param salt: :func:`salt_id`; counts in a first block only, the chain carries it from there.
    """
    return _block_key(tuple(tokens), parent_hash, salt)


# The same prompts come again and again, and to several caches of one process.
@lru_cache(maxsize=_REMEMBERED)
def _block_key(tokens: tuple[int, ...], parent_hash: int | None, salt: int | None) -> int:
    seed = len(tokens) ^ ((parent_hash or 0) * _PARENT_FACTOR & _MASK64)
    if salt is not None and not parent_hash:
        seed = _mix64(seed, salt)
    # Once per committed block on the engine's thread: spelt out instead of calling a function per token.
    for token in tokens:
        mixed = ((token >> 16) ^ token) * _FACTOR & _MASK32
        mixed = ((mixed >> 16) ^ mixed) * _FACTOR & _MASK32
        mixed = ((mixed >> 16) ^ mixed) + _GOLDEN & _MASK32
        seed ^= mixed + (seed << 6) + (seed >> 2) & _MASK64
    return seed


def _mix64(seed: int, value: int) -> int:
    value = ((value >> 30) ^ value) * _PARENT_FACTOR & _MASK64
    value = ((value >> 27) ^ value) * _SALT_FACTOR & _MASK64
    value = (value >> 31) ^ value
    return seed ^ (value + _GOLDEN + (seed << 6) + (seed >> 2) & _MASK64)
