"""Requests of a gateway counted: how many came, are under way, and what became of the others.

picked        it went to the workers that were chosen for it
passed        it went on without a choice: it generates nothing, or the frontend refuses it
refused       it was answered here (4xx)
unavailable   the same with 429 or 503: no worker could serve it
failed        something of the picker failed; what happens then is the gateway's to say
gone          its client went before a choice was made
"""

from __future__ import annotations

from collections import Counter

from vswa_plugin.router.tallies import OTHER, Buckets, Names

PICKED, PASSED, REFUSED, UNAVAILABLE, FAILED, GONE = (
    "picked",
    "passed",
    "refused",
    "unavailable",
    "failed",
    "gone",
)
OUTCOMES = (PICKED, PASSED, REFUSED, UNAVAILABLE, FAILED, GONE)
#: Seconds.
DURATION_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class PickerCounts:
    """Since the start. Event loop only.

    :ivar outcomes: by model and outcome; requests that name no model of ours are counted together.
    :ivar under_way: requests whose stream is open.
    :ivar preprocessing: seconds to make the tokens of a request; ``picking``: with the choice, from its last
        byte on.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.under_way = 0
        self.preprocessing = Buckets(DURATION_BOUNDS)
        self.picking = Buckets(DURATION_BOUNDS)
        self._names = Names()

    def end(self, model: str | None, outcome: str) -> None:
        """What becomes of a request is known; ``model``: None where it names none of ours."""
        self.outcomes[OTHER if model is None else self._names.label(model), outcome] += 1
