"""Block hashes as TensorRT-LLM's algorithm ``v1_block_key`` makes them, remembered. Pure.

The window is no part of a hash, so one block has one hash in every cache group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ...trtllm_events import HASH_ALGO, salt_id
from ...trtllm_events import block_key as _computed

__all__ = ["HASH_ALGO", "block_key", "salt_id"]

#: Blocks whose keys are kept: some 20 MB at 32 tokens a block.
_REMEMBERED = 1 << 14


def block_key(tokens: Sequence[int], parent_hash: int | None, salt: int | None = None) -> int:
    """Hash of one block.

    :param tokens: token ids below 2**32.
    :param parent_hash: hash of the block before it; None for the first block of a prompt.
    :param salt: :func:`salt_id`; counts in a first block only, the chain carries it from there.
    """
    return _block_key(tuple(tokens), parent_hash, salt)


# Once per committed block on the engine's thread; and the same prompts come again and again, to several
# caches of one process.
@lru_cache(maxsize=_REMEMBERED)
def _block_key(tokens: tuple[int, ...], parent_hash: int | None, salt: int | None) -> int:
    return _computed(tokens, parent_hash, None, salt)
