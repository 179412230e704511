"""The pools that pages come from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from vswa_plugin.errors import InvariantError

from ..spec import GroupSpec
from .tree import Page


class PagePool:
    """Pages of one size on one level, and those of them that may be evicted, in that order.

    All groups whose pages have that size share it: its numbers, its room, and its queue. Every block has
    the default priority, so that the queue is first in, first out.

    :ivar allocated: pages per group.
    :ivar droppable: those of them that are in the queue.
    """

    def __init__(self, num_pages: int, num_groups: int) -> None:
        self.num_pages = num_pages
        self.free = list(range(num_pages - 1, -1, -1))
        self.queue: OrderedDict[Page, None] = OrderedDict()
        self.allocated = [0] * num_groups
        self.droppable = [0] * num_groups

    def take(self, group: int) -> int:
        """Number of a free page.

        :raises InvariantError: there is none: more pages are held than admission should have let in.
        """
        if not self.free:
            raise InvariantError(
                f"expected a free page of {self.num_pages}, got none, with {len(self.queue)} left to evict"
            )
        self.allocated[group] += 1
        return self.free.pop()

    def give_back(self, page: Page) -> None:
        self.allocated[page.group] -= 1
        self.free.append(page.number)

    def push(self, page: Page) -> None:
        """The last in line to be evicted."""
        page.queued = True
        self.queue[page] = None
        self.droppable[page.group] += 1

    def remove(self, page: Page) -> None:
        """Not to be evicted any more."""
        page.queued = False
        del self.queue[page]
        self.droppable[page.group] -= 1

    def pop(self, count: int, most_held: int) -> list[Page]:
        """Take the first ``count`` pages out of the queue, if there are as many.

        :param most_held: how many of them may be pages that a sequence needs. More of those leave the queue
            but are not taken: their sequence is opening, and locks them next.
        """
        victims: list[Page] = []
        while len(victims) < count and self.queue:
            page = next(iter(self.queue))
            self.remove(page)
            if not page.holders or most_held:
                most_held -= bool(page.holders)
                victims.append(page)
        return victims


def pool_of_groups(groups: Sequence[GroupSpec]) -> list[int]:
    """Per group the index of its pool: groups with pages of equal size share one, the first id's first."""
    sizes: list[int] = []
    for group in sorted(groups, key=lambda group: group.group_id):
        if group.layers not in sizes:
            sizes.append(group.layers)
    return [sizes.index(group.layers) for group in groups]
