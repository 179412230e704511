"""By how much the messages of one publisher come late. Pure.

The clocks of two machines differ, so that the age of a message says little. What says something is its delay
beyond the least one: a message that was published one second after the last, and arrives three seconds after
it, is two seconds late. A clock that is set back or forward is no lag.
"""

from __future__ import annotations

#: Share of each second by which lag shrinks: what a clock that was set back a little left of it wears off.
FORGOTTEN = 0.01


class Lag:
    """Of one epoch of one publisher.

    :ivar seconds: delay of the last message beyond the least one.
    """

    __slots__ = ("_arrived", "_published_ns", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._published_ns: int | None = None
        self._arrived = 0.0

    def heard(self, published_at_ns: int, now: float) -> None:
        """A message arrived.

        :param published_at_ns: by the publisher's clock.
        :param now: seconds of the reader's monotonic clock.
        """
        if self._published_ns is not None and published_at_ns >= self._published_ns:
            between = now - self._arrived
            later = between - (published_at_ns - self._published_ns) / 1e9
            self.seconds = max(0.0, self.seconds - FORGOTTEN * between + later)
        # Else it is the first one, or an earlier one than the last: a repeat, or the clock was set back.
        self._published_ns, self._arrived = published_at_ns, now
