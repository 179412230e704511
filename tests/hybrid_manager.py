"""A cache that stores as vLLM's hybrid manager may: any groups, and any blocks of those that keep only some.

It knows blocks by vLLM's names, and what can be reused by looking at every length. It shares no code with
what is tested by it.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption

KINDS = {
    "full": "full_attention",
    "sliding": "sliding_window",
    "chunked": "chunked_local_attention",
    "recurrent": "mamba",
}


def names_of(tokens: Sequence[int], salt: str | None, unit: int, lookahead: int) -> dict[int, int]:
    """Position in tokens -> vLLM's name of the prefix that ends there."""
    digest = hashlib.sha256(pickle.dumps("vllm-none-hash", 5)).digest()
    names: dict[int, int] = {}
    for end in range(unit, len(tokens) - lookahead + 1, unit):
        extra: tuple[object, ...] | None = (("cache_salt", salt),) if salt and end == unit else None
        if lookahead:
            extra = (extra, *tokens[end : end + lookahead])
        digest = hashlib.sha256(pickle.dumps((digest, tuple(tokens[end - unit : end]), extra), 5)).digest()
        names[end] = int.from_bytes(digest, "big") % (1 << 64)
    return names


class HybridManager:
    """:param layout: with a resumption.

    :param random: which blocks are stored and evicted.
    """

    def __init__(self, layout: CacheLayout, random: Random) -> None:
        assert layout.resumption is not None
        self.layout = layout
        self.where: Resumption = layout.resumption
        self._random = random
        self.held: dict[int, Counter[int]] = {group.group_id: Counter() for group in layout.groups}

    # -- what is reused ------------------------------------------------------------------------------

    def hit(self, tokens: Sequence[int]) -> int:
        """Tokens of the prompt that are reused."""
        where, prompt_len = self.where, len(tokens)
        names = names_of(tokens, None, where.hash_block_size, where.lookahead)
        for length in range(prompt_len // where.alignment * where.alignment, 0, -where.alignment):
            if length > prompt_len - 1 or length + where.lookahead > prompt_len:
                continue
            if all(self._allows(group, length, prompt_len, names) for group in self.layout.groups):
                length -= where.alignment * any(self._short(group, length) for group in self.layout.groups)
                return length if length > where.least_tokens else 0
        return 0

    def _allows(self, group: CacheGroup, length: int, prompt_len: int, names: dict[int, int]) -> bool:
        where, size = self.where, group.block_size

        def holds(end: int) -> bool:
            return self.held[group.group_id][names.get(end, -1)] > 0

        unit = where.hash_block_size
        peek = prompt_len - 1 if where.spare_last else prompt_len // unit * unit
        if group.kind == "recurrent":
            return holds(length)
        if group.kind == "full" and where.partial:
            end = length + unit * group.drops_last
            limit = peek if group.drops_last else prompt_len - 1
            whole = all(holds(at) for at in range(size, end + 1, size))
            if end % size == 0:
                return whole and end <= max(limit, length)
            inside = range(end, min(end // size * size + size, limit) + 1)
            return whole and end <= max(limit, length) and any(holds(at) for at in inside if at % unit == 0)
        after = length + size
        if group.drops_last and (after > peek or not holds(after)):
            return False
        if group.kind == "chunked":
            assert group.chunk_size is not None
            start = length - length % group.chunk_size
        elif group.kind == "sliding":
            start = max(0, length - self._window(group) * size)
        else:
            start = 0
        return all(holds(at) for at in range(start + size, length + 1, size))

    def _short(self, group: CacheGroup, length: int) -> bool:
        """Where vLLM gives up the last block twice."""
        if not group.drops_last or group.kind != "sliding" or group.block_size == self.where.alignment:
            return False
        return length // group.block_size < self._window(group)

    def _window(self, group: CacheGroup) -> int:
        """Blocks of a window before a boundary.

        vLLM looks up one kind of group, or a full one and another, in one pass, in which a block that is
        given up is proof enough for a window of one token.
        """
        assert group.window_size is not None
        kinds = {
            (each.kind, each.window_size, each.chunk_size, each.block_size) for each in self.layout.groups
        }
        once = len(kinds) < 2 or (len(kinds) == 2 and "full" in {kind for kind, *_ in kinds})
        blocks = -(-(group.window_size - 1) // group.block_size)
        return blocks if group.drops_last and once else max(1, blocks)

    # -- what is stored ------------------------------------------------------------------------------

    def serve(self, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Events of one request, in pieces as prompts are computed; then some blocks are evicted."""
        where, random = self.where, self._random
        at, tokens = self.hit(prompt), [*prompt, *answer]
        names = names_of(tokens, None, where.hash_block_size, where.lookahead)
        known = {group.group_id: at // group.block_size for group in self.layout.groups}
        ends = sorted({len(prompt), len(tokens), *(random.randint(at, len(tokens)) for _ in range(3))})
        for end in ends:
            for group in self.layout.groups:
                last = max(0, end - where.lookahead) // group.block_size
                first, known[group.group_id] = known[group.group_id], max(known[group.group_id], last)
                if last > first:
                    yield self._store(group, tokens, names, first, last)
                if where.partial and end <= len(prompt) and random.random() < 0.5:  # never inside an answer
                    yield from self._store_inside(group, tokens, names, end)
        yield from self._evict()

    def _store(
        self, group: CacheGroup, tokens: list[int], names: dict[int, int], first: int, last: int
    ) -> dict[str, Any]:
        size = group.block_size
        ends = range((first + 1) * size, last * size + 1, size)
        if group.kind not in ("full", "chunked"):
            keep = self._random.choice([0.0, 0.3, 1.0])
            ends = [end for end in ends if self._random.random() < keep]  # type: ignore[assignment]
        return self._event(group, tokens, names, list(ends), first * size, last * size, size)

    def _store_inside(
        self, group: CacheGroup, tokens: list[int], names: dict[int, int], end: int
    ) -> Iterator[dict[str, Any]]:
        unit = self.where.hash_block_size
        end = (end - self.where.lookahead) // unit * unit
        if end > 0 and end % group.block_size:
            yield self._event(group, tokens, names, [end], end - unit, end, unit)

    def _event(
        self,
        group: CacheGroup,
        tokens: list[int],
        names: dict[int, int],
        ends: list[int],
        start: int,
        stop: int,
        block_size: int,
    ) -> dict[str, Any]:
        self.held[group.group_id].update(names[end] for end in ends)
        event: dict[str, Any] = {
            "type": "BlockStored",
            "block_hashes": [names[end] for end in ends],
            "parent_block_hash": names[start] if start else None,
            "token_ids": tokens[start:stop],
            "block_size": block_size,
            "medium": "GPU",
            "extra_keys": [None] * len(ends) or None,
            "group_idx": group.group_id,
            "kv_cache_spec_kind": KINDS[group.kind],
        }
        if group.window_size is not None:
            event["kv_cache_spec_sliding_window"] = group.window_size
        if ahead := self.where.lookahead:
            event["lookahead_token_ids"] = [tokens[end : end + ahead] for end in ends]
        return event

    def _evict(self) -> Iterator[dict[str, Any]]:
        for group_id, held in self.held.items():
            copies = [name for name, count in held.items() for _ in range(count)]
            share = self._random.choice([0.0, 0.0, 0.1, 0.5])
            gone = [name for name in copies if self._random.random() < share]
            if gone:
                held.subtract(gone)
                yield {
                    "type": "BlockRemoved",
                    "block_hashes": gone,
                    "medium": "GPU",
                    "group_idx": group_id,
                }
