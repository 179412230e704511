"""Bounds of the searches for a block by its hash: a prompt may be one block again and again."""

from __future__ import annotations

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
