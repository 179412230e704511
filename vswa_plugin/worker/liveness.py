"""An engine that hangs: how a worker knows, and that it ends whatever the engine does."""

from __future__ import annotations

import os
import sys
import threading

#: How often a worker looks after its engine.
WATCH_INTERVAL_S = 0.5
#: How long the end of a worker that has failed may take, its engine's above all.
END_TIMEOUT_S = 20.0


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


def end_at_any_rate(reason: str) -> None:
    """End the process in :data:`END_TIMEOUT_S`, should it still be there: a failed one that hangs in the end
    of its engine would never be started again.
    """

    def end() -> None:
        sys.stderr.write(f"vswa worker: failed: {reason}; its end took longer than {END_TIMEOUT_S:g} s\n")
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(END_TIMEOUT_S, end)
    timer.daemon = True
    timer.start()
