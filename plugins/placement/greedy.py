"""The choice as Dynamo's own router makes it, with exact cached tokens. Pure."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence

from vswa_plugin.selection import Booked, RoutedRequest, Scored
from vswa_plugin.wire import Event, Rank


class Greedy:
    """Dynamo's formula with its default weights: a prefix that is just being computed does not count.

    :param rng: decides between equals.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float]:
        """The costs are left as they are."""
        return {}

    def select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        """The cheapest by :func:`dynamo_cost`."""
        costs = [dynamo_cost(each, request) for each in candidates]
        lowest = min(costs)
        best = [each.rank for each, cost in zip(candidates, costs, strict=True) if cost == lowest]
        return best[0] if len(best) == 1 else self._rng.choice(best)

    def load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None:
        """Do nothing: the candidates say what is on each rank."""

    def rank_changed(self, rank: Rank, event: Event | None) -> None:
        """Do nothing: the candidates say what each rank holds."""


def dynamo_cost(scored: Scored, request: RoutedRequest) -> float:
    """In blocks: what is to be computed there, also for others, and what requests hold, with this one.

    A decode worker is chosen by what it holds alone, and there by one more block for each request.
    """
    each, size = scored.candidate, request.block_size
    held = each.load.blocks + each.new_blocks
    if request.phase == "decode":
        return held + each.load.requests
    slow = each.host_blocks + each.disk_blocks
    cached = max(0.0, each.cached_tokens / size - slow) + 0.75 * each.host_blocks + 0.25 * each.disk_blocks
    to_compute = max(0.0, (each.load.prefill_tokens + request.prompt_tokens) / size - cached)
    return to_compute + (0 if request.phase == "prefill" else held)
