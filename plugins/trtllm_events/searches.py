"""Bounds of the searches for a block by its hash: a prompt may be one block again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

Block = TypeVar("Block")

#: Blocks looked at in one search. Beyond that a block stays without a name: an under-estimate.
MAX_SEARCHED = 256
#: The same of all searches of one event together, some 0.2 s: 256 blocks of the same tokens, each searched
#: among as many by as many names, would take minutes.
MAX_SEARCHED_AT_ONCE = 64 * MAX_SEARCHED


class Searches:
    """The searches of one event. What is looked at first, the parent that the event names, does not count."""

    def __init__(self) -> None:
        self.left = MAX_SEARCHED_AT_ONCE

    def begin(self) -> None:
        """An event begins."""
        self.left = MAX_SEARCHED_AT_ONCE

    def one_more(self) -> bool:
        """Whether one more block may be looked at; it is counted."""
        self.left = max(0, self.left - 1)
        return self.left > 0

    def from_top(
        self, top: Block, below: Callable[[Block], Iterable[Block]], fits: Callable[[Block], bool]
    ) -> tuple[bool, Block]:
        """Whether ``top`` or a block below it fits, nearest first; that block, or ``top`` where none does."""
        candidates = [top]
        for number, candidate in enumerate(candidates):  # grows while it is walked, up to MAX_SEARCHED
            if number and not self.one_more():
                break
            if fits(candidate):
                return True, candidate
            room = MAX_SEARCHED - len(candidates)
            if room > 0:
                candidates += islice(below(candidate), room)
        return False, top
