"""What a router sees of one rank: its engine's events, through the real path, to scorers. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.dynamo.runtime import namespaced_block_hash
from vswa_plugin.engine.contract import (
    BlocksStored,
    EngineEvent,
    EventAdapter,
    Node,
    RawEvent,
    with_prompts,
)
from vswa_plugin.engine.predicted import Scorer
from vswa_plugin.errors import ConfigError
from vswa_plugin.publishing.history import HistoryOptions
from vswa_plugin.publishing.ledger import Ledger, LedgerOptions
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire.events import Event, Layout, Unknown, decode


class EventPipeline:
    """Adapter, ledger and wire bytes of one rank, and what predicts from them.

    :param new_adapter: of the rank's event format; made now, and again after a loss.
    :ivar restarts: times that nothing was known to be resident any more, though something may have been.
    """

    def __init__(
        self, layout: CacheLayout, new_adapter: Callable[[], EventAdapter], scorers: Sequence[Scorer]
    ) -> None:
        self.restarts = 0
        self._scorers = scorers
        self._new_adapter = new_adapter
        self._adapter = with_prompts(new_adapter())
        ticks = itertools.count(1)
        self._ledger = Ledger(
            "trace",
            Residency(layout, NodeTable(namespaced_block_hash)),
            LedgerOptions(history=HistoryOptions(ring_batches=0)),  # nobody asks for a replay
            clock_ns=lambda: next(ticks),
            clock=lambda: 0.0,
            observe_stored=self._learn,
        )
        self._changed = False
        self._ledger.begin()
        self._deliver()

    @property
    def layout(self) -> CacheLayout:
        """As declared, corrected by the engine's own events."""
        return self._ledger.layout

    @property
    def unattributed(self) -> int:
        """Stored blocks that could not be named."""
        return self._ledger.residency.unattributed

    def feed(self, raw: RawEvent) -> list[Event]:
        """One engine event, to all scorers; what a router receives, a layout where all begins anew.

        :raises ConfigError: an event of another data-parallel rank, or one that does not fit the layout.
        :raises ProtocolError: not an event of the format.
        """
        return self._take(self._adapter.feed(raw))

    def settle(self) -> list[Event]:
        """No more events are there before a request: what is still unclear goes to all scorers too.

        :raises ConfigError: as :meth:`feed`.
        """
        return self._take(self._adapter.settle())

    def prompt(self, token_ids: Sequence[int], cache_salt: str | None, lora_name: str | None) -> None:
        """A request that goes to the engine, as a worker hands it to its adapter."""
        self._adapter.prompt(token_ids, cache_salt, lora_name)

    def _take(self, events: Sequence[EngineEvent]) -> list[Event]:
        received: list[Event] = []
        for event in events:
            if event.dp_rank != 0:
                raise ConfigError(f"expected events of one rank, 0, got one of dp_rank {event.dp_rank}")
            self._ledger.add(event)
            received += self._deliver()
        return received

    def lose(self) -> None:
        """Events are missing here: nothing is known of the cache until it is stored again."""
        self._adapter = with_prompts(self._new_adapter())
        self._changed = True  # what is missing may have been stored
        self._ledger.lose("events are missing in the trace")
        self._deliver()

    def _learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        for scorer in self._scorers:
            scorer.learn(stored, nodes)

    def _deliver(self) -> list[Event]:
        """Give what the ledger has published to all scorers, as a router gets it."""
        received: list[Event] = []
        for published in self._ledger.flush():
            for event in decode(published.payload).events:
                assert not isinstance(event, Unknown), "both sides have one version"
                received.append(event)
                self._show(event)
        return received

    def _show(self, event: Event) -> None:
        if isinstance(event, Layout):
            self.restarts += self._changed  # a layout that is corrected before any block costs nothing
            self._changed = False
            for scorer in self._scorers:
                scorer.begin(event.cache_layout)
            return
        self._changed = True
        for scorer in self._scorers:
            scorer.apply(event)
