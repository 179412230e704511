"""One rank on its way from raw engine events to a router's index, with what it must never do. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant

from vswa_plugin.blocks.hashing import block_hash
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.engine.contract import EngineHash, EventAdapter, EventsLost
from vswa_plugin.errors import ProtocolError, VswaError
from vswa_plugin.index import WindowIndex
from vswa_plugin.publishing.ledger import Ledger, LedgerOptions
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.testing.adapter_checks import bounded
from vswa_plugin.wire.events import Rank, decode

BLOCK, WINDOW, LONGEST = 2, 4, 64
SLIDING, GLOBAL = 0, 1
#: Lines of Python for one event of at most five blocks, and objects that a rank may keep of a small alphabet.
MOST_LINES, MOST_OBJECTS = 6_000, 6_000
RANK = Rank(1)
#: Blocks are called by these, and nothing else, so that rings, repeats and new parents are common.
LETTERS = "abcdef"


def hasher(token_ids: Any, cache_salt: str | None, lora_name: str | None) -> int:
    """Salts and LoRA names kept apart, without Dynamo's function."""
    return (block_hash(token_ids) + hash((cache_salt, lora_name)) * (cache_salt != lora_name)) % (1 << 64)


class EventMachine(RuleBasedStateMachine):
    """An adapter, a ledger and an index; subclasses write one engine's events.

    :ivar said: by group, the blocks that the events that were taken say are held, once for each copy.
    """

    layout: CacheLayout

    def __init__(self) -> None:
        super().__init__()
        self.adapter = self.new_adapter()
        ticks = itertools.count(1)
        self.ledger = Ledger(
            "rank",
            Residency(self.layout, NodeTable(hasher, limit=64)),
            LedgerOptions(),
            clock_ns=lambda: next(ticks),
            clock=lambda: 0.0,
        )
        self.index = WindowIndex(kernel=False)
        self.said: dict[int, dict[EngineHash, int]] = {}
        self.ledger.begin()
        self.publish()

    def new_adapter(self) -> EventAdapter:
        raise NotImplementedError

    def counted(self, raw: Mapping[str, Any]) -> None:
        """Note in :attr:`said` what a well-formed event says that was taken."""
        raise NotImplementedError

    def said_to_be_in(self, group: int) -> set[EngineHash]:
        """What the events say that a group of the layout holds."""
        return {name for name, copies in self.said.get(group, {}).items() if copies > 0}

    # -- as a publisher and a reader do it -------------------------------------------------------------

    def feed(self, raw: Any) -> str | None:
        """One event on its way; why it was refused, or None."""
        try:
            events = bounded(lambda: self.adapter.feed(raw), MOST_LINES)
        except ProtocolError as error:
            self.lose(str(error))
            return str(error)
        if any(isinstance(event, EventsLost) for event in events):
            self.said.clear()
        self.counted(raw)
        self.take(events)
        return None

    def take(self, events: Any) -> None:
        for event in events:
            try:
                bounded(lambda event=event: self.ledger.add(event), MOST_LINES)
            except VswaError as error:
                self.ledger.reject(error)
        self.publish()

    def lose(self, reason: str) -> None:
        self.said.clear()
        self.ledger.lose(reason)
        self.publish()

    def publish(self) -> None:
        for published in self.ledger.flush():
            for event in decode(published.payload).events:
                self.index.apply(RANK, event)  # type: ignore[arg-type]

    # -- what always holds -----------------------------------------------------------------------------

    @invariant()
    def the_index_has_what_the_ledger_claims(self) -> None:
        claimed = self.ledger.residency.resident()
        assert claimed == {group: set(held) for group, held in self.index.contents(RANK).items()}

    @invariant()
    def nothing_is_claimed_that_no_event_said(self) -> None:
        for group, blocks in self.ledger.residency.frozen().items():
            assert {name for name, _ in blocks} <= self.said_to_be_in(group)

    @invariant()
    def little_is_remembered(self) -> None:
        assert objects_of(self.adapter) <= MOST_OBJECTS


def objects_of(value: object) -> int:
    """How many entries the containers have that hang on an object; each container once."""
    seen: set[int] = set()
    waiting, count = [value], 0
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Mapping):
            inner = [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            inner = list(each)
        else:
            slots = [getattr(each, name, None) for name in getattr(type(each), "__slots__", ())]
            inner = [*getattr(each, "__dict__", {}).values(), *slots]
        count += len(inner)
        waiting += [part for part in inner if not isinstance(part, str | bytes | int | float | None)]
    return count


letters = st.sampled_from(LETTERS)
chains = st.lists(letters, min_size=1, max_size=4)
groups = st.sampled_from([SLIDING, GLOBAL])
