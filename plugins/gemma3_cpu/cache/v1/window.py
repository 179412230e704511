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
        what hangs on it must be known to have gone with it. Read, not run.
    """

    def __init__(
        self, index: int, spec: GroupSpec, tree: Tree, log: EventLog, *, mover: PageMover, contiguous: bool
    ) -> None:
        self.index = index
        self.spec = spec
        self.contiguous = contiguous
        self.pool = WindowPool(spec.num_blocks, spec.host_blocks)
        #: What events announced: name -> page.
        self.named: dict[int, Page] = {}
        self._tree = tree
        self._log = log
        self._mover = mover
        log.created(spec.group_id, spec.num_blocks, spec.host_blocks)

    def take(self) -> Page:
        """A device page for one sequence alone; what could be reused from it moves to the host or is lost.

        :raises InvariantError: all pages are held.
        """
        page = self.pool.next(DEVICE)
        if page.node is not None and self.pool.queues[HOST]:
            page = self._offload(page)
        if page.node is not None:
            self._lose(page)
        page.life += 1
        page.holders = 1
        return page

    def claim(self, pages: Sequence[Page], part: Page | None) -> list[Page]:
        """Hold pages of the tree for one sequence, on the device: those on the host come back first.

        :param part: a page whose beginning is reused: copied, and left where it is.
        :returns: ``pages``, and the copy of ``part``, which is the sequence's alone.
        """
        # All are safe before the first page is taken: making room must not take one of them.
        for page in pages:
            self.pool.hold(page)
        part_on_host = part is not None and part.slot.level == HOST
        if part is not None and part_on_host:
            self.pool.hold(part)
        elif part is not None:
            self.pool.touch(part)
        for page in pages:
            if page.slot.level == HOST:
                self._onboard(page)
        if part is None:
            return list(pages)
        copy = self.take()
        # The last page that waits may be the part itself: then its content is there already.
        if copy is not part:
            self._mover(self.index, part.slot, copy.slot)
        if part_on_host:
            self.pool.release(part)
        return [*pages, copy]

    def store(self, path: Sequence[Node], own: Sequence[Page | None], named_until: int = 0) -> None:
        """Let blocks be reused that this window has no page of: from a sequence's own pages.

        Where a sequence has let go of its page, a window that is not contiguous goes on behind the hole: the
        next block is then named as if it hung on the nearest one before that this window holds. A name that
        is another block's already is not given twice: that block is left out. (TensorRT-LLM announces it.)

        :param path: nodes of the sequence's blocks, from the first.
        :param own: the sequence's page per block; None where it has none.
        :param named_until: blocks below this are named by their whole prefix, held or not.
        """
        run: list[tuple[Node, Page]] = []
        run_parent: int | None = None
        parent: int | None = None
        for block, node in enumerate(path):
            present = node.pages[self.index]
            page = own[block] if block < len(own) else None
            if present is None and page is not None and self._attach(node, page, parent):
                if not run:
                    run_parent = parent
                run.append((node, page))
                parent = page.hash
                continue
            # An event's blocks hang on one another, so one that is skipped ends it.
            self._announce(run_parent, run)
            run = []
            if present is not None:
                parent = present.hash
            elif self.contiguous:
                break
            elif block < named_until:
                parent = node.hash
        self._announce(run_parent, run)

    def _attach(self, node: Node, page: Page, parent: int | None) -> bool:
        above = node.parent
        name = node.hash if above is None or above.hash == parent else node.name_below(parent)
        if name is None or name in self.named:
            return False
        self.pool.attach(page, node, name)
        node.pages[self.index] = self.named[name] = page
        return True

    def _announce(self, parent: int | None, run: Sequence[tuple[Node, Page]]) -> None:
        if run:
            self._log.stored(self.spec.group_id, parent, run)

    def _offload(self, page: Page) -> Page:
        """Move a block to the host; the page whose place on the device is free now."""
        spare = self.pool.next(HOST)
        self._mover(self.index, page.slot, spare.slot)
        page.slot, spare.slot = spare.slot, page.slot
        self._log.moved(self.spec.group_id, page, DEVICE)
        self.pool.wait(page)
        return spare

    def _onboard(self, page: Page) -> None:
        spare = self.take()
        self._mover(self.index, page.slot, spare.slot)
        page.slot, spare.slot = spare.slot, page.slot
        if page.node is not None:
            self._log.moved(self.spec.group_id, page, HOST)
        self.pool.release(spare)

    def _lose(self, page: Page) -> None:
        node = page.node
        assert node is not None, "only a block that could be reused is lost"
        self._log.removed(self.spec.group_id, page.hash)
        if self.contiguous:
            for lower in list(below(node, self.index)):
                self._forget(lower)
        self._forget(node)

    def _forget(self, node: Node) -> None:
        page = node.page_of(self.index)
        assert page.hash is not None, "a page of the tree has a name"
        node.pages[self.index] = None
        del self.named[page.hash]
        self.pool.detach(page)
        self._tree.prune(node)
