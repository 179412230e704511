"""What a router sees of one rank: its engine's events, through the real path, to scorers. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.dynamo.runtime import namespaced_block_hash
from vswa_plugin.engine.contract import BlocksStored, EngineEvent, EventAdapter, Node, RawEvent
from vswa_plugin.engine.predicted import Scorer
from vswa_plugin.errors import ConfigError
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.residency import Residency, Restart
from vswa_plugin.wire.events import Event, Layout, Unknown, decode, encode, layout_event
from vswa_plugin.wire.numbering import Numbering


class View:
    """Adapter, node table, residency and wire bytes of one rank, and what predicts from them.

    :param new_adapter: of the rank's event format; made now, and again after a loss.
    :ivar restarts: times that nothing was known to be resident any more, though something had been.
    """

    def __init__(
        self, layout: CacheLayout, new_adapter: Callable[[], EventAdapter], scorers: Sequence[Scorer]
    ) -> None:
        self.restarts = 0
        self._scorers = scorers
        self._new_adapter = new_adapter
        self._adapter = new_adapter()
        self._residency = Residency(layout, NodeTable(namespaced_block_hash))
        ticks = itertools.count(1)
        self._numbering = Numbering(lambda: next(ticks))
        self._changed = False
        self._begin()

    @property
    def layout(self) -> CacheLayout:
        """As declared, corrected by the engine's own word."""
        return self._residency.layout

    @property
    def unattributed(self) -> int:
        """Stored blocks that could not be named."""
        return self._residency.unattributed

    def feed(self, raw: RawEvent) -> list[Event]:
        """One engine event, to all scorers; what a router was told, a layout where all begins anew.

        :raises ConfigError: an event of another data-parallel rank.
        :raises ProtocolError: not an event of the format.
        """
        return [event for told in self._adapter.feed(raw) for event in self._feed(told)]

    def lose(self) -> None:
        """Events are missing here: nothing is known of the cache until it is stored again."""
        self._adapter = self._new_adapter()
        self._residency.clear()
        self._changed = True
        self._begin()

    def _feed(self, told: EngineEvent) -> list[Event]:
        if told.dp_rank != 0:
            raise ConfigError(f"expected events of one rank, 0, got one of dp_rank {told.dp_rank}")
        try:
            changes = self._residency.apply(told)
        except Restart:
            return self._begin()
        if isinstance(told, BlocksStored):
            nodes = self._names_of(told)
            for scorer in self._scorers:
                scorer.learn(told, nodes)
        if not changes:
            return []
        self._changed = True
        events = list(self._over_the_wire(changes))
        for event in events:
            for scorer in self._scorers:
                scorer.apply(event)
        return events

    def _begin(self) -> list[Event]:
        """As a publisher does: a new epoch, whose first event is the layout."""
        self.restarts += self._changed  # a layout that is corrected before any block costs nothing
        self._changed = False
        self._numbering.new_epoch()
        events = list(self._over_the_wire([layout_event(self._residency.layout)]))
        for event in events:
            assert isinstance(event, Layout)
            for scorer in self._scorers:
                scorer.begin(CacheLayout(event.groups, event.rule, event.model, event.hash_scheme))
        return events

    def _over_the_wire(self, changes: Sequence[Event]) -> Iterator[Event]:
        """As a router gets them."""
        for event in decode(encode(self._numbering.batch(changes))).events:
            assert not isinstance(event, Unknown), "both sides have one version"
            yield event

    def _names_of(self, stored: BlocksStored) -> list[Node]:
        """Of its leading blocks; the others could not be named."""
        nodes: list[Node] = []
        for block in stored.blocks:
            node = self._residency.nodes.get(block.hash)
            if node is None:
                break
            nodes.append(node)
        return nodes
