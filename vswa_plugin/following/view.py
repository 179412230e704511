"""Whether one rank may be scored: what its reader, its heartbeats and the registry say. Pure.

A stale view is scored as last seen for a while, then 0. A silent rank, whose heartbeats are missing, scores
0 at once and stays routable. Silence counts only while our own connection is up and our own loop ran: a
router that was suspended must not blame its workers.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.following.reader import Reader, ReaderOptions
from vswa_plugin.wire.events import Source


class ViewOptions(msgspec.Struct, frozen=True):
    """How long what is doubtful is believed. Seconds.

    :param heartbeat_s: what publishers were told with ``--heartbeat``.
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
        """How often views look at the clock."""
        return self.heartbeat_s / 4


class View:
    """One rank as a router sees it. Times are seconds of the router's monotonic clock."""

    def __init__(
        self,
        source: Source,
        options: ViewOptions,
        reader_options: ReaderOptions | None = None,
        jitter: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.source = source
        self.reader = Reader(reader_options, jitter)
        self.layout: CacheLayout | None = None
        self.registered = False
        self.stale_since: float | None = None
        self.stale_reason = "nothing seen yet"
        #: An event that could not be applied: nothing of this epoch is believed any more.
        self.broken: str | None = None
        self._options = options
        self._silent_s = 0.0
        self._ticked_at: float | None = None

    def heard(self) -> None:
        """Anything arrived from this rank."""
        self._silent_s = 0.0

    def tick(self, now: float, connected: bool) -> None:
        """Time has passed, with the broker reachable or not."""
        before, self._ticked_at = self._ticked_at, now
        # A longer pause than this was our own: the loop did not run, and what came in waits unread.
        if before is not None and connected and now - before < 4 * self._options.tick_s:
            self._silent_s += now - before

    @property
    def silent(self) -> bool:
        """Its heartbeats are missing."""
        return self._silent_s > self._options.missed_heartbeats * self._options.heartbeat_s

    @property
    def forgotten(self) -> bool:
        """Silent for long, and nobody says that it is alive."""
        return not self.registered and self._silent_s > self._options.forget_s

    def scored(self, now: float) -> bool:
        """Whether what is known of this rank may be promised."""
        if self.layout is None or self.silent or self.reader.unreadable or self.broken is not None:
            return False
        return self.stale_since is None or now - self.stale_since < self._options.stale_grace_s

    def state(self, now: float) -> str:
        """For people: ``live``, ``stale``, ``silent``, ``unreadable`` or ``waiting``."""
        if self.broken is not None or self.reader.unreadable:
            return "unreadable"
        if self.silent:
            return "silent"
        if self.layout is None:
            return "waiting"
        return "stale" if self.stale_since is not None else "live"
