"""An engine that hangs: how a worker knows."""

from __future__ import annotations

#: How often a worker looks after its engine.
WATCH_INTERVAL_S = 0.5


class Stall:
    """Whether an engine hangs, by how often its worker has looked: a worker that is held up itself does not
    take the time for silence of the engine.

    :param timeout_s: 0: it never does.
    """

    def __init__(self, timeout_s: float) -> None:
        self._looks = timeout_s / WATCH_INTERVAL_S
        self._signs = 0
        self._quiet = 0

    def seen(self, in_flight: int, signs_of_life: int) -> bool:
        """After each look: whether there was no sign of life for too long."""
        if not in_flight or signs_of_life != self._signs:
            self._signs, self._quiet = signs_of_life, 0
            return False
        self._quiet += 1
        return 0 < self._looks <= self._quiet
