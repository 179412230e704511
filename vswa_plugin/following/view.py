"""Whether one rank may be scored: what its reader, its heartbeats and the registry say. Pure.

A stale view is scored as last seen for a while, then 0. A silent rank, whose heartbeats are missing, scores
0 at once and stays routable. Silence counts only while our own connection is up and our own loop ran: a
router that was suspended must not blame its workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.following.reader import Reader, ReaderOptions
from vswa_plugin.wire.events import Source


class ViewOptions(msgspec.Struct, frozen=True):
    """How long a view is trusted without confirmation. Seconds.

    :param heartbeat_s: between the heartbeats of publishers whose layout does not give it.
    :param missed_heartbeats: how many may be missing before a rank counts as silent.
    :param stale_grace_s: how long a stale view is scored as last seen.
    :param forget_s: after how long a silent rank that is in no registry is forgotten.
    """

    heartbeat_s: float = 1.0
    missed_heartbeats: float = 2.5
    stale_grace_s: float = 10.0
    forget_s: float = 60.0

    @property
    def tick_s(self) -> float:
        """How often a subscriber looks at the clock, while no publisher has shorter heartbeats."""
        return self.heartbeat_s / 4


class Attention:
    """The time in which messages of publishers could have come in: one clock for all views.

    :param most_pause_s: a longer pause between two ticks was our own: the loop did not run, and what came in
        waits unread.
    :ivar now: seconds of attention since the start.
    """

    def __init__(self, most_pause_s: float) -> None:
        self.now = 0.0
        self._most_pause_s = most_pause_s
        self._ticked_at: float | None = None

    def tick(self, now: float, connected: bool) -> None:
        """Time has passed, with the broker reachable or not.

        :param now: seconds of a monotonic clock.
        """
        before, self._ticked_at = self._ticked_at, now
        if before is not None and connected and now - before < self._most_pause_s:
            self.now += now - before


class View:
    """One rank as a router sees it.

    :ivar layout: of the rank, once the index has taken it; None: nothing of the rank is in the index.
    :ivar heartbeat_s: of its publisher.
    :ivar departed: it has left the registry, and its events are ignored until it is announced again.
    :ivar broken: why this epoch is not scored: an event that could not be applied.
    """

    def __init__(
        self,
        source: Source,
        options: ViewOptions,
        reader_options: ReaderOptions | None = None,
        jitter: Callable[[], float] = lambda: 0.0,
        attention: Attention | None = None,
    ) -> None:
        self.source = source
        self.reader = Reader(reader_options, jitter)
        self.layout: CacheLayout | None = None
        self.heartbeat_s = options.heartbeat_s
        self.registered = self.departed = False
        self.stale_since: float | None = None
        self.stale_reason = "nothing seen yet"
        self.broken: str | None = None
        self._options = options
        self._attention = attention if attention is not None else Attention(4 * options.tick_s)
        self._heard_at = self._attention.now

    def heard(self) -> None:
        """A valid message of the current epoch arrived from this rank."""
        self._heard_at = self._attention.now

    @property
    def silent(self) -> bool:
        """Its heartbeats are missing."""
        return self._attention.now > self._heard_at + self._silent_after_s

    @property
    def forgotten(self) -> bool:
        """It has been silent for so long that only an entry in the registry can keep it."""
        return not self.registered and self._attention.now > self._heard_at + self._forget_after_s

    @property
    def due(self) -> float:
        """When, on the clock of attention, time alone will next change something; infinity: never."""
        if not self.silent and not self.departed:
            return self._heard_at + self._silent_after_s
        return math.inf if self.registered else self._heard_at + self._forget_after_s

    @property
    def _silent_after_s(self) -> float:
        return self._options.missed_heartbeats * self.heartbeat_s

    @property
    def _forget_after_s(self) -> float:
        return max(self._options.forget_s, self._silent_after_s)

    def scored(self, now: float) -> bool:
        """Whether this rank is scored by what is known of it.

        :param now: as :attr:`stale_since`, seconds of the router's monotonic clock.
        """
        if self.layout is None or self.silent or self.reader.unreadable or self.broken is not None:
            return False
        return self.stale_since is None or now - self.stale_since < self._options.stale_grace_s

    @property
    def remark(self) -> str:
        """What an operator should know of a rank that is scored; empty: nothing."""
        if self.layout is None or not (unknown := self.layout.unknown_kinds):
            return ""
        kinds = ", ".join(f"{group_id} ({kind[:40]})" for group_id, kind in unknown.items())
        return f"scores may be too low: cache groups of kinds that this version does not know: {kinds}"

    @property
    def state(self) -> str:
        """For people: ``live``, ``stale``, ``silent``, ``unreadable`` or ``waiting``."""
        if self.broken is not None or self.reader.unreadable:
            return "unreadable"
        if self.silent:
            return "silent"
        if self.layout is None:
            return "waiting"
        return "stale" if self.stale_since is not None else "live"
