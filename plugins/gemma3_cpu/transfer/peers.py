"""Who is connected, and who of them must make room. Pure: no I/O, no thread, a given clock; not thread-safe.

A peer that has said nothing of use for a moment gives its place to the next one when all places are taken:
first the one that has been silent for longest, of the host that has most silent ones. A host that brings
wrong tickets again and again is not listened to for a while.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable

#: Silence for that long is no delay of the network.
SILENT_S = 0.1
#: A decode worker has a wrong ticket where it comes too late; so many in so many seconds are guesses.
MAX_WRONG, WINDOW_S = 100, 10.0
#: Hosts of which wrong tickets are remembered.
MAX_HOSTS = 1_024


class Peers:
    """:param places: for peers at a time.
    :param clock: seconds, monotonic.
    """

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = places
        self._clock = clock
        self._holders: set[Hashable] = set()
        #: Host, and time of coming, of those that have said nothing of use yet; in order.
        self._silent: dict[Hashable, tuple[str, float]] = {}
        #: Wrong tickets by host since the window began.
        self._wrong: Counter[str] = Counter()
        self._window_ends = 0.0

    @property
    def full(self) -> bool:
        return len(self._holders) >= self._places

    def enter(self, peer: Hashable, host: str) -> None:
        """A peer takes a place."""
        self._holders.add(peer)
        self._silent[peer] = (host, self._clock())

    def spoke(self, peer: Hashable) -> None:
        """It has brought a good ticket: it keeps its place until it leaves."""
        self._silent.pop(peer, None)

    def leave(self, peer: Hashable) -> None:
        """Its place is free, unless another one has it already."""
        self._holders.discard(peer)
        self._silent.pop(peer, None)

    def displace(self) -> Hashable | None:
        """A peer that has been silent for long enough, whose place is free now; None: there is none."""
        until = self._clock() - SILENT_S
        silent = [(peer, host) for peer, (host, came) in self._silent.items() if came <= until]
        if not silent:
            return None
        host, _ = Counter(host for _, host in silent).most_common(1)[0]
        peer = next(each for each, of in silent if of == host)
        self.leave(peer)
        return peer

    def next_silent(self) -> float | None:
        """Seconds until :meth:`displace` may find one more; None: as it stands, never."""
        if not self._silent:
            return None
        _, came = next(iter(self._silent.values()))
        return max(0.0, came + SILENT_S - self._clock())

    def wrong(self, host: str) -> None:
        """It has brought a ticket that is good for nothing."""
        self._new_window()
        if host in self._wrong or len(self._wrong) < MAX_HOSTS:
            self._wrong[host] += 1

    def is_barred(self, host: str) -> bool:
        """Whether its next connections are closed unheard."""
        self._new_window()
        return self._wrong[host] > MAX_WRONG

    def _new_window(self) -> None:
        if self._clock() >= self._window_ends:
            self._wrong.clear()
            self._window_ends = self._clock() + WINDOW_S
