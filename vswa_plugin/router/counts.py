"""Requests counted: how many came, are under way, and how the others ended.

Each is counted once: those received are those that ended, by outcome, and those under way. Draining waits for
the latter.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from vswa_plugin.engine.outcomes import outcome_of_error
from vswa_plugin.router.tallies import OTHER, Names


class RequestCounts:
    """The requests of one router, by model. Event loop only.

    :ivar received: by model.
    :ivar ended: by model and outcome.
    :ivar in_flight: by model.
    :ivar prefill_retries: prompts that were given to another prefill worker because the first was lost.
    :ivar decode_retries: finished prompts that were given to another decode worker, for the same reason.
    :ivar released_prompts: finished prompts that a prefill worker freed because no decode worker would come.
    """

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()
        self.in_flight: Counter[str] = Counter()
        self.prefill_retries: Counter[str] = Counter()
        self.decode_retries: Counter[str] = Counter()
        self.released_prompts: Counter[str] = Counter()
        self._names = Names()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def under_way(self) -> int:
        return self.in_flight.total()

    def turned_away(self, model: str | None, error: Exception) -> None:
        """A request came and was not begun; ``model``: None where there is no such model."""
        label = OTHER if model is None else self._names.label(model)
        self.received[label] += 1
        self.ended[label, outcome_of_error(error)] += 1

    def began(self, model: str) -> None:
        """One request more is under way."""
        label = self._names.label(model)
        self.received[label] += 1
        self.in_flight[label] += 1
        self._idle.clear()

    def end(self, model: str, outcome: str) -> None:
        """One request is under way no more."""
        label = self._names.label(model)
        self.ended[label, outcome] += 1
        self.in_flight[label] -= 1
        if not self.under_way:
            self._idle.set()

    def prefill_retried(self, model: str) -> None:
        self.prefill_retries[self._names.label(model)] += 1

    def decode_retried(self, model: str) -> None:
        self.decode_retries[self._names.label(model)] += 1

    def released(self, model: str) -> None:
        self.released_prompts[self._names.label(model)] += 1

    async def idle(self, timeout_s: float) -> bool:
        """Wait until no request is under way; False where some still are after the time-out."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
