"""What plugins are shown of the ranks and of the requests under way."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest

from tests.host_helpers import failing
from tests.host_helpers import plugin as plugin_of
from tests.router.test_decide import LAYOUT, A, B
from vswa_plugin.errors import VswaError
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.host.host import PluginHost
from vswa_plugin.index import WindowIndex
from vswa_plugin.router.replicas.load import SharedLoad
from vswa_plugin.router.replicas.messages import Put, State
from vswa_plugin.router.watched import WatchedIndex, books_for, index_for
from vswa_plugin.selection import Booked, LoadBook
from vswa_plugin.wire.events import Cleared, Event, Rank, Removed, Stored, layout_event


class Watching:
    def __init__(self) -> None:
        self.ranks: list[tuple[Rank, Event | None]] = []
        self.load: list[tuple[str, Hashable, str, Rank]] = []

    @hookimpl
    def vswa_rank_changed(self, rank: Rank, event: Event | None) -> None:
        self.ranks.append((rank, event))

    @hookimpl
    def vswa_load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None:
        self.load.append((model, key, step, request.rank))


def host_with(*plugins: Any) -> PluginHost:
    host = PluginHost()
    for number, plugin in enumerate(plugins):
        host.register(plugin, f"p{number}")
    return host


def new_book(model: str, block_size: int) -> LoadBook:
    return LoadBook(block_size)


def test_each_event_is_shown_in_order_after_the_index_has_taken_it() -> None:
    watching = Watching()
    index = index_for(host_with(plugin_of(vswa_rank_changed=failing(ValueError())), watching))
    stored, removed = Stored(1, 0, None, (7, 8), "device"), Removed(1, (8,))
    index.join(A, LAYOUT)
    index.apply(A, stored)
    index.apply(A, removed)
    index.clear(A)
    index.drop(A)

    expected = [layout_event(LAYOUT), stored, removed, Cleared(None), None]
    assert [(A, each) for each in expected] == watching.ranks
    assert isinstance(index, WatchedIndex)


def test_an_event_that_the_index_refuses_is_not_shown() -> None:
    watching = Watching()
    index = index_for(host_with(watching))
    with pytest.raises(VswaError):
        index.apply(B, Removed(1, (8,)))  # of a rank that has not joined

    assert [] == watching.ranks


def test_each_step_of_a_request_is_shown_once() -> None:
    watching = Watching()
    book = books_for(host_with(watching), new_book)("m", 16)
    book.add(1, A, [5, 6], 40, 40)
    book.first_token(1)
    book.output(1, 3)
    book.free(1)
    book.free(1)
    book.add(2, B, [5, 6], 40, 0)  # nothing is left to compute there
    book.first_token(2)
    book.drop(B.worker_id)

    steps = [("m", 1, step, A) for step in ("sent", "first_token", "ended")]
    steps += [("m", 2, step, B) for step in ("sent", "first_token", "ended")]
    assert steps == watching.load


def test_requests_of_other_routers_are_shown_too() -> None:
    watching, shared = Watching(), SharedLoad(1)
    book = books_for(host_with(watching), shared.book)("m", 16)
    shared._enter(9, Put(State(4, 1, 0, 40, 0), "m", (5, 6), 40, 0, True))

    assert [("m", (9, 4), "sent", A)] == watching.load
    assert 1 == len(book)


def test_nothing_is_watched_where_no_plugin_wants_to_know() -> None:
    host = host_with(plugin_of(vswa_score=lambda: None))

    assert type(index_for(host)) is WindowIndex
    assert books_for(host, new_book) is new_book
