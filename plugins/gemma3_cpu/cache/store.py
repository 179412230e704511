"""Pools, token tree and events together: every step that keeps the three in agreement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .events import EventLog
from .pool import BlockPool
from .spec import GroupSpec
from .tree import NO_PAGE, Node, Tree, subtree


class BlockStore:
    """The blocks of all groups. Groups are addressed by their index in ``groups``."""

    def __init__(self, groups: Sequence[GroupSpec], block_size: int, log: EventLog, reuse: bool) -> None:
        self.groups = tuple(groups)
        self.block_size = block_size
        #: Whether blocks outlive the sequence that computed them.
        self.reuse = reuse
        self.pools = [BlockPool(group.num_blocks) for group in self.groups]
        self.tree = Tree(len(self.groups))
        self.log = log
        self._by_id = sorted(range(len(self.groups)), key=lambda g: self.groups[g].group_id)
        for g in self._by_id:
            log.created(self.groups[g].group_id, self.groups[g].num_blocks)

    def match(self, blocks: Sequence[tuple[int, ...]], cache_salt: str | None) -> list[Node]:
        """Nodes of the longest prefix of ``blocks`` from which every group can go on.

        A group that lacks a page which the next token would see shortens the prefix to the blocks before
        that page, for all groups; a shorter prefix needs other pages, so all are asked again.
        """
        path = self.tree.walk(cache_salt, blocks)
        settled = False
        while not settled:
            settled = True
            for g in range(len(self.groups)):
                while (missing := self._first_missing(path, g)) is not None:
                    del path[missing:]
                    settled = False
        return path

    def take(self, g: int, count: int) -> list[int]:
        """``count`` private pages; drops the oldest droppable blocks while too few are free.

        :raises InvariantError: more pages are held than admission should have let in.
        """
        pool = self.pools[g]
        while pool.lacks(count):
            self._evict(g, pool.oldest_droppable())
        return pool.take(count)

    def commit(self, parent: Node, tokens: tuple[int, ...], tables: Sequence[list[int]], block: int) -> Node:
        """Enter a computed block into the tree, with the page that each table has for it.

        Where its node already has a page, the table takes that one over and its own is freed.
        """
        node = self.tree.child(parent, tokens)
        for g in self._by_id:
            pool, own, present = self.pools[g], tables[g][block], node.pages[g]
            if present == NO_PAGE:
                node.pages[g] = own
                pool.commit(own, node)
                self.log.stored(self.groups[g].group_id, node)
            else:
                pool.hold(present)
                pool.release(own)
                tables[g][block] = present
        return node

    def _evict(self, g: int, page: int) -> None:
        node = self.pools[g].nodes[page]
        assert node is not None, "a droppable page belongs to a node"
        if self.groups[g].window_size is not None:
            self._drop(node, [g])
            self.tree.prune(node)
            return
        # Without its global page a block cannot be reused, and so nothing below it can.
        for below in subtree(node):
            self._drop(below, self._by_id)
        self.tree.unlink(node)

    def _drop(self, node: Node, groups: Iterable[int]) -> None:
        for g in groups:
            if node.pages[g] != NO_PAGE:
                self.pools[g].drop(node.pages[g])
                node.pages[g] = NO_PAGE
                self.log.removed(self.groups[g].group_id, node)

    def _first_missing(self, path: Sequence[Node], g: int) -> int | None:
        first = self.groups[g].stale_end(len(path) * self.block_size, self.block_size)
        return next((i for i in range(first, len(path)) if path[i].pages[g] == NO_PAGE), None)
