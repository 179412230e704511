"""All ranks of a router: their memories by rank, and what each will have cached of a prompt. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from vswa_plugin.blocks.reuse import RULES, ReuseRule
from vswa_plugin.errors import VswaError
from vswa_plugin.forecast.memory import RankMemory
from vswa_plugin.forecast.shape import Shape
from vswa_plugin.wire.events import Event, Layout, Rank

#: Hash units of the prompts that wait on a rank; beyond that the rank is promised what it has now. Their
#: turns are computed in Python for every choice: with hundreds of prompts, that held the router's loop.
MOST_WAITING = 1_024


class Forecasts:
    """The memories of all ranks. A rank without a layout, or whose rule fails, has none.

    The ends of requests are reported here, as a router knows them; their admissions are read from events.
    """

    def __init__(self, rules: Mapping[str, ReuseRule] = RULES) -> None:
        self._rules = rules
        self._ranks: dict[Rank, RankMemory] = {}
        self._of_request: dict[Hashable, Rank] = {}
        #: Ranks whose views are not to be believed: as in the window index, which scores them 0.
        self._unscored: set[Rank] = set()

    def get(self, rank: Rank) -> RankMemory | None:
        """The memory of a rank; None where nothing is known of it."""
        return self._ranks.get(rank)

    def apply(self, rank: Rank, event: Event) -> None:
        """One event of a rank; a layout begins from empty, but for what is under way there."""
        before = self._ranks.get(rank)
        if not isinstance(event, Layout):
            if before is not None:
                before.apply(event)
            return
        try:
            memory = RankMemory(Shape(event.cache_layout, event.memory, self._rules), ends_reported=True)
        except VswaError:
            self.drop(rank)
            return
        for request in before.under_way() if before is not None else ():
            memory.sent(request.key, request.names, request.prompt_len, reads_cache=request.reads_cache)
            if before is not None and request.key in before.running:
                memory.computed(request.key)
        self._ranks[rank] = memory

    def set_scored(self, rank: Rank, scored: bool) -> None:
        """A rank that is not scored is promised as the window index scores it."""
        if scored:
            self._unscored.discard(rank)
        else:
            self._unscored.add(rank)

    def drop(self, rank: Rank) -> None:
        """The rank is gone."""
        self._ranks.pop(rank, None)
        self._unscored.discard(rank)
        for key in [key for key, of in self._of_request.items() if of == rank]:
            del self._of_request[key]

    def sent(self, rank: Rank, key: Hashable, names: Sequence[int], prompt_len: int) -> None:
        """A request was given to a rank."""
        memory = self._ranks.get(rank)
        if memory is not None:
            self._of_request[key] = rank
            memory.sent(key, names, prompt_len)

    def first_token(self, key: Hashable) -> None:
        """Its prompt is computed, whatever the events have shown yet."""
        memory = self._memory_of(key)
        if memory is not None:
            memory.computed(key)

    def ended(self, key: Hashable) -> None:
        """It is over; again, or for one that is not known, this does nothing."""
        memory = self._memory_of(key)
        if memory is not None:
            memory.ended(key)
        self._of_request.pop(key, None)

    def promises(
        self, scores: Mapping[Rank, int], ranks: Iterable[Rank], names: Sequence[int], prompt_len: int
    ) -> dict[Rank, int]:
        """Cached tokens of a prompt when its turn comes on each of ``ranks``.

        :param scores: what each would reuse now, as the window index says it.
        """
        promised: dict[Rank, int] = {}
        for rank in ranks:
            now = scores.get(rank, 0)
            memory = None if rank in self._unscored else self._ranks.get(rank)
            if memory is None or memory.waiting_units > MOST_WAITING:
                promised[rank] = now
            else:
                promised[rank] = memory.promise(names, prompt_len, now)
        return promised

    def _memory_of(self, key: Hashable) -> RankMemory | None:
        rank = self._of_request.get(key)
        return None if rank is None else self._ranks.get(rank)
