"""vLLM's own hashes of prefixes, for blocks whose place no event gives. Pure.

For text without LoRA (whose path is a part of its hashes) and vLLM's default algorithm with the fixed root of
0.29 and later. A digest that is computed wrongly equals no published hash, so a mistaken assumption names no
block.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Sequence

from vswa_plugin.engine import EngineHash

_PROTOCOL = 5
ROOT = hashlib.sha256(pickle.dumps("vllm-none-hash", _PROTOCOL)).digest()


def chained(
    above: bytes, token_ids: Sequence[int], unit: int, lookahead: int, root_salt: str | None = None
) -> Iterator[bytes]:
    """Digests of the prefixes that end at each whole unit of ``token_ids``, below the digest ``above``.

    :param lookahead: tokens after a prefix that its digest covers; where they are missing there is no digest.
    :param root_salt: cache salt, where ``above`` is :data:`ROOT`.
    """
    keys = None if root_salt is None else (("cache_salt", root_salt),)
    for at in range(0, len(token_ids) - unit - lookahead + 1, unit):
        end = at + unit
        extra = (keys, *token_ids[end : end + lookahead]) if lookahead else keys
        block = (above, tuple(token_ids[at:end]), extra)
        above = hashlib.sha256(pickle.dumps(block, _PROTOCOL)).digest()
        keys = None
        yield above


def published(digest: bytes, *, whole: bool = False) -> EngineHash:
    """The name under which a digest is published: 64 bits, or ``whole`` as hexadecimal text."""
    return digest.hex() if whole else int.from_bytes(digest[-8:], "big")
