"""Pages of one cache group: which are free, which are held, which may be dropped. Knows no tokens.

A page is free; or private to the one sequence that writes it; or committed, which means that it belongs
to a tree node and is only read. A committed page counts its holders; without any it is droppable and
waits in a queue, oldest first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

from vswa_plugin.errors import InvariantError

from .tree import Node


class BlockPool:
    """``num_blocks`` pages, numbered from 0."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        #: The node that a committed page belongs to, per page.
        self.nodes: list[Node | None] = [None] * num_blocks
        #: Sequences that hold the page, per page. A private page has one.
        self.holders = [0] * num_blocks
        self._free = list(range(num_blocks))
        self._droppable: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> Sequence[int]:
        return self._free

    @property
    def droppable(self) -> Sequence[int]:
        """Oldest first."""
        return list(self._droppable)

    def counts(self) -> dict[str, int]:
        """How many blocks are used by running sequences, free and droppable. From any thread."""
        free, droppable = len(self._free), len(self._droppable)
        return {"used": self.num_blocks - free - droppable, "free": free, "droppable": droppable}

    def lacks(self, count: int) -> bool:
        """Whether fewer than ``count`` pages are free."""
        return len(self._free) < count

    def oldest_droppable(self) -> int:
        """The page that is to be dropped next.

        :raises InvariantError: there is none, so more was admitted than fits.
        """
        if not self._droppable:
            raise InvariantError(
                f"expected a free or droppable page, but all {self.num_blocks} pages are held: "
                "admission let in more than the pool holds"
            )
        return next(iter(self._droppable))

    def take(self, count: int) -> list[int]:
        """Take ``count`` free pages as private ones, lowest number first so that runs stay long."""
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def commit(self, page: int, node: Node) -> None:
        """Make a private page the page of ``node``; its holder keeps holding it."""
        self.nodes[page] = node

    def hold(self, page: int) -> None:
        """Add one holder to a committed page."""
        self.holders[page] += 1
        self._droppable.pop(page, None)

    def release(self, page: int) -> None:
        """Take one holder off: a private page is free again, a committed one may become droppable."""
        self.holders[page] -= 1
        if self.holders[page]:
            return
        if self.nodes[page] is None:
            heapq.heappush(self._free, page)
        else:
            self._droppable[page] = None

    def drop(self, page: int) -> None:
        """Free a droppable page.

        :raises InvariantError: a sequence holds it.
        """
        if page not in self._droppable:
            raise InvariantError(f"page {page} is dropped while {self.holders[page]} sequences hold it")
        del self._droppable[page]
        self.nodes[page] = None
        heapq.heappush(self._free, page)
