"""What plugins are shown of a router's work: the events of the ranks, and what becomes of requests."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Protocol

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.reuse import ReuseRule
from vswa_plugin.index import WindowIndex
from vswa_plugin.selection import Booked, LoadBook
from vswa_plugin.wire.events import Cleared, Event, Rank, layout_event


class Observers(Protocol):
    """The plugins, already isolated: no method raises."""

    def implements(self, hook: str) -> bool: ...
    def reuse_rules(self) -> Mapping[str, ReuseRule]: ...
    def load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None: ...
    def rank_changed(self, rank: Rank, event: Event | None) -> None: ...


class WatchedIndex(WindowIndex):
    """A window index that shows plugins what it has taken in.

    :param observers: who is shown it, and whose reuse rules it has.
    """

    def __init__(self, observers: Observers) -> None:
        super().__init__(rules=observers.reuse_rules())
        self._show = observers.rank_changed

    def join(self, rank: Rank, layout: CacheLayout) -> None:
        super().join(rank, layout)
        self._show(rank, layout_event(layout))

    def apply(self, rank: Rank, event: Event) -> None:
        super().apply(rank, event)
        self._show(rank, event)

    def clear(self, rank: Rank) -> None:
        super().clear(rank)
        self._show(rank, Cleared(None))

    def drop(self, rank: Rank) -> None:
        super().drop(rank)
        self._show(rank, None)


def index_for(observers: Observers) -> WindowIndex:
    """The index of a router: a watched one only where a plugin wants to know what the ranks hold."""
    if observers.implements("vswa_rank_changed"):
        return WatchedIndex(observers)
    return WindowIndex(rules=observers.reuse_rules())


def books_for(
    observers: Observers, new_book: Callable[[str, int], LoadBook]
) -> Callable[[str, int], LoadBook]:
    """Makes load books as ``new_book`` does, whose steps plugins are shown where one wants to know them."""
    if not observers.implements("vswa_load_changed"):
        return new_book

    def watched(model: str, block_size: int) -> LoadBook:
        book = new_book(model, block_size)
        book.watch = partial(observers.load_changed, model)
        return book

    return watched
