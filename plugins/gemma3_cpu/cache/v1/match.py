"""How much of a prompt can be resumed, by walking the tree as manager V1 does. Pure.

All tokens but the last are looked up. Each window says how far it can go, at most as far as those that were
asked before; the last one's word counts. Both rules may end inside a block, with the block that shares most
tokens with the prompt's. Nothing of a block is reused of which a window shares more than those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .tree import Node, Page, Tokens, Tree, best_part
from .window import Window


class Reused(NamedTuple):
    """What one window has of a prompt.

    :param tokens: how many of its leading tokens.
    :param pages: page per whole block; None where the window has a hole.
    :param part: where it ends inside a block: the page with that beginning.
    """

    tokens: int
    pages: list[Page | None]
    part: Page | None


def chop(tokens: Sequence[int], block_size: int) -> list[Tokens]:
    """Blocks of ``tokens``; the last may be partial."""
    return [tuple(tokens[i : i + block_size]) for i in range(0, len(tokens), block_size)]


class Matcher:
    """The reuse rule of one manager.

    :param partial: whether part of a block may be reused that goes on differently.
    """

    def __init__(self, tree: Tree, block_size: int, *, partial: bool) -> None:
        self._tree = tree
        self._block_size = block_size
        self._partial = partial

    def match(self, windows: Sequence[Window], prompt: Sequence[int], cache_salt: str | None) -> list[Reused]:
        """What of ``prompt`` each of ``windows``, asked in that order, has; each at most as much as the last.

        TensorRT-LLM asks each window once, so that of several sliding windows an earlier one may have a hole
        where the last one resumes. Here they are asked again then.
        """
        tokens = len(prompt) - 1
        while True:
            found: list[Reused] = []
            for window in windows:
                found.append(
                    self.in_window(window, prompt, cache_salt, found[-1].tokens if found else tokens)
                )
            tokens = found[-1].tokens
            if all(self._serves(*each, tokens) for each in zip(windows, found, strict=True)):
                return found

    def _serves(self, window: Window, reused: Reused, tokens: int) -> bool:
        """Whether a window has no hole from what the token at that position sees on."""
        return None not in reused.pages[window.spec.stale_end(tokens, self._block_size) :]

    def in_window(self, window: Window, prompt: Sequence[int], cache_salt: str | None, cap: int) -> Reused:
        """What one window has: all from the first block on, or if it slides the last window without a hole.

        :param cap: the most tokens that count.
        """
        node = self._tree.roots.get(cache_salt)
        if node is None:
            return Reused(0, [], None)
        size = window.spec.window_size
        pages: list[Page | None] = []
        length = safe = least = 0
        last: Page | None = None
        for key in chop(prompt[:-1], self._block_size):
            child = node.children.get(key)
            if child is None or (window.contiguous and child.pages[window.index] is None):
                part = self._part(window, node, key, cap - length)
                if part is not None and length + part[1] >= least:
                    return Reused(length + part[1], pages, part[0])
                break
            page = child.pages[window.index]
            if length + len(key) > cap or (page is None and size is None):
                break
            length += len(key)
            if page is None and size is not None:
                least = length + size
            if len(key) == self._block_size:
                pages.append(page)
            if length >= least:
                safe, last = length, page
            node = child
        whole, inside = divmod(safe, self._block_size)
        return Reused(safe, pages[:whole], last if inside else None)

    def _part(self, window: Window, above: Node, key: Tokens, most: int) -> tuple[Page, int] | None:
        """The page of a block below ``above`` that shares most leading tokens with ``key``, and how many."""
        if not self._partial:
            return None
        best = best_part(above, key, window.index)
        return best if best is not None and best[1] <= most else None
