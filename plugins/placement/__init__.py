"""Where a request is placed with the next ones in mind; see README.md."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

from .cost import Placer, Prices
from .greedy import Greedy

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from vswa_plugin.engine import Section
    from vswa_plugin.selection import Booked, Chooser, RoutedRequest, Scored
    from vswa_plugin.wire import Event, Rank

MODES = ("off", "greedy", "placement")
#: What is not called in each mode.
UNUSED = {
    "off": (
        "vswa_score",
        "vswa_select_worker",
        "vswa_load_changed",
        "vswa_rank_changed",
        "vswa_choice_terms",
    ),
    "greedy": ("vswa_score", "vswa_load_changed", "vswa_rank_changed", "vswa_choice_terms"),
    "placement": ("vswa_select_worker",),
}
#: Until an operator says it; docs/decisions.md has the reason.
DEFAULT_MODE = "off"


class Placement:
    """The hooks of one router or selector.

    :param clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._greedy = Greedy(random.Random())
        self._placer = Placer(clock)

    @hookimpl
    def vswa_options(self, options: Section) -> Sequence[str]:
        options.check({"mode", *Prices.__struct_fields__})
        mode = "off" if options.data.get("mode") is False else options.choice("mode", MODES, DEFAULT_MODE)
        defaults = Prices()
        prices = Prices(
            **{name: options.seconds(name, getattr(defaults, name)) for name in Prices.__struct_fields__}
        )
        self._placer = Placer(self._clock, prices)
        return UNUSED[mode]

    @hookimpl
    def vswa_score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float]:
        """Turn the router's costs into those of placement."""
        return self._placer.score(request, candidates)

    # Last: what another plugin chooses on purpose counts more.
    @hookimpl(trylast=True)
    def vswa_select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        """Choose by Dynamo's formula."""
        return self._greedy.select_worker(request, candidates)

    @hookimpl
    def vswa_load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None:
        self._placer.load_changed(model, key, step, request)

    @hookimpl
    def vswa_rank_changed(self, rank: Rank, event: Event | None) -> None:
        self._placer.rank_changed(rank, event)

    @hookimpl
    def vswa_choice_terms(
        self, request: RoutedRequest, candidates: Sequence[Scored]
    ) -> Mapping[Rank, Mapping[str, float]] | None:
        return self._placer.shown(request, candidates)

    @hookimpl
    def vswa_simulated_choosers(self, clock: Callable[[], float]) -> Mapping[str, Chooser]:
        """Both ways, with their default options."""
        return {"dynamo": Greedy(random.Random(0)), "placement": Placer(clock)}
