"""The token tree: one node per block of prompt tokens, shared by all cache groups.

A node is found by its tokens below its parent, and prompts with different cache salts share no root.
Hashes play no part in finding a block: they only name it in events. A block that is not full has no
children, and no sibling begins with its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..api import DEVICE, Slot
from ..hashing import block_key, salt_id

#: A node with as many children is not searched for one that begins like a prompt goes on.
MAX_SEARCHED_CHILDREN = 32

Tokens = tuple[int, ...]


class Page:
    """Room for one block's keys and values in one cache group.

    :ivar group: index of the group.
    :ivar level: where it lies now; pages that an open sequence holds lie on the device.
    :ivar number: of the page among those of its pool on that level.
    :ivar node: the block whose content it is, while that block is in the tree; None for a private page.
    :ivar holders: sequences that need it.
    :ivar queued: it waits in its pool to be evicted.
    """

    __slots__ = ("group", "holders", "level", "node", "number", "queued")

    def __init__(self, group: int, number: int) -> None:
        self.group = group
        self.level = DEVICE
        self.number = number
        self.node: Node | None = None
        self.holders = 1
        self.queued = False

    @property
    def slot(self) -> Slot:
        return Slot(self.level, self.number)


class Node:
    """One block behind one prefix; the root of a salt has no tokens.

    :ivar pages: page per cache group, or None.
    :ivar hash: name in events; None for a root.
    :ivar attached: it is in the tree.
    :ivar short_children: how many of its children are not full.
    """

    __slots__ = ("attached", "cache_salt", "children", "hash", "pages", "parent", "short_children", "tokens")

    def __init__(self, parent: Node | None, tokens: Tokens, num_groups: int, cache_salt: str | None) -> None:
        self.parent = parent
        self.tokens = tokens
        self.cache_salt = cache_salt
        self.pages: list[Page | None] = [None] * num_groups
        self.children: dict[Tokens, Node] = {}
        self.attached = True
        self.short_children = 0
        self.hash: int | None = None
        if parent is not None:
            salt = salt_id(cache_salt) if cache_salt is not None and parent.parent is None else None
            self.hash = block_key(tokens, parent.hash, salt)

    @property
    def parent_hash(self) -> int | None:
        return None if self.parent is None else self.parent.hash


class Tree:
    """All nodes, by cache salt."""

    def __init__(self, num_groups: int, block_size: int) -> None:
        self._num_groups = num_groups
        self._block_size = block_size
        self.roots: dict[str | None, Node] = {}

    def root(self, cache_salt: str | None) -> Node:
        """The root of that salt, made on first use."""
        if cache_salt not in self.roots:
            self.roots[cache_salt] = Node(None, (), self._num_groups, cache_salt)
        return self.roots[cache_salt]

    def walk(self, prompt: Tokens, cache_salt: str | None, partial: bool) -> tuple[list[Node], int]:
        """Nodes of the longest known prefix of ``prompt``, and its tokens. Pages are not looked at.

        :param partial: whether it may end inside a block of the tree.
        """
        path: list[Node] = []
        matched = 0
        node = self.roots.get(cache_salt)
        while node is not None and matched < len(prompt):
            block = prompt[matched : matched + self._block_size]
            child = node.children.get(block)
            if child is None:
                child, shared = _longest_beginning(node, block) if partial else (None, 0)
                matched += shared
                if child is not None:
                    path.append(child)
                break
            path.append(child)
            matched += len(block)
            node = child
        return path, matched

    def covers(self, parent: Node, tokens: Tokens) -> bool:
        """Whether a block below ``parent`` begins with ``tokens``, which are fewer than a block."""
        count = len(tokens)
        return any(child.tokens[:count] == tokens for child in parent.children.values())

    def add(self, parent: Node, tokens: Tokens) -> tuple[Node, Node | None]:
        """A new node, and the shorter sibling that it covers, if any; the caller detaches that one."""
        covered = _covered_child(parent, tokens) if parent.short_children else None
        parent.short_children += len(tokens) < self._block_size
        node = parent.children[tokens] = Node(parent, tokens, self._num_groups, parent.cache_salt)
        return node, covered

    def detach(self, node: Node) -> None:
        """Cut one node without children off its parent."""
        parent = node.parent
        assert parent is not None and not node.children
        del parent.children[node.tokens]
        parent.short_children -= len(node.tokens) < self._block_size
        node.attached = False
        if parent.parent is None and not parent.children:
            self.roots.pop(parent.cache_salt, None)
            parent.attached = False


def leaves_first(node: Node) -> list[Node]:
    """``node`` and all below it: each after its children, those in the order in which they came."""
    stack, order = [node], []
    while stack:
        last = stack.pop()
        order.append(last)
        stack.extend(last.children.values())
    return order[::-1]


def all_nodes(tree: Tree) -> Iterator[Node]:
    """Every node that has tokens."""
    for root in tree.roots.values():
        yield from leaves_first(root)[:-1]


def _covered_child(parent: Node, tokens: Tokens) -> Node | None:
    for child in parent.children.values():
        if len(child.tokens) < len(tokens) and tokens[: len(child.tokens)] == child.tokens:
            return child
    return None


def _longest_beginning(node: Node, tokens: Sequence[int]) -> tuple[Node | None, int]:
    """The child that shares most tokens from its start with ``tokens``, the first such; and how many."""
    best, most = None, 0
    if len(node.children) >= MAX_SEARCHED_CHILDREN:
        return None, 0
    for child in node.children.values():
        if child.tokens[: most + 1] == tokens[: most + 1]:
            best, most = child, _common(child.tokens, tokens)
    return best, most


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
