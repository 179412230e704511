"""Pools, token tree and events together: every step that keeps the three in agreement.

Groups are addressed by their index; ``order`` lists the indexes by group id, the order of everything that
shows outside. A page that is being evicted is neither queued nor free: its block may go meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..api import DEVICE, HOST, PageMover, Slot
from ..spec import GroupSpec
from .events import EventLog
from .pool import PagePool, pool_of_groups
from .tree import Node, Page, Tokens, Tree, leaves_first


class BlockStore:
    """The blocks of all groups.

    :param reuse: whether blocks outlive the sequence that computed them.
    """

    def __init__(
        self, groups: Sequence[GroupSpec], block_size: int, log: EventLog, reuse: bool, mover: PageMover
    ) -> None:
        self.groups = tuple(groups)
        self.block_size = block_size
        self.reuse = reuse
        self.log = log
        self.tree = Tree(len(self.groups), block_size)
        self.order = sorted(range(len(self.groups)), key=lambda g: self.groups[g].group_id)
        self.pool_of = pool_of_groups(self.groups)
        self.device = self._pools([group.num_blocks for group in self.groups])
        self.has_host = any(group.host_blocks for group in self.groups)
        self.host = self._pools([group.host_blocks for group in self.groups])
        self._levels = (self.device, self.host)
        self._mover = mover
        self._sliding = [g for g in self.order if self.groups[g].window_size is not None]

    def _pools(self, num_blocks: Sequence[int]) -> list[PagePool]:
        pools = [0] * (max(self.pool_of) + 1)
        for g, count in enumerate(num_blocks):
            pools[self.pool_of[g]] += count
        return [PagePool(count, len(self.groups)) for count in pools]

    def pool(self, page: Page) -> PagePool:
        return self._levels[page.level][self.pool_of[page.group]]

    # Matching

    def match(self, prompt: Tokens, cache_salt: str | None, partial: bool) -> tuple[list[Node], int]:
        """Path of the longest prefix of ``prompt`` from which every group can go on, and its tokens.

        The last token of a prompt is always computed: its logits are what the request is for.
        """
        path, matched = self.tree.walk(prompt[:-1], cache_salt, partial)
        return self.settle(path, matched)

    def settle(self, path: list[Node], matched: int) -> tuple[list[Node], int]:
        """Shorten a path until each sliding group holds all that the next token would see.

        Global groups are not asked: a block that loses a global page leaves the tree.
        """
        settled = False
        while not settled:
            settled = True
            for g in self._sliding:
                first = self.groups[g].stale_end(matched, self.block_size)
                missing = next((i for i in range(first, len(path)) if path[i].pages[g] is None), None)
                if missing is not None:
                    del path[missing:]
                    matched = missing * self.block_size
                    settled = False
        return path, matched

    def reuse_path(self, path: Sequence[Node], matched: int) -> list[list[Page | None]]:
        """Hold what a sequence that goes on at ``matched`` needs; per group, block by block.

        Pages on the host come to the device. The last block is a private copy where it ends inside one.
        """
        held: list[list[Page | None]] = [[] for _ in self.groups]
        needed: list[Page] = []
        for g in self.order:
            first = self.groups[g].stale_end(matched, self.block_size)
            held[g] += [None] * first
            held[g] += [node.pages[g] for node in path[first:]]
            needed += [page for page in held[g] if page is not None]
        for page in needed:
            self._hold(page)
        copies = self.take([1] * len(self.groups)) if matched % self.block_size else None
        self._lock(needed)
        if copies is not None:
            sources = [held[g][-1] for g in self.order]
            for g, source in zip(self.order, sources, strict=True):
                assert source is not None, "the last block of a path is never stale"
                held[g][-1] = copies[g][0]
                self._mover(g, source.slot, copies[g][0].slot)
            for source in sources:
                assert source is not None
                self.release(source)
        return held

    # Pages

    def take(self, counts: Sequence[int]) -> list[list[Page]]:
        """Private pages on the device, so many per group; evicts others where too few are free."""
        goals = [0] * len(self.device)
        for g, count in enumerate(counts):
            goals[self.pool_of[g]] += count
        self._make_room(goals)
        return [
            [Page(g, self.device[self.pool_of[g]].take(g)) for _ in range(count)]
            for g, count in enumerate(counts)
        ]

    def release(self, page: Page) -> None:
        """One holder less. The last one leaves a page of a block droppable, and frees a private one."""
        page.holders -= 1
        if page.holders:
            return
        if page.node is None:
            self.pool(page).give_back(page)
        elif not page.queued:
            self.pool(page).push(page)

    def _hold(self, page: Page) -> None:
        page.holders += 1
        # What is held may still move to a lower level, until it is locked; from the last it can only be lost.
        if page.queued and (page.level == HOST or not self.has_host):
            self.pool(page).remove(page)

    def _lock(self, pages: Sequence[Page]) -> None:
        """Bring held pages to the device, to stay there while they are held."""
        goals = [0] * len(self.device)
        coming: dict[int, list[Page]] = {}
        for page in pages:
            if page.queued:
                self.pool(page).remove(page)
            if page.level == HOST:
                coming.setdefault(self.pool_of[page.group], []).append(page)
        for p, onboarded in coming.items():
            goals[p] = len(onboarded)
        if coming:
            self._make_room(goals)
        for onboarded in coming.values():
            for page in onboarded:
                self._move(page, DEVICE)

    # Blocks

    def commit_new(self, parent: Node, tokens: Tokens, own: Sequence[Page | None]) -> Node:
        """Enter a computed block that the tree does not know, with the page that each group has for it."""
        node, covered = self.tree.add(parent, tokens)
        if covered is not None:
            self._detach(covered)
        for page in own:
            if page is not None:
                node.pages[page.group] = page
                page.node = node
        self.log.stored(node, [g for g in self.order if own[g] is not None])
        return node

    def commit_known(self, node: Node, own: Sequence[Page | None]) -> list[Page | None]:
        """A block was computed that the tree has already: its pages are used, and those it lacks given.

        :returns: page per group; those of ``own`` that are not among them are free.
        """
        used = list(own)
        needed: list[Page] = []
        for g in self.order:
            page, present = own[g], node.pages[g]
            if page is None:
                continue
            if present is None:
                node.pages[g] = page
                page.node = node
                self.log.stored(node, [g])
            else:
                used[g] = present
                needed.append(present)
        spare = [page for page in own if page is not None and page.node is None]
        self._swap_in(needed, spare)
        return used

    def _swap_in(self, needed: Sequence[Page], spare: Sequence[Page]) -> None:
        """Hold the pages of a known block, then free a sequence's own copies."""
        for page in needed:
            self._hold(page)
            if page.queued:
                self.pool(page).remove(page)
        coming = Counter(self.pool_of[page.group] for page in needed if page.level == HOST)
        tight = any(len(self.device[p].free) + len(self.device[p].queue) < n for p, n in coming.items())
        # With nothing to evict for pages that come from the host, the copies have to make room for them.
        first, last = (spare, ()) if tight else ((), spare)
        for page in first:
            self.release(page)
        self._lock(needed)
        for page in last:
            self.release(page)

    def _detach(self, node: Node) -> None:
        """Cut a node without children off: ``removed`` in each group where it has a page."""
        self.tree.detach(node)
        for g in self.order:
            page = node.pages[g]
            if page is None:
                continue
            self.log.removed(node, g)
            node.pages[g] = None
            page.node = None
            if page.queued and not page.holders:
                pool = self.pool(page)
                pool.remove(page)
                pool.give_back(page)

    def _lose(self, page: Page) -> None:
        """The last copy of a page goes."""
        node = page.node
        if node is not None:
            if self.groups[page.group].window_size is None:
                # Without its global page a block cannot be reused, and so nothing below it can.
                for below in leaves_first(node):
                    self._detach(below)
            else:
                self._lose_sliding(node, page.group)
        page.node = None
        self.pool(page).give_back(page)

    def _lose_sliding(self, node: Node, g: int) -> None:
        node.pages[g] = None
        self.log.removed(node, g)
        while node.parent is not None and node.attached and not node.children and not any(node.pages):
            self._detach(node)
            node = node.parent

    # Eviction

    def _make_room(self, goals: Sequence[int]) -> None:
        """Evict until each device pool has as many free pages, all pools' victims chosen before one goes."""
        victims: list[list[Page]] = []
        for p, goal in enumerate(goals):
            pool = self.device[p]
            lacking = goal - len(pool.free)
            host_room = len(self.host[p].free) + len(self.host[p].queue)
            victims.append(pool.pop(lacking, host_room) if lacking > 0 else [])
        if not any(victims):
            return
        if self.has_host:
            self._offload(victims)
            return
        for pages in victims:
            for page in reversed(pages):
                self._lose(page)

    def _offload(self, victims: Sequence[list[Page]]) -> None:
        """Move device victims to the host, which evicts others for them; what has no room there is lost."""
        evicted = [
            pool.pop(len(pages) - len(pool.free), 0) for pool, pages in zip(self.host, victims, strict=True)
        ]
        moving: list[list[Page]] = []
        for pool, pages, losing in zip(self.host, victims, evicted, strict=True):
            for page in reversed(losing):
                self._lose(page)
            # Held pages must not be lost, so they come last, where there is room.
            pages = [page for page in pages if not page.holders] + [page for page in pages if page.holders]
            lost = max(0, len(pages) - len(pool.free))
            for page in reversed(pages[:lost]):
                self._lose(page)
            moving.append(pages[lost:])
        for pages in moving:
            for page in pages:
                self._move(page, HOST)
                if not page.holders:
                    self.pool(page).push(page)

    def _move(self, page: Page, level: int) -> None:
        source, pool = page.slot, self.pool(page)
        target = Slot(level, self._levels[level][self.pool_of[page.group]].take(page.group))
        self._mover(page.group, source, target)
        pool.give_back(page)
        page.level, page.number = target
        if page.node is not None:
            self.log.updated(page.node, page.group, source.level, target.level)
