"""The token tree: one node per full block of prompt tokens, shared by all cache groups. Pure.

A node is found by its tokens below its parent, and prompts with different cache salts share no root.
Hashes play no part in finding a block: they only name it in events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .hashing import block_key, salt_id

#: In :attr:`Node.pages` and in block tables: no page.
NO_PAGE = -1


class Node:
    """One full block behind one prefix; the root of a salt has no tokens.

    :ivar pages: page per cache group, or :data:`NO_PAGE`.
    :ivar hash: name in events; None for a root.
    :ivar pins: open sequences whose last committed block this is.
    """

    __slots__ = ("cache_salt", "children", "hash", "pages", "parent", "pins", "tokens")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], num_groups: int, cache_salt: str | None):
        self.parent = parent
        self.tokens = tokens
        self.cache_salt = cache_salt
        self.pages = [NO_PAGE] * num_groups
        self.children: dict[tuple[int, ...], Node] = {}
        self.pins = 0
        self.hash: int | None = None
        if parent is not None:
            salt = salt_id(cache_salt) if cache_salt is not None and parent.parent is None else None
            self.hash = block_key(tokens, parent.hash, salt)

    @property
    def is_empty_tail(self) -> bool:
        """Nothing hangs on it: no child, no open sequence, no page in any group."""
        return not self.children and not self.pins and all(page == NO_PAGE for page in self.pages)


class Tree:
    """All nodes, by cache salt."""

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self.roots: dict[str | None, Node] = {}

    def root(self, cache_salt: str | None) -> Node:
        """The root of that salt, made on first use."""
        if cache_salt not in self.roots:
            self.roots[cache_salt] = Node(None, (), self._num_groups, cache_salt)
        return self.roots[cache_salt]

    def walk(self, cache_salt: str | None, blocks: Sequence[tuple[int, ...]]) -> list[Node]:
        """Nodes of the longest prefix of ``blocks`` that the tree knows; their pages are not looked at."""
        path: list[Node] = []
        node = self.roots.get(cache_salt)
        for tokens in blocks:
            node = node.children.get(tokens) if node is not None else None
            if node is None:
                break
            path.append(node)
        return path

    def child(self, parent: Node, tokens: tuple[int, ...]) -> Node:
        """The node of ``tokens`` below ``parent``, made where there is none."""
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = Node(parent, tokens, self._num_groups, parent.cache_salt)
        return node

    def unlink(self, node: Node) -> None:
        """Cut a node, and all below it, off its parent."""
        if node.parent is not None:
            del node.parent.children[node.tokens]
            self.prune(node.parent)

    def prune(self, node: Node) -> None:
        """Remove ``node`` if it is an empty tail, then its parent if that became one, and so on."""
        while node.is_empty_tail:
            if node.parent is None:
                self.roots.pop(node.cache_salt, None)
                return
            del node.parent.children[node.tokens]
            node = node.parent


def subtree(node: Node) -> Iterator[Node]:
    """``node`` and all nodes below it, children first. Chains are thousands deep: no recursion."""
    parents_first: list[Node] = []
    open_nodes = [node]
    while open_nodes:
        current = open_nodes.pop()
        parents_first.append(current)
        open_nodes.extend(current.children.values())
    return reversed(parents_first)
