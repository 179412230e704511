"""Events as vLLM writes them, an engine that keeps copies as vLLM does, and the host's side of a rank."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from vswa_plugins.vllm_events import VllmEventAdapter

from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import EngineEvent
from vswa_plugin.publishing.residency import Residency, Restart

SIZE = 4
#: Names of blocks, root first: one letter a block.
Path = str


def layout_of(*windows: int | None) -> CacheLayout:
    groups = tuple(CacheGroup(n, window, SIZE) for n, window in enumerate(windows))
    return CacheLayout(groups, "vllm", "m")


def tokens_of(path: Path) -> list[int]:
    return [ord(letter) * SIZE + n for letter in path for n in range(SIZE)]


@cache
def digest_of(path: Path) -> bytes:
    """As vLLM hashes the last block of ``path``: by its parent's digest, its tokens, and no extra keys."""
    if not path:
        return hashlib.sha256(pickle.dumps("vllm-none-hash", 5)).digest()
    block = (digest_of(path[:-1]), tuple(tokens_of(path[-1])), None)
    return hashlib.sha256(pickle.dumps(block, 5)).digest()


@cache
def name_of(path: Path) -> int:
    """As published: the low 64 bits."""
    return int.from_bytes(digest_of(path), "big") % (1 << 64)


@cache
def sequence_hash(path: Path) -> int:
    return sequence_hashes_of_tokens(tokens_of(path), SIZE)[-1]


def stored(
    path: Path, first: int = 0, group: int = 0, listed: Sequence[int] | None = None, **extra: Any
) -> Any:
    """Blocks ``path[first:]``; ``listed``: which of them the event names, all by default."""
    positions = range(first, len(path)) if listed is None else listed
    return {
        "type": "BlockStored",
        "block_hashes": [name_of(path[: at + 1]) for at in positions],
        "parent_block_hash": name_of(path[:first]) if first else None,
        "token_ids": tokens_of(path[first:]),
        "block_size": SIZE,
        "medium": "GPU",
        "group_idx": group,
        **extra,
    }


def removed(*paths: Path, group: int = 0) -> Any:
    return {
        "type": "BlockRemoved",
        "block_hashes": [name_of(path) for path in paths],
        "medium": "GPU",
        "group_idx": group,
    }


CLEARED = {"type": "AllBlocksCleared"}


def as_array(event: dict[str, Any]) -> list[Any]:
    """The encoding before 0.24."""
    order = {
        "BlockStored": (
            "block_hashes parent_block_hash token_ids block_size lora_id medium lora_name extra_keys "
            "group_idx kv_cache_spec_kind kv_cache_spec_sliding_window"
        ),
        "BlockRemoved": "block_hashes medium group_idx",
        "AllBlocksCleared": "",
    }
    return [event["type"], *(event.get(field) for field in order[event["type"]].split())]


class Rank:
    """Adapter and residency of one rank; what it holds is compared by path."""

    def __init__(self, layout: CacheLayout) -> None:
        self.adapter, self.residency = VllmEventAdapter(layout), Residency(layout)
        self.restarts = 0

    def take(self, *raw: Any) -> list[EngineEvent]:
        told = [event for each in raw for event in self.adapter.feed(each)] + self.adapter.settle()
        for event in told:
            try:
                self.residency.apply(event)
            except Restart:
                self.restarts += 1
        return told

    def holds(self, paths: Sequence[Path]) -> dict[int, set[Path]]:
        """By group, those of ``paths`` that it holds; fails if it holds anything else."""
        names = {sequence_hash(path): path for path in paths}
        return {group: {names[each] for each in held} for group, held in self.residency.resident().items()}


class Copies:
    """What every group has copies of."""

    def __init__(self, groups: int) -> None:
        self.of: list[Counter[Path]] = [Counter() for _ in range(groups)]

    def held(self) -> dict[int, set[Path]]:
        return {group: {path for path, n in copies.items() if n} for group, copies in enumerate(self.of)}

    def everywhere(self, group: int) -> list[Path]:
        return sorted(path for path, n in self.of[group].items() for _ in range(n))
