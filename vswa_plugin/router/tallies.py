"""Numbers for metrics: histograms, and labels of which there is a bounded number. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

#: The label of what is counted together: further models, workers that have gone.
OTHER = "other"
MAX_MODELS = 64


class Buckets:
    """A histogram. ``bounds``: upper ones, rising; above the last there is one bucket more."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.sum = 0.0
        self.counts = [0] * (len(bounds) + 1)
        self._bounds = bounds

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float) -> None:
        self.sum += value
        self.counts[bisect_left(self._bounds, value)] += 1

    def cumulative(self) -> list[tuple[str, float]]:
        """(bound, values up to it), as Prometheus has them."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))


class Names:
    """Gives each name its label: its own for the first ``most``, :data:`OTHER` for all that come later.

    Names come from outside, and a counter must not vanish: without a bound each new one would stay for ever.
    """

    def __init__(self, most: int = MAX_MODELS) -> None:
        self._most = most
        self._known: set[str] = set()

    def label(self, name: str) -> str:
        if name not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(name)
        return name
