"""Random engine states for the comparison of a reuse rule with a token-level walk. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.testing.walks import MAX_SIBLINGS, BlockTree, Tokens

__all__ = [
    "ReuseCase",
    "random_case",
    "random_layout",
]


@dataclass(frozen=True)
class ReuseCase:
    """One engine's state and one prompt.

    :ivar partial_reuse: whether the engine reuses parts of blocks.
    """

    layout: CacheLayout
    tree: BlockTree
    prompt: Tokens
    partial_reuse: bool

    def held(self) -> dict[int, list[bool]]:
        """Group id -> which of the prompt's own full blocks the group holds: what an index can know."""
        own = self.tree.own_blocks(self.prompt)
        return {
            group.group_id: [group.group_id in node.pages for node in own] for group in self.layout.groups
        }


def random_case(rng: random.Random, layout: CacheLayout | None = None) -> ReuseCase:
    """A tree of forked prompts with holes in every group, and a prompt of which the tree has some blocks.

    :param layout: all its groups have one block size; None: a random one.
    """
    layout = random_layout(rng) if layout is None else layout
    size = layout.block_size
    ids = [group.group_id for group in layout.groups]
    base = _tokens(rng, rng.randint(3 * size, 12 * size))
    stored = [base]
    for _ in range(rng.randint(0, 3)):
        stored.append(_fork(rng, rng.choice(stored), size))
    tree = BlockTree(size)
    rng.shuffle(stored)
    for tokens in stored:
        tree.store(tokens, ids)
    known = rng.choice(stored)
    prompt = rng.choice((known, _fork(rng, known, size), known + _tokens(rng, rng.randint(1, 2 * size))))
    if rng.random() < 0.5:
        prompt = prompt[: max(size, len(prompt) // size * size)]
    if rng.random() < 0.05:
        _crowd(rng, tree, prompt, ids)
    for group in layout.groups:
        _evict(rng, tree, group)
    return ReuseCase(layout, tree, prompt, rng.random() < 0.9)


def random_layout(rng: random.Random) -> CacheLayout:
    """Mostly two or more sliding groups and a global one, in any order and under any ids."""
    size = rng.choice((1, 2, 3, 4, 4))
    windows: list[int | None] = [size * rng.randint(1, 4) for _ in range(rng.choice((1, 2, 2, 3)))]
    # A window of one token needs no block at all; that is a test of its own.
    windows = [max(2, window or 0) for window in windows] if size == 1 else windows
    windows += [None] * rng.choice((0, 1, 1, 1, 1, 2))
    rng.shuffle(windows)
    ids = rng.sample(range(9), len(windows))
    groups = tuple(CacheGroup(i, window, size) for i, window in zip(ids, windows, strict=True))
    return CacheLayout(groups, "trtllm_v2", "m")


def _tokens(rng: random.Random, count: int) -> Tokens:
    return tuple(rng.randint(0, 3) for _ in range(count))


def _fork(rng: random.Random, tokens: Tokens, size: int) -> Tokens:
    """Another prompt that leaves ``tokens`` somewhere; now and then at the last token of a block."""
    at = rng.randint(len(tokens) // 4, len(tokens))
    if rng.random() < 0.2:
        at = max(0, at // size * size - 1)
    return tokens[:at] + _tokens(rng, rng.randint(1, 5 * size))


def _crowd(rng: random.Random, tree: BlockTree, prompt: Tokens, ids: Sequence[int]) -> None:
    """Many siblings of the prompt's last block, about as many as end the search for a partial match."""
    before = prompt[: max(0, len(prompt) - 1) // tree.block_size * tree.block_size]
    for i in range(rng.randint(MAX_SIBLINGS - 3, MAX_SIBLINGS)):
        tree.store(before + (100 + i,) * tree.block_size, ids)


def _evict(rng: random.Random, tree: BlockTree, group: CacheGroup) -> None:
    """Stray holes, and a run of positions: as a window leaves it behind, or a tail that was dropped."""
    stray = rng.choice((0.0, 0.0, 0.0, 0.05, 0.2))
    gone = range(0)
    if rng.random() < 0.5:
        start = rng.randint(4, 12) if group.window_size is None else rng.choice((0, rng.randint(0, 8)))
        gone = range(start, start + rng.randint(1, 6))
    for position, node in tree.blocks():
        if position in gone or rng.random() < stray:
            node.pages.discard(group.group_id)
