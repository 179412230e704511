"""What engines reuse, walked token by token over a tree of blocks with pages per cache group. Pure.

The brute force that reuse rules are compared with. Each walk goes as its engine's own matching does: the
blocks first, then their pages, parts of blocks included. No walk uses a reuse rule or a hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout

__all__ = [
    "WALKS",
    "BlockTree",
    "Tokens",
    "TreeBlock",
    "Walk",
    "trtllm_v1_one_pass",
    "walk_trtllm_v1",
    "walk_trtllm_v1_contiguous",
    "walk_trtllm_v2",
    "walk_vllm",
]

#: TensorRT-LLM does not look for a partial match where a block has this many children or more.
MAX_SIBLINGS = 32

#: Token ids: of a prompt, or of one block.
Tokens: TypeAlias = tuple[int, ...]


@dataclass(eq=False)
class TreeBlock:
    """A block in the tree.

    :ivar tokens: the block's own tokens; fewer than the block size in a partial block, which has no children.
    :ivar children: the blocks that follow it, in the order in which they were stored.
    :ivar pages: ids of the cache groups that hold a page of it.
    """

    tokens: Tokens
    children: list[TreeBlock] = field(default_factory=list)
    pages: set[int] = field(default_factory=set)

    def exact_child(self, tokens: Tokens) -> TreeBlock | None:
        """The child of exactly these tokens, or None."""
        return next((child for child in self.children if child.tokens == tokens), None)


class BlockTree:
    """All blocks that an engine knows, full and partial.

    :param block_size: tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.root = TreeBlock(())

    def store(self, tokens: Tokens, groups: Sequence[int]) -> None:
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
                child = TreeBlock(key)
                node.children.append(child)
            child.pages.update(groups)
            node = child

    def keys(self, tokens: Tokens) -> Iterator[Tokens]:
        """``tokens`` cut into blocks; the last may be partial."""
        for at in range(0, len(tokens), self.block_size):
            yield tokens[at : at + self.block_size]

    def own_blocks(self, prompt: Tokens) -> list[TreeBlock]:
        """The prompt's full blocks, as far as they are in the tree: what hashes can find."""
        own: list[TreeBlock] = []
        node = self.root
        for key in self.keys(prompt[: len(prompt) // self.block_size * self.block_size]):
            child = node.exact_child(key)
            if child is None:
                break
            own.append(child)
            node = child
        return own

    def blocks(self) -> list[tuple[int, TreeBlock]]:
        """All blocks with their positions, those of the lowest position first."""
        listed: list[tuple[int, TreeBlock]] = []
        todo = [(0, child) for child in self.root.children]
        while todo:
            position, node = todo.pop(0)
            listed.append((position, node))
            todo += [(position + 1, child) for child in node.children]
        return listed


class Walk(NamedTuple):
    """The result of a walk.

    :param tokens: reused tokens.
    :param ends_in: the block in which they end, or whose edge they reach; None: no reuse, or not known.
    :param matched: the last block that was matched before pages were looked at; None: none, or not known.
    """

    tokens: int
    ends_in: TreeBlock | None
    matched: TreeBlock | None


def _common_prefix(a: Tokens, b: Tokens) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _best_part(children: Sequence[TreeBlock], key: Tokens) -> tuple[TreeBlock, int] | None:
    """The child that shares most leading tokens; of equals the one inserted first."""
    best: tuple[TreeBlock, int] | None = None
    for child in children:
        shared = _common_prefix(child.tokens, key)
        if shared > (best[1] if best else 0):
            best = (child, shared)
    return best


# -- TensorRT-LLM V2 -------------------------------------------------------------------------------


def walk_trtllm_v2(layout: CacheLayout, tree: BlockTree, prompt: Tokens, partial_reuse: bool) -> Walk:
    """What TensorRT-LLM's KV cache manager V2 reuses: it matches blocks first and then looks at their pages.

    It starts again at the shorter length whenever a page is missing.

    :param partial_reuse: whether the engine reuses a part of a block.
    """
    size = tree.block_size
    path: list[tuple[TreeBlock, int]] = []
    node = tree.root
    for key in tree.keys(prompt[:-1]):
        child = node.exact_child(key)
        if child is None:
            if partial_reuse and len(node.children) < MAX_SIBLINGS:
                part = _best_part(node.children, key)
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


def _first_missing_page(layout: CacheLayout, path: list[tuple[TreeBlock, int]], length: int) -> int | None:
    for group in layout.groups:
        # The token at `length` sees itself and the window - 1 tokens before it.
        oldest = 0 if group.window_size is None else max(0, length - group.window_size + 1)
        for i, (node, _) in enumerate(path):
            if (i + 1) * group.block_size > oldest and group.group_id not in node.pages:
                return i
    return None


# -- TensorRT-LLM V1 -------------------------------------------------------------------------------


def walk_trtllm_v1(layout: CacheLayout, tree: BlockTree, prompt: Tokens, partial_reuse: bool) -> Walk:
    """What TensorRT-LLM's KV cache manager V1 reuses, once all windows agree.

    It takes the windows one after the other, global ones first, each capped by those before. This walk
    repeats that until no window shortens the result; :func:`trtllm_v1_one_pass` is what the engine does.
    """
    cap = max(0, len(prompt) - 1)
    while (once := trtllm_v1_one_pass(layout, tree, prompt, partial_reuse, cap)) < cap:
        cap = once
    return Walk(cap, None, None)


def trtllm_v1_one_pass(
    layout: CacheLayout, tree: BlockTree, prompt: Tokens, partial_reuse: bool, cap: int | None = None
) -> int:
    """The tokens that V1 itself reuses: the windows that come later do not bind those before them.

    :param cap: the most that is looked at, in tokens; None: all tokens of the prompt but the last.
    """
    length = max(0, len(prompt) - 1) if cap is None else cap
    for group in sorted(layout.groups, key=lambda group: group.window_size is not None):
        length = min(length, _committed_v1(group, tree, prompt[:-1], partial_reuse, length))
    return length


def _committed_v1(group: CacheGroup, tree: BlockTree, lookup: Tokens, partial_reuse: bool, cap: int) -> int:
    committed = length = 0
    missing_end: int | None = None
    node = tree.root
    for key in tree.keys(lookup):
        if length >= cap:
            break
        child = node.exact_child(key)
        if child is None:
            with_page = [c for c in node.children if group.group_id in c.pages]
            part = _best_part(with_page, key) if partial_reuse else None
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


def walk_trtllm_v1_contiguous(
    layout: CacheLayout, tree: BlockTree, prompt: Tokens, partial_reuse: bool
) -> Walk:
    """What V1 of the 1.2 line reuses: windows in ascending order, each needs all blocks from 0 on."""
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
            part = _best_part(with_page, key) if partial_reuse else None
            length += part[1] if part else 0
            break
        cap = min(cap, length)
    return Walk(cap, None, None)


# -- vLLM ------------------------------------------------------------------------------------------


def walk_vllm(layout: CacheLayout, tree: BlockTree, prompt: Tokens, partial_reuse: bool = False) -> Walk:
    """What vLLM reuses: the most whole blocks of which every token that the next one can see is held.

    :param partial_reuse: has no effect; vLLM reuses whole blocks only.
    """
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


#: The walk of each built-in reuse rule, by the rule's name: over full and sliding groups of one block size.
WALKS: dict[str, Callable[[CacheLayout, BlockTree, Tokens, bool], Walk]] = {
    "trtllm_v2": walk_trtllm_v2,
    "trtllm_v1": walk_trtllm_v1,
    "trtllm_v1_contiguous": walk_trtllm_v1_contiguous,
    "vllm": walk_vllm,
    "vllm_hybrid": walk_vllm,
}
