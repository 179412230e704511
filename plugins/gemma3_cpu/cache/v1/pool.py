"""The pages of one window on both levels, in queues where those without a holder wait. Knows no tokens.

A page without a holder waits in the queue of its level, whether a block can be reused from it or not: the one
given back longest ago is taken next. There is one priority here.
"""

from __future__ import annotations

from collections import OrderedDict

from vswa_plugin.errors import InvariantError

from ..api import DEVICE, HOST, Slot
from .tree import Node, Page


class WindowPool:
    """All pages of one window.

    :ivar droppable: device pages without a holder that can be reused; a number for any thread.
    :ivar on_host: host pages that can be reused; as above.
    """

    def __init__(self, num_blocks: int, host_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.pages = [Page(Slot(DEVICE, i)) for i in range(num_blocks)]
        self.pages += [Page(Slot(HOST, i)) for i in range(host_blocks)]
        self.queues: tuple[OrderedDict[Page, None], ...] = (OrderedDict(), OrderedDict())
        for page in self.pages:
            self.queues[page.slot.level][page] = None
        self.droppable = self.on_host = 0

    def counts(self) -> dict[str, int]:
        """How many device blocks are used by running sequences, free and droppable. From any thread."""
        waiting, droppable = len(self.queues[DEVICE]), self.droppable
        return {"used": self.num_blocks - waiting, "free": waiting - droppable, "droppable": droppable}

    def next(self, level: int) -> Page:
        """Take the page that waits longest out of its queue.

        :raises InvariantError: none waits, so more was admitted than fits.
        """
        if not self.queues[level]:
            raise InvariantError(
                f"expected a page without a holder, but all {self.num_blocks} pages are held: "
                "admission let in more than the pool holds"
            )
        page, _ = self.queues[level].popitem(last=False)
        self._count(page, -1)
        return page

    def wait(self, page: Page) -> None:
        """Put a page without a holder at the end of its level's queue."""
        self.queues[page.slot.level][page] = None
        self._count(page, +1)

    def hold(self, page: Page) -> None:
        """Add one holder."""
        if not page.holders:
            del self.queues[page.slot.level][page]
            self._count(page, -1)
        page.holders += 1

    def release(self, page: Page, *, first: bool = False) -> None:
        """Take one holder off.

        :param first: a page that nobody holds then is the first one to be taken.
        """
        page.holders -= 1
        if not page.holders:
            self.wait(page)
            if first:
                self.queues[page.slot.level].move_to_end(page, last=False)

    def attach(self, page: Page, node: Node, name: int) -> None:
        """From now on ``node`` can be reused from ``page``."""
        waits = not page.holders
        page.node, page.hash, page.used = node, name, True
        if waits:
            self._count(page, +1)

    def detach(self, page: Page) -> None:
        """The page's content can no longer be reused; it keeps its place in the queue."""
        if page in self.queues[page.slot.level]:
            self._count(page, -1)
        page.node = page.hash = None

    def _count(self, page: Page, change: int) -> None:
        """A page that can be reused has joined or left a queue."""
        if page.node is None:
            return
        if page.slot.level == DEVICE:
            self.droppable += change
        else:
            self.on_host += change
