"""The blocks of one window: its pages, and what the shared tree has of them. Each window is on its own."""

from __future__ import annotations

from collections.abc import Sequence

from ..api import DEVICE, HOST, PageMover
from ..spec import GroupSpec
from .events import EventLog
from .pool import WindowPool
from .tree import Node, Page, Tree, below


class Window:
    """One cache group of manager V1.

    :param index: of the group, in nodes and for ``mover``.
    :param contiguous: as the 1.2 line does it: what is reused, stored or kept is one run of blocks from the
        first, so that losing a block loses all below it. Only the block itself is announced as removed, and
        what hangs on it must be known to have gone with it.
    """

    def __init__(
        self, index: int, spec: GroupSpec, tree: Tree, log: EventLog, *, mover: PageMover, contiguous: bool
    ) -> None:
        self.index = index
        self.spec = spec
        self.contiguous = contiguous
        self.pool = WindowPool(spec.num_blocks, spec.host_blocks)
        self._tree = tree
        self._log = log
        self._mover = mover
        log.created(spec.group_id, spec.num_blocks, spec.host_blocks)

    def take(self) -> Page:
        """A device page for one sequence alone; what lies there moves to the host or is lost.

        :raises InvariantError: all pages are held.
        """
        page = self.pool.next(DEVICE)
        if page.used and self.pool.queues[HOST]:
            page = self._offload(page)
        if page.node is not None:
            self._lose(page)
        page.life += 1
        page.holders = 1
        return page

    def onboard(self, page: Page) -> None:
        """Bring a page that is held to the device, if it is on the host."""
        if page.slot.level == DEVICE:
            return
        spare = self.take()
        self._swap(page, spare)
        self._log.moved(self.spec.group_id, page, HOST)
        self.pool.release(spare)

    def can_take_over(self, page: Page, held: int) -> bool:
        """Whether a sequence may go on differently in a block's page.

        It may if no other one holds it and nothing hangs on the block.

        :param held: how often the sequence itself holds the page.
        """
        node = page.node
        assert node is not None, "only a block that can be reused has a beginning to reuse"
        if page.holders > held:
            return False
        if self.contiguous:
            return all(child.pages[self.index] is None for child in node.children.values())
        return not node.children

    def take_over(self, page: Page) -> None:
        """Let a sequence that holds a block's page go on in it: the block is gone, and no event says so."""
        self.onboard(page)
        node = page.node
        assert node is not None, "only a block that can be reused is taken over"
        self._forget(node)

    def copy(self, page: Page) -> Page:
        """A page for one sequence alone with what lies on ``page``."""
        waits_on_host = page.slot.level == HOST and not page.holders
        if waits_on_host:
            # Making room could cost it. (TensorRT-LLM does not see to that.)
            self.pool.hold(page)
        copy = self.take()
        # The page that waits longest may be that one: then its content is there already.
        if copy is not page:
            self._mover(self.index, page.slot, copy.slot)
        if waits_on_host:
            self.pool.release(page)
        return copy

    def copy_held(self, page: Page) -> Page:
        """The same of a page that the sequence holds, and lets go of with that."""
        if not self.pool.queues[DEVICE]:
            # No other page is left for it: the block moves to the host or is lost.
            self.pool.release(page)
            return self.copy(page)
        copy = self.copy(page)
        self.pool.release(page)
        return copy

    def store(self, path: Sequence[Node], own: Sequence[Page | None], named_until: int = 0) -> None:
        """Let blocks be reused that this window has no page of: from a sequence's own pages.

        Where neither the window nor the sequence has a page, a window that is not contiguous goes on behind
        the hole: the next block is then named as if it hung on the nearest one before that the window holds.

        :param path: nodes of the sequence's blocks, from the first.
        :param own: the sequence's page per block; None where it has none.
        :param named_until: blocks below this are named by their whole prefix, held or not.
        """
        stored: list[tuple[Node, Page]] = []
        parent: int | None = None
        for block, node in enumerate(path):
            page = own[block] if block < len(own) else None
            if node.pages[self.index] is None and page is not None and page.node is None:
                above = node.parent
                name = node.hash if above is None or above.hash == parent else node.name_below(parent)
                assert name is not None
                self.pool.attach(page, node, name)
                self._tree.attach(node, self.index, page)
                stored.append((node, page))
            present = node.pages[self.index]
            if present is not None:
                parent = present.hash
            elif self.contiguous:
                break
            elif block < named_until:
                parent = node.hash
        if stored:
            above = stored[0][0].parent
            before = above.pages[self.index] if above is not None else None
            self._log.stored(self.spec.group_id, before.hash if before is not None else None, stored)

    def _offload(self, page: Page) -> Page:
        """Move what lies on a page to the host; the page whose place on the device is free now."""
        spare = self.pool.next(HOST)
        self._swap(page, spare)
        if page.node is not None and self._is_announced(page.node):
            self._log.moved(self.spec.group_id, page, DEVICE)
        self.pool.wait(page)
        return spare

    def _swap(self, page: Page, spare: Page) -> None:
        """Let two pages change places, and what lies on ``page`` go with it if it may be reused yet."""
        # A contiguous sequence stores at its end what has slid out, wherever that lies then.
        if page.node is not None or self.contiguous:
            self._mover(self.index, page.slot, spare.slot)
        page.slot, spare.slot = spare.slot, page.slot

    def _is_announced(self, node: Node) -> bool:
        """Whether events say what becomes of a block: not of one whose predecessor the window has lost."""
        above = node.parent
        return above is None or above.parent is None or above.pages[self.index] is not None

    def _lose(self, page: Page) -> None:
        node = page.node
        assert node is not None, "only a block that could be reused is lost"
        if self._is_announced(node):
            self._log.removed(self.spec.group_id, page.hash)
        if self.contiguous:
            for lower in list(below(node, self.index)):
                self._forget(lower)
        self._forget(node)

    def _forget(self, node: Node) -> None:
        page = node.page_of(self.index)
        self.pool.detach(page)
        self._tree.detach(node, self.index)
