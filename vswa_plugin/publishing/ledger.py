"""The book of one rank: the engine's events in, numbered batches out. Pure but for the clocks given to it.

The publisher writes it on a worker's event loop; ``vswa accuracy replay`` writes the same book from a
recorded trace. What is added is gathered until :meth:`Ledger.flush`; nothing may be read from the history
between the two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.memory import Memory
from vswa_plugin.engine.contract import BlocksRemoved, BlocksStored, EngineEvent, Node
from vswa_plugin.errors import VswaError
from vswa_plugin.publishing.healing import Claim, Healing
from vswa_plugin.publishing.history import History, HistoryOptions
from vswa_plugin.publishing.residency import Residency, Restart
from vswa_plugin.wire.events import Batch, Event, ReuseReport, encode, layout_event
from vswa_plugin.wire.numbering import Numbering, split

logger = logging.getLogger(__name__)


class LedgerOptions(msgspec.Struct, frozen=True):
    """:param batch_bytes: larger batches are split; an answer to a reader holds no more either.
    :param heartbeat_s: seconds between the publisher's heartbeats, as the layout gives them; None: left out.
    :param history: limits of what readers can ask for.
    :param memory: of the rank, as the layout gives it; None: left out.
    """

    batch_bytes: int = 256 << 10
    heartbeat_s: float | None = None
    history: HistoryOptions = HistoryOptions()
    memory: Memory | None = None


class LedgerStats(msgspec.Struct):
    """Counters since start, for /metrics and tests."""

    batches: int = 0
    events: int = 0
    rejected_events: int = 0
    restarts: int = 0


class Published(NamedTuple):
    """One numbered batch, and the same encoded."""

    batch: Batch
    payload: bytes


class Ledger:
    """What one rank holds, and the events by which readers learn of it.

    :param name: of the rank, for the log.
    :param clock_ns: wall clock, for epochs and the lag figure; ``clock``: monotonic seconds.
    :param last_epoch: an epoch of this rank that is known from before; ours is higher.
    :param observe_stored: is shown each event that stored blocks, with the names of its leading blocks.
    """

    def __init__(
        self,
        name: str,
        residency: Residency,
        options: LedgerOptions,
        *,
        clock_ns: Callable[[], int],
        clock: Callable[[], float],
        last_epoch: int = 0,
        observe_stored: Callable[[BlocksStored, Sequence[Node]], None] | None = None,
    ) -> None:
        self.name = name
        self.residency = residency
        self.stats = LedgerStats()
        self.healing = Healing(residency)
        self._options = options
        self._numbering = Numbering(clock_ns, last_epoch)
        history = msgspec.structs.replace(options.history, message_bytes=options.batch_bytes)
        self.history = History(residency, history, clock, self._layout_event)
        self._observe_stored = observe_stored
        self._changes: list[Event] = []
        self._begun = False

    @property
    def epoch(self) -> int:
        return self._numbering.epoch

    @property
    def next_event_id(self) -> int:
        return self._numbering.next_event_id

    @property
    def layout(self) -> CacheLayout:
        """As the engine declared it, corrected by its own events."""
        return self.residency.layout

    def begin(self) -> None:
        """Begin the first epoch: the layout, as corrected by what was added so far, is its event 0."""
        self._begun = True
        self.history.begin_epoch(self.epoch)
        self._changes.insert(0, self._layout_event(self.layout))

    def add(self, event: EngineEvent) -> None:
        """Take in one event of the engine.

        :raises VswaError: it does not fit the layout; nothing of it was taken in.
        """
        if self.healing.active and isinstance(event, BlocksRemoved):
            self.healing.saw_removed(event.group_id, event.hashes)
        try:
            self._changes += self.residency.apply(event)
            if self._observe_stored is not None and isinstance(event, BlocksStored):
                self._observe_stored(event, self._names_of(event))
        except Restart as reason:
            self._restart(str(reason))

    def prove(self, claim: Claim) -> None:
        """Take in what a finished request shows to be resident."""
        self._changes += self.healing.changes(claim)

    def lose(self, reason: str) -> None:
        """Events of the engine are missing: nothing is known to be resident any more."""
        self.residency.clear()
        self._restart(reason)

    def reject(self, error: VswaError) -> None:
        """Count an event of the engine that could not be used."""
        self.stats.rejected_events += 1
        if self.stats.rejected_events == 1:
            logger.error("%s: engine event rejected (further ones are only counted): %s", self.name, error)

    def flush(self) -> list[Published]:
        """Number what was added since the last call; empty where nothing was, and before :meth:`begin`."""
        if not self._changes or not self._begun:
            return []
        changes, self._changes = self._changes, []
        published: list[Published] = []
        for part in split(changes, self._options.batch_bytes):
            batch = self._numbering.batch(part)
            payload = encode(batch)
            self.stats.batches += 1
            self.stats.events += len(part)
            self.history.ring.add(batch, payload)
            published.append(Published(batch, payload))
        return published

    def heartbeat(self, reports: Sequence[ReuseReport] = ()) -> bytes:
        """An encoded batch without events, which names the id that comes next, and may bring reports."""
        return encode(self._numbering.batch(reports=reports))

    def _restart(self, reason: str) -> None:
        """Begin a new epoch; what was gathered before it is void. Its first event is the layout."""
        self._changes.clear()
        if not self._begun:
            return  # the first epoch will begin with the layout anyhow
        if self._numbering.next_event_id:  # else one has begun just now, of which nothing is out yet
            self.stats.restarts += 1
            logger.warning("%s: new epoch with nothing resident: %s", self.name, reason)
            self._numbering.new_epoch()
            self.history.begin_epoch(self.epoch)
        self.healing.restarted()
        self._changes.append(self._layout_event(self.layout))

    def _layout_event(self, layout: CacheLayout) -> Event:
        return layout_event(layout, self._options.heartbeat_s, self._options.memory)

    def _names_of(self, event: BlocksStored) -> tuple[Node, ...]:
        """The names of its leading blocks; the others could not be named."""
        named: list[Node] = []
        for block in event.blocks:
            node = self.residency.nodes.get(block.hash)
            if node is None:
                break
            named.append(node)
        return tuple(named)
