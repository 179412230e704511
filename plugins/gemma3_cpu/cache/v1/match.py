"""How much of a prompt can be resumed, by walking the tree as manager V1 does. Pure. Read, not run.

All tokens but the last are looked up. Each window says how far it can go; the least of them counts. Both
rules may end inside a block, with the block of any window that shares most tokens with the prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .tree import Node, Page, Tokens, Tree, best_part
from .window import Window


class Match(NamedTuple):
    """What can be reused of one prompt.

    :param tokens: less than the prompt; may end inside a block.
    :param path: nodes of the whole blocks.
    :param parts: where it ends inside a block: the page of that block's beginning, per window by its index.
    """

    tokens: int
    path: list[Node]
    parts: list[Page]


def chop(tokens: Sequence[int], block_size: int) -> list[Tokens]:
    """Blocks of ``tokens``; the last may be partial."""
    return [tuple(tokens[i : i + block_size]) for i in range(0, len(tokens), block_size)]


class Matcher:
    """The reuse rule of one manager.

    :param windows: in the order in which they are asked.
    :param partial: whether part of a block may be reused that goes on differently.
    """

    def __init__(self, tree: Tree, windows: Sequence[Window], block_size: int, *, partial: bool) -> None:
        self._tree = tree
        self._windows = windows
        self._block_size = block_size
        self._partial = partial

    def match(self, prompt: Sequence[int], cache_salt: str | None) -> Match:
        """What of ``prompt`` every window can serve.

        TensorRT-LLM asks each window once, so that of several sliding windows an earlier one may be asked to
        resume where it has a hole. Here they are asked until all agree.
        """
        keys = chop(prompt[:-1], self._block_size)
        root = self._tree.roots.get(cache_salt)
        if root is None:
            return Match(0, [], [])
        tokens = self._agreed(root, self._tree.walk(cache_salt, keys), keys)
        whole, part = divmod(tokens, self._block_size)
        path = self._tree.walk(cache_salt, keys[:whole])
        if not part:
            return Match(tokens, path, [])
        above = path[-1] if path else root
        parts = [best_part(above, keys[whole], g) for g in range(len(self._windows))]
        assert all(best is not None and best[1] >= part for best in parts), "a window has no such part"
        return Match(tokens, path, [best[0] for best in parts if best is not None])

    def _agreed(self, root: Node, path: list[Node], keys: list[Tokens]) -> int:
        tokens = sum(map(len, keys))
        while True:
            cap = tokens
            for window in self._windows:
                length = self._contiguous_length if window.contiguous else self._safe_length
                tokens = length(window, root, path[: -(-tokens // self._block_size)], keys, tokens)
            if tokens == cap:
                return tokens

    def _safe_length(self, window: Window, root: Node, path: list[Node], keys: list[Tokens], cap: int) -> int:
        """Tokens up to which this window holds all, or if it slides all of the last window without a hole."""
        safe = length = hole_end = 0
        size = window.spec.window_size
        for node in path:
            length += len(node.tokens)
            if node.pages[window.index] is None:
                if size is None:
                    return safe
                hole_end = length
            if not hole_end or length >= hole_end + (size or 0):
                safe = length
        length += self._part(window, path[-1] if path else root, keys, len(path), cap - length)
        return length if not hole_end or length >= hole_end + (size or 0) else safe

    def _contiguous_length(
        self, window: Window, root: Node, path: list[Node], keys: list[Tokens], cap: int
    ) -> int:
        """Tokens from the first on that this window holds, however little of them attention reads."""
        length, above = 0, root
        for block, node in enumerate(path):
            if node.pages[window.index] is None:
                return length + self._part(window, above, keys, block, cap - length)
            length += len(node.tokens)
            above = node
        return min(cap, length + self._part(window, above, keys, len(path), cap - length))

    def _part(self, window: Window, above: Node, keys: list[Tokens], block: int, most: int) -> int:
        """Leading tokens of a block that some child of ``above`` shares, at most so many.

        TensorRT-LLM reuses nothing of a block of which a window shares more than those before it could use.
        """
        if not self._partial or most <= 0 or block == len(keys):
            return 0
        best = best_part(above, keys[block], window.index)
        return min(most, best[1]) if best is not None else 0
