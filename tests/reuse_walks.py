"""What engines reuse, walked token by token over a token tree with pages per group: the rules' brute force.

Each walk goes as the engine's own matching does (nodes first, then pages, parts of blocks included) and knows
nothing of reuse rules. :func:`random_case` makes small worlds in which all of that happens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout

#: TensorRT-LLM does not look for a partial match among more children than this.
MAX_SIBLINGS = 32

Prompt = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A block in the tree: its own tokens, and the groups that have a page of it."""

    tokens: Prompt
    children: list[Node] = field(default_factory=list)
    pages: set[int] = field(default_factory=set)

    def exact_child(self, tokens: Prompt) -> Node | None:
        return next((child for child in self.children if child.tokens == tokens), None)


class Tree:
    """All blocks that an engine knows, full and partial."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.root = Node(())

    def store(self, tokens: Prompt, groups: Sequence[int]) -> None:
        """Add all blocks of a prompt with pages in all ``groups``, a partial tail included."""
        node = self.root
        for key in self.keys(tokens):
            child = node.exact_child(key)
            if child is None:
                if len(key) < self.block_size and any(c.tokens[: len(key)] == key for c in node.children):
                    return  # a longer block covers this tail
                covered = [
                    c for c in node.children if len(c.tokens) < len(key) and key[: len(c.tokens)] == c.tokens
                ]
                node.children = [c for c in node.children if c not in covered]
                child = Node(key)
                node.children.append(child)
            child.pages.update(groups)
            node = child

    def keys(self, tokens: Prompt) -> Iterator[Prompt]:
        for at in range(0, len(tokens), self.block_size):
            yield tokens[at : at + self.block_size]

    def own_blocks(self, prompt: Prompt) -> list[Node]:
        """The prompt's full blocks, as far as they are in the tree: what hashes can find."""
        own: list[Node] = []
        node = self.root
        for key in self.keys(prompt[: len(prompt) // self.block_size * self.block_size]):
            child = node.exact_child(key)
            if child is None:
                break
            own.append(child)
            node = child
        return own

    def nodes(self) -> list[tuple[int, Node]]:
        """All nodes with their position."""
        found: list[tuple[int, Node]] = []
        todo = [(0, child) for child in self.root.children]
        while todo:
            position, node = todo.pop(0)
            found.append((position, node))
            todo += [(position + 1, child) for child in node.children]
        return found


class Walk(NamedTuple):
    """What a walk found.

    :param tokens: reused tokens.
    :param ends_in: the block in which they end, or whose edge they reach; None for no reuse.
    :param matched: the last block that was matched before pages were looked at.
    """

    tokens: int
    ends_in: Node | None
    matched: Node | None


def common_prefix(a: Prompt, b: Prompt) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def best_part(children: Sequence[Node], key: Prompt) -> tuple[Node, int] | None:
    """The child that shares most leading tokens; of equals the one inserted first."""
    best: tuple[Node, int] | None = None
    for child in children:
        shared = common_prefix(child.tokens, key)
        if shared > (best[1] if best else 0):
            best = (child, shared)
    return best


# -- TensorRT-LLM V2 -------------------------------------------------------------------------------


def walk_trtllm_v2(layout: CacheLayout, tree: Tree, prompt: Prompt, partial_reuse: bool) -> Walk:
    """Nodes first; then pages, starting again at the shorter length whenever one is missing."""
    size = tree.block_size
    path: list[tuple[Node, int]] = []
    node = tree.root
    for key in tree.keys(prompt[:-1]):
        child = node.exact_child(key)
        if child is None:
            if partial_reuse and len(node.children) < MAX_SIBLINGS:
                part = best_part(node.children, key)
                path += [part] if part else []
            break
        path.append((child, len(key)))
        node = child
    matched = path[-1][0] if path else None
    length = sum(used for _, used in path)
    while (missing := _first_missing_page(layout, path, length)) is not None:
        del path[missing:]
        length = missing * size
    return Walk(length, path[-1][0] if path else None, matched)


def _first_missing_page(layout: CacheLayout, path: list[tuple[Node, int]], length: int) -> int | None:
    for group in layout.groups:
        # The token at `length` sees itself and the window - 1 tokens before it.
        oldest = 0 if group.window_size is None else max(0, length - group.window_size + 1)
        for i, (node, _) in enumerate(path):
            if (i + 1) * group.block_size > oldest and group.group_id not in node.pages:
                return i
    return None


# -- TensorRT-LLM V1 -------------------------------------------------------------------------------


def walk_trtllm_v1(layout: CacheLayout, tree: Tree, prompt: Prompt, partial_reuse: bool) -> Walk:
    """Windows one after the other, global ones first, each capped by those before; again until all agree."""
    cap = max(0, len(prompt) - 1)
    while (once := trtllm_v1_one_pass(layout, tree, prompt, partial_reuse, cap)) < cap:
        cap = once
    return Walk(cap, None, None)


def trtllm_v1_one_pass(
    layout: CacheLayout, tree: Tree, prompt: Prompt, partial_reuse: bool, cap: int | None = None
) -> int:
    """As the engine does it: the windows that come later do not bind those before them."""
    found = max(0, len(prompt) - 1) if cap is None else cap
    for group in sorted(layout.groups, key=lambda group: group.window_size is not None):
        found = min(found, _committed_v1(group, tree, prompt[:-1], partial_reuse, found))
    return found


def _committed_v1(group: CacheGroup, tree: Tree, lookup: Prompt, partial_reuse: bool, cap: int) -> int:
    committed = length = 0
    missing_end: int | None = None
    node = tree.root
    for key in tree.keys(lookup):
        if length >= cap:
            break
        child = node.exact_child(key)
        if child is None:
            with_page = [c for c in node.children if group.group_id in c.pages]
            part = best_part(with_page, key) if partial_reuse else None
            length += part[1] if part else 0
        elif group.group_id in child.pages:
            length += len(key)
        elif group.window_size is not None:
            length += len(key)
            missing_end = length
        else:
            break
        if missing_end is None or length >= missing_end + (group.window_size or 0):
            committed = length
        if child is None:
            break
        node = child
    return committed


def walk_trtllm_v1_contiguous(layout: CacheLayout, tree: Tree, prompt: Prompt, partial_reuse: bool) -> Walk:
    """Windows in ascending order; each needs all blocks from the first."""
    cap = max(0, len(prompt) - 1)
    for group in sorted(layout.groups, key=lambda group: group.window_size or float("inf")):
        length = 0
        node = tree.root
        for key in tree.keys(prompt[:-1]):
            child = node.exact_child(key)
            if child is not None and group.group_id in child.pages:
                length += len(key)
                node = child
                continue
            with_page = [c for c in node.children if group.group_id in c.pages]
            part = best_part(with_page, key) if partial_reuse else None
            length += part[1] if part else 0
            break
        cap = min(cap, length)
    return Walk(cap, None, None)


# -- vLLM ------------------------------------------------------------------------------------------


def walk_vllm(layout: CacheLayout, tree: Tree, prompt: Prompt, partial_reuse: bool = False) -> Walk:
    """Every length downwards, every token that the next one can see."""
    own = tree.own_blocks(prompt)
    size = tree.block_size
    for length in range(len(prompt) - 1, 0, -1):
        if length % size or length // size > len(own):
            continue
        if all(
            group.group_id in own[position // size].pages
            for group in layout.groups
            for position in range(length)
            if group.window_size is None or length - position < group.window_size
        ):
            return Walk(length, own[length // size - 1], own[-1])
    return Walk(0, None, None)


WALKS: dict[str, Callable[[CacheLayout, Tree, Prompt, bool], Walk]] = {
    "trtllm_v2": walk_trtllm_v2,
    "trtllm_v1": walk_trtllm_v1,
    "trtllm_v1_contiguous": walk_trtllm_v1_contiguous,
    "vllm": walk_vllm,
}


# -- worlds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One engine's state and one prompt."""

    layout: CacheLayout
    tree: Tree
    prompt: Prompt
    partial_reuse: bool

    def held(self) -> dict[int, list[bool]]:
        """What an index knows: which of the prompt's own full blocks each group holds."""
        own = self.tree.own_blocks(self.prompt)
        return {
            group.group_id: [group.group_id in node.pages for node in own] for group in self.layout.groups
        }


def random_case(rng: random.Random) -> Case:
    """A tree of forked prompts with holes in every group, and a prompt that knows some of it."""
    layout = random_layout(rng)
    size = layout.block_size
    ids = [group.group_id for group in layout.groups]
    base = _tokens(rng, rng.randint(3 * size, 12 * size))
    stored = [base]
    for _ in range(rng.randint(0, 3)):
        stored.append(_fork(rng, rng.choice(stored), size))
    tree = Tree(size)
    rng.shuffle(stored)
    for tokens in stored:
        tree.store(tokens, ids)
    asked = rng.choice(stored)
    prompt = rng.choice((asked, _fork(rng, asked, size), asked + _tokens(rng, rng.randint(1, 2 * size))))
    if rng.random() < 0.5:
        prompt = prompt[: max(size, len(prompt) // size * size)]
    if rng.random() < 0.05:
        _crowd(rng, tree, prompt, ids)
    for group in layout.groups:
        _evict(rng, tree, group)
    return Case(layout, tree, prompt, rng.random() < 0.9)


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


def _tokens(rng: random.Random, count: int) -> Prompt:
    return tuple(rng.randint(0, 3) for _ in range(count))


def _fork(rng: random.Random, tokens: Prompt, size: int) -> Prompt:
    """Another prompt that leaves ``tokens`` somewhere; now and then at the last token of a block."""
    at = rng.randint(len(tokens) // 4, len(tokens))
    if rng.random() < 0.2:
        at = max(0, at // size * size - 1)
    return tokens[:at] + _tokens(rng, rng.randint(1, 5 * size))


def _crowd(rng: random.Random, tree: Tree, prompt: Prompt, ids: Sequence[int]) -> None:
    """Many siblings of the prompt's last block, about as many as end the search for a partial match."""
    before = prompt[: max(0, len(prompt) - 1) // tree.block_size * tree.block_size]
    for i in range(rng.randint(MAX_SIBLINGS - 3, MAX_SIBLINGS)):
        tree.store(before + (100 + i,) * tree.block_size, ids)


def _evict(rng: random.Random, tree: Tree, group: CacheGroup) -> None:
    """Stray holes, and a run of positions: as a window leaves it behind, or a tail that was dropped."""
    stray = rng.choice((0.0, 0.0, 0.0, 0.05, 0.2))
    gone = range(0)
    if rng.random() < 0.5:
        start = rng.randint(4, 12) if group.window_size is None else rng.choice((0, rng.randint(0, 8)))
        gone = range(start, start + rng.randint(1, 6))
    for position, node in tree.nodes():
        if position in gone or rng.random() < stray:
            node.pages.discard(group.group_id)
