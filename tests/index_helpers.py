"""What the tests of the window index share: layouts, rules of their own, and a naive model of an index."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import pytest

from vswa_plugin.blocks.kernel import load_kernel
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import RULES, Needs, ReuseRule, TrtllmV2, Vllm, resumable
from vswa_plugin.index import WindowIndex
from vswa_plugin.wire.events import Cleared, Event, Layout, Moved, Rank, Removed, Stored

BLOCK = 2
KERNEL: ModuleType | None = load_kernel()
needs_kernel = pytest.mark.skipif(
    KERNEL is None, reason="the compiled kernel is not built: needs a C compiler"
)
BOTH_PATHS = [pytest.param(False, id="python"), pytest.param(True, id="kernel", marks=needs_kernel)]


def groups(*windows: int | None) -> tuple[CacheGroup, ...]:
    return tuple(CacheGroup(group_id, window, BLOCK) for group_id, window in enumerate(windows))


class EveryOther(Vllm):
    """A plugin's rule without plain numbers: every second boundary, of sliding groups the block before it."""

    name = "every_other"

    def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
        return 0 if group.window_size is None or boundary % 2 else boundary - 1

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
        return None


class HalfTokens(TrtllmV2):
    """A plugin's rule with plain numbers and tokens of its own."""

    name = "half_tokens"

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        return boundary * layout.block_size // 2


PLUGIN_RULES: dict[str, ReuseRule] = {**RULES, "every_other": EveryOther(), "half_tokens": HalfTokens()}
LAYOUTS = [
    CacheLayout(groups(4, None, 4, 6), "trtllm_v2", "gemma"),
    CacheLayout(groups(4, 8, None), "vllm", "gemma"),
    CacheLayout(groups(4, 6), "trtllm_v1", "other"),
    CacheLayout(groups(None, 4), "trtllm_v1", "other"),
    CacheLayout(groups(4, None), "every_other", "other"),
    CacheLayout(groups(None, 4, 4), "half_tokens", "other"),
]


@dataclass
class NaiveRank:
    layout: CacheLayout
    scored: bool = True
    held: dict[int, dict[int, str]] = field(default_factory=dict)


@dataclass
class NaiveIndex:
    """A dict per rank and group, and a score by looking at every boundary."""

    ranks: dict[Rank, NaiveRank] = field(default_factory=dict)

    def join(self, rank: Rank, layout: CacheLayout) -> None:
        before = self.ranks.get(rank)
        if before is None or before.layout != layout:
            empty: dict[int, dict[int, str]] = {group.group_id: {} for group in layout.groups}
            self.ranks[rank] = NaiveRank(layout, before is None or before.scored, empty)

    def clear(self, rank: Rank, group_id: int | None = None) -> None:
        for group, held in self.ranks[rank].held.items():
            if group_id in (None, group):
                held.clear()

    def apply(self, rank: Rank, event: Event) -> None:
        match event:
            case Layout():
                self.join(rank, CacheLayout(event.groups, event.rule, event.model, event.hash_scheme))
                self.clear(rank)
            case Cleared():
                self.clear(rank, event.group_id)
            case Stored():
                self.ranks[rank].held[event.group_id].update(dict.fromkeys(event.sequence_hashes, event.tier))
            case Removed():
                for sequence_hash in event.sequence_hashes:
                    self.ranks[rank].held[event.group_id].pop(sequence_hash, None)
            case Moved():
                held = self.ranks[rank].held[event.group_id]
                held.update({h: event.tier for h in event.sequence_hashes if h in held})

    def score(self, hashes: list[int], prompt_len: int, model: str | None = None) -> dict[Rank, int]:
        scores = {}
        for rank, naive in self.ranks.items():
            if not naive.scored or model not in (None, naive.layout.model):
                continue
            held = {group: [h in blocks for h in hashes] for group, blocks in naive.held.items()}
            tokens = resumable(PLUGIN_RULES[naive.layout.rule], naive.layout, held, prompt_len)
            if tokens:
                scores[rank] = tokens
        return scores


def new_index(kernel: bool, max_blocks: int | None = None) -> WindowIndex:
    return WindowIndex(kernel=kernel, max_blocks=max_blocks, rules=PLUGIN_RULES)
