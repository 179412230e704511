"""A term in the router's cost: each active request of a rank costs a few blocks more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vswa_plugin.engine import Section
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.selection import RoutedRequest, Scored
from vswa_plugin.wire import Rank


class ExampleCost:
    """An instance for each router. Options: ``blocks`` (8), the cost of one active request."""

    def __init__(self) -> None:
        self._blocks = 8

    @hookimpl
    def vswa_options(self, options: Section) -> None:
        options.check({"blocks"})
        self._blocks = options.integer("blocks", 8, low=0)

    @hookimpl
    def vswa_score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float]:
        """On the path of every request: no I/O, no waiting."""
        return {each.rank: self._blocks * each.candidate.load.requests for each in candidates}
