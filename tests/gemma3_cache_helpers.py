"""A small cache manager with two windows, and requests that run through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vswa_plugins.gemma3_cpu.cache import CacheManager, CacheSequence, GroupSpec
from vswa_plugins.gemma3_cpu.cache.hashing import block_key

SLIDING, GLOBAL = 0, 1


def two_windows(
    sliding: int = 50, global_: int = 50, *, window: int = 8, bs: int = 4, **options: Any
) -> CacheManager:
    groups = [GroupSpec(0, window, sliding), GroupSpec(1, None, global_)]
    options.setdefault("max_chunk_tokens", 16)
    return CacheManager(groups, bs, 8192, **options)


def tokens(n: int, first: int = 0) -> list[int]:
    return list(range(first, first + n))


def compute(sequence: CacheSequence, upto: int, chunk: int = 16) -> None:
    while sequence.computed_tokens < upto:
        step = min(chunk, upto - sequence.computed_tokens)
        sequence.reserve(sequence.computed_tokens + step)
        sequence.advance(step)


def opened(
    manager: CacheManager, prompt: Sequence[int], new: int = 1, salt: str | None = None
) -> CacheSequence:
    sequence = manager.open(prompt, new, salt)
    assert sequence is not None
    return sequence


def run(manager: CacheManager, prompt: Sequence[int], new: int = 1, salt: str | None = None) -> int:
    """One request from start to end; how many tokens it reused."""
    sequence = opened(manager, prompt, new, salt)
    compute(sequence, len(prompt))
    compute(sequence, len(prompt) + new - 1)
    sequence.close()
    manager.check()
    return sequence.cached_tokens


def short(event: dict[str, Any]) -> tuple[Any, ...]:
    """An event without its constant parts: kind, group, and what it names."""
    data = event["data"]
    blocks = [block["block_hash"] for block in data.get("blocks", [])]
    return data["type"], event["layer_group_id"], blocks or data.get("block_hashes")


def hashes(prompt: Sequence[int], bs: int = 4) -> list[int]:
    chain: list[int] = []
    for i in range(0, len(prompt) - bs + 1, bs):
        chain.append(block_key(prompt[i : i + bs], chain[-1] if chain else None))
    return chain


def drop(manager: CacheManager, group: int, prompt: Sequence[int], blocks: Sequence[int]) -> None:
    """Evict given blocks of ``prompt`` from one group, as pressure from other requests would."""
    store = manager._store
    path = store.tree.walk(
        None, [tuple(prompt[i : i + store.block_size]) for i in block_starts(manager, prompt)]
    )
    for block in blocks:
        store._evict(group, path[block].pages[group])
    manager.check()


def block_starts(manager: CacheManager, prompt: Sequence[int]) -> range:
    bs = manager._store.block_size
    return range(0, len(prompt) - bs + 1, bs)
