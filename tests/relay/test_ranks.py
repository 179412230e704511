"""The sink of a relayed worker's events: it makes the reading thread wait, where too many have come."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from tests.vllm_helpers import WAIT_S
from vswa_plugin.relay.ranks import BACKLOG, Ranks


class Inbox:
    """A publisher whose inbox is as full as it is told to be."""

    def __init__(self) -> None:
        self.waiting = BACKLOG + 1
        self.offered: list[Any] = []
        self.has_some = threading.Event()

    def offer(self, events: Sequence[Any]) -> None:
        self.offered += events
        self.has_some.set()


@pytest.mark.parametrize("ending", ["emptied", "held"])
def test_a_full_inbox_makes_the_reader_wait_until_it_is_emptied_or_the_connection_ends(ending: str) -> None:
    ranks = Ranks(("n", "c", 1), (), None, None, None, None, {})  # type: ignore[arg-type]
    inbox = Inbox()
    ranks.publishers[0] = inbox  # type: ignore[assignment]
    reader = threading.Thread(target=ranks.take, args=(0, ["a"]))
    reader.start()
    assert inbox.has_some.wait(WAIT_S)
    reader.join(0.1)
    assert reader.is_alive() and not ranks.settled
    if ending == "emptied":
        inbox.waiting = 0
    else:
        ranks.hold()
    reader.join(WAIT_S)
    assert not reader.is_alive()
    assert ["a"] == inbox.offered
