"""Requests of a worker counted: each that came has ended, in one way, or is under way."""

from __future__ import annotations

from collections import Counter

from vswa_plugin.engine.outcomes import COMPLETED, outcome_of, outcome_of_error

#: Of completed requests; an engine's other ones are counted together: labels must be few.
FINISH_REASONS = ("stop", "eos", "length", "content_filter")
OTHER = "other"


class RequestCounts:
    """Since the start. Event loop only.

    :ivar ended: by outcome and, of completed ones, finish reason.
    """

    def __init__(self) -> None:
        self.received = 0
        self.ended: Counter[tuple[str, str]] = Counter()

    def end(self, finish_reason: str) -> None:
        """A request has ended with that last chunk."""
        outcome, reason = outcome_of(finish_reason), ""
        if outcome == COMPLETED:
            reason = finish_reason if finish_reason in FINISH_REASONS else OTHER
        self.ended[outcome, reason] += 1

    def fail(self, error: Exception) -> None:
        """A request has ended with that error."""
        self.ended[outcome_of_error(error), ""] += 1
