"""Whether one rank may be scored: what its reader, its heartbeats and the registry say. Pure.

A stale view is scored as last seen for a while, then 0. A silent rank, whose heartbeats are missing, scores
0 at once and stays routable. Silence counts only while our own connection is up and our own loop ran: a
router that was suspended must not blame its workers. It does not trust what it knew before either: after a
loss of contact a view is stale until its rank has been heard again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import msgspec

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.following.lag import Lag
from vswa_plugin.following.reader import Reader, ReaderOptions
from vswa_plugin.wire.events import Source


class ViewOptions(msgspec.Struct, frozen=True):
    """How long a view is trusted without confirmation. Seconds.

    :param heartbeat_s: between the heartbeats of publishers whose layout does not give it.
    :param missed_heartbeats: how many may be missing before a rank counts as silent.
    :param stale_grace_s: how long a stale view is scored as last seen.
    :param forget_s: after how long a silent rank that is in no registry is forgotten.
    :param max_lag_s: a rank whose messages arrive later than that is not scored; infinity: no bound.
        It is measured by the clock of the publisher, whose seconds must be as long as ours.
    """

    heartbeat_s: float = 1.0
    missed_heartbeats: float = 2.5
    stale_grace_s: float = 10.0
    forget_s: float = 60.0
    max_lag_s: float = math.inf

    @property
    def tick_s(self) -> float:
        """How often a subscriber looks at the clock, while no publisher has shorter heartbeats."""
        return self.heartbeat_s / 4


class Attention:
    """The time in which messages of publishers could have come in: one clock for all views.

    :param most_pause_s: a longer pause between two ticks was our own: the loop did not run, and what came in
        waits unread.
    :ivar now: seconds of attention since the start.
    :ivar away: the broker cannot be reached.
    :ivar losses: how often contact was lost: the broker was away, or the loop did not run for long.
    """

    #: Times of the last losses that are kept; an earlier one counts as the first of them.
    _KEPT = 64
    #: Pauses that long, in :attr:`_most_pause_s`, are a loss of contact: heartbeats came and went meanwhile.
    _LONG = 2.5

    def __init__(self, most_pause_s: float) -> None:
        self.now = 0.0
        self.away = False
        self.losses = 0
        self._most_pause_s = most_pause_s
        self._ticked_at: float | None = None
        self._paused = False
        self._lost_at: deque[float] = deque(maxlen=self._KEPT)
        self._losses_over = 0

    def tick(self, now: float, connected: bool) -> None:
        """Time has passed, with the broker reachable or not.

        :param now: seconds of a monotonic clock.
        """
        before, self._ticked_at = self._ticked_at, now
        passed = 0.0 if before is None else now - before
        paused_before, self._paused = self._paused, passed >= self._most_pause_s
        if passed >= self._LONG * self._most_pause_s or (not connected and not self.away):
            self.losses += 1
            self._lost_at.append(now)
        self.away = not connected
        if not connected:
            return
        if not self._paused:
            self.now += passed
        elif paused_before:  # slow again and again: what came in between was read, and is not waiting
            self.now += self._most_pause_s

    def lost_at(self, loss: int) -> float:
        """When the loss of that number, from 0, was noticed."""
        return self._lost_at[max(0, loss - self.losses + len(self._lost_at))]

    def is_grace_over(self, now: float, grace_s: float) -> bool:
        """Whether a loss has become older than ``grace_s`` since the last call: what was not heard since it
        is not believed any more."""
        before = self._losses_over
        while self._losses_over < self.losses and now - self.lost_at(self._losses_over) >= grace_s:
            self._losses_over += 1
        return self._losses_over > before


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
        self._heard_after = self._attention.losses
        self.lag = Lag()
        #: Of :attr:`lag`; another epoch may be published by another clock.
        self._lag_epoch = 0
        #: The epoch that the registry gave last.
        self.announced_epoch = 0
        #: Whether the publisher answered the last request.
        self.answers = False

    def heard(self) -> None:
        """A valid message of the current epoch arrived from this rank."""
        self._heard_at = self._attention.now
        if not self._attention.away:  # else it had come before, and waited here
            self._heard_after = self._attention.losses

    def note_lag(self, epoch: int, published_at_ns: int, now: float) -> None:
        """When a message of the current epoch was published, and that it arrived now."""
        if epoch != self._lag_epoch:
            self.lag, self._lag_epoch = Lag(), epoch
        self.lag.heard(published_at_ns, now)

    @property
    def late(self) -> bool:
        """Its messages arrive so late that they say too little of now."""
        return self.lag.seconds > self._options.max_lag_s

    @property
    def current(self) -> bool:
        """Contact was not lost since it was heard last."""
        return not self._attention.away and self._heard_after == self._attention.losses

    def is_over(self, source: Source, epoch: int) -> bool:
        """Whether what the registry says now, of the rank of this number, begins anew.

        One that has left does; one of another source spoke under this number first. A silent one may have
        begun again with a lower epoch: its clock was set back, and the registry had not heard of its last.
        """
        return self.departed or self.source != source or (self.silent and epoch < self.reader.epoch)

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
        if self.layout is None or self.reader.unreadable or self.broken is not None:
            return False
        if self.silent or self.late:
            return False
        return self._within_grace(self.stale_since, now) and self._within_grace(self._out_of_contact, now)

    def _within_grace(self, since: float | None, now: float) -> bool:
        return since is None or now - since < self._options.stale_grace_s

    @property
    def _out_of_contact(self) -> float | None:
        """Since when nothing was heard for a fault of ours; None: it was heard since."""
        if self._heard_after < self._attention.losses:
            return self._attention.lost_at(self._heard_after)
        return None

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
        return "live" if self.stale_since is None and self.current and not self.late else "stale"

    @property
    def reason(self) -> str:
        """For people: why it is not live, or what else they should know; empty: nothing."""
        if self.broken is not None:
            return self.broken
        if self.stale_since is not None:
            return self.stale_reason
        if self.late:
            return f"its messages arrive {self.lag.seconds:.1f} s late"
        if not self.current:
            return "the broker is away" if self._attention.away else "not heard since contact was lost"
        return self.remark
