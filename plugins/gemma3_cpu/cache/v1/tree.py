"""The token tree of manager V1: one for all windows, with a page per window in each node. Pure.

Nodes are found by their tokens, so a prefix can be followed through blocks of which a window has no page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from ..api import Slot
from ..hashing import block_key, salt_id
from .order import TableOrder

Tokens: TypeAlias = tuple[int, ...]


class Page:
    """Keys and values of one block, wherever they lie.

    :ivar slot: where; changes when the content moves between levels.
    :ivar node: the block that can be reused from here; None while it belongs to a sequence or is free.
    :ivar hash: the name under which ``node`` was announced in this window.
    :ivar holders: sequences that hold it.
    :ivar life: counts how often it was taken for new content.
    :ivar used: whether it ever was a block of a prompt, or could be reused. Then the engine takes what lies
        here for something that is worth a place on the host, even if nothing can be reused from it.
    """

    __slots__ = ("hash", "holders", "life", "node", "slot", "used")

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.node: Node | None = None
        self.hash: int | None = None
        self.holders = 0
        self.life = 0
        self.used = False


class Node:
    """One block behind one prefix, full or partial; the root of a salt has no tokens.

    :ivar pages: page per window, by its index, or None.
    :ivar hash: name of the block behind its whole prefix; None for a root.
    :ivar orders: of the children, as the engine goes through them: one for all windows, or one for each.
    """

    def __init__(
        self, parent: Node | None, tokens: Tokens, num_windows: int, num_orders: int, cache_salt: str | None
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.cache_salt = cache_salt
        self.pages: list[Page | None] = [None] * num_windows
        self.children: dict[Tokens, Node] = {}
        self.orders = [TableOrder() for _ in range(num_orders)]
        self.hash: int | None = None if parent is None else self.name_below(parent.hash)

    def page_of(self, window: int) -> Page:
        """The page of that window, where it is known that there is one."""
        page = self.pages[window]
        assert page is not None, f"window {window} has no page of a block that it is to hold"
        return page

    def order_of(self, window: int) -> TableOrder:
        """The order in which the engine goes through the children for that window."""
        return self.orders[window if len(self.orders) > 1 else 0]

    def name_below(self, parent_hash: int | None) -> int:
        """Hash of this block's tokens behind the block of that hash; None: as if it began a prompt."""
        salted = self.cache_salt is not None and parent_hash is None
        return block_key(self.tokens, parent_hash, salt_id(self.cache_salt or "") if salted else None)


class Tree:
    """All nodes, by cache salt.

    :param apart: each window has a tree of its own in the engine, so that its children have their own order.
    """

    def __init__(self, num_windows: int, *, apart: bool) -> None:
        self._num_windows = num_windows
        self._apart = apart
        self.roots: dict[str | None, Node] = {}

    def insert(self, cache_salt: str | None, keys: Sequence[Tokens]) -> list[Node]:
        """Nodes of all ``keys``, made where there are none. Those left without a page must be pruned."""
        if not keys:
            return []
        node = self.roots.get(cache_salt)
        if node is None:
            node = self.roots[cache_salt] = self._node(None, (), cache_salt)
        path: list[Node] = []
        for key in keys:
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = self._node(node, key, cache_salt)
                if not self._apart:
                    node.orders[0].add(key)
            path.append(child)
            node = child
        return path

    def prune(self, node: Node) -> None:
        """Remove ``node`` if nothing hangs on it, then its parent if that became so, and so on."""
        while not node.children and not any(node.pages):
            above = node.parent
            if above is None:
                self.roots.pop(node.cache_salt, None)
                return
            if above.children.pop(node.tokens, None) is None:
                return
            if not self._apart:
                above.orders[0].remove(node.tokens)
            node = above

    def attach(self, node: Node, window: int, page: Page) -> None:
        """From now on that window has ``node``."""
        node.pages[window] = page
        if self._apart and node.parent is not None:
            node.parent.orders[window].add(node.tokens)

    def detach(self, node: Node, window: int) -> None:
        """That window has lost ``node``."""
        node.pages[window] = None
        if self._apart and node.parent is not None:
            node.parent.orders[window].remove(node.tokens)
        self.prune(node)

    def _node(self, parent: Node | None, tokens: Tokens, cache_salt: str | None) -> Node:
        return Node(parent, tokens, self._num_windows, self._num_windows if self._apart else 1, cache_salt)


def best_part(node: Node, key: Sequence[int], window: int) -> tuple[Page, int] | None:
    """The page of that window, among the children of ``node``, which shares most leading tokens with ``key``.

    Of equals the one that the engine comes to first. Its own tokens may be as long as ``key``, or longer.

    :returns: the page and how many tokens it shares; None if none shares any.
    """
    best: tuple[Page, int] | None = None
    shared = 0
    for tokens in node.order_of(window):
        page = node.children[tokens].pages[window]
        if page is None or tokens[0] != key[0]:
            continue
        common = _common_prefix(tokens, key)
        if common > shared:
            best, shared = (page, common), common
    return best


def below(node: Node, window: int) -> Iterator[Node]:
    """Nodes below ``node`` that can be reached through pages of that window, children first."""
    parents_first: list[Node] = []
    todo = [node]
    while todo:
        current = todo.pop()
        children = [child for child in current.children.values() if child.pages[window] is not None]
        parents_first += children
        todo += children
    return reversed(parents_first)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)
