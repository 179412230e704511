"""vLLM's own block hashes, for events that list blocks without saying which ones they are. Pure.

Only for plain text and vLLM's default algorithm with the fixed root of 0.29 and later. A digest that is
computed wrongly equals no published hash, so a mistaken assumption names no block.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable

from vswa_plugin.engine import EngineHash

_PROTOCOL = 5
ROOT = hashlib.sha256(pickle.dumps("vllm-none-hash", _PROTOCOL)).digest()


def chained(parent: bytes, blocks: Iterable[tuple[int, ...]]) -> list[bytes]:
    """Digests of consecutive blocks of token ids below the digest ``parent``."""
    digests = []
    for token_ids in blocks:
        parent = hashlib.sha256(pickle.dumps((parent, token_ids, None), _PROTOCOL)).digest()
        digests.append(parent)
    return digests


def published(digest: bytes, like: EngineHash) -> EngineHash:
    """The name under which a digest is published: 64 bits, or all of it where ``like`` is text."""
    return digest.hex() if isinstance(like, str) else int.from_bytes(digest[-8:], "big")
