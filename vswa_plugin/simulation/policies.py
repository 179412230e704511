"""Ways to choose a rank, all but the simplest by the router's own cost: only the cached tokens differ.

random, round-robin   do not look at the ranks
a scorer's name       the cost, with the cached tokens that the scorer predicts from the ranks' events
oracle                the cost, with what the caches themselves say at that moment
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import msgspec

from vswa_plugin.accuracy.pipeline import EventPipeline
from vswa_plugin.blocks.layout import CacheLayout, Naming
from vswa_plugin.blocks.memory import Memory
from vswa_plugin.engine.contract import BlocksStored, EventAdapter, Node, RawEvent
from vswa_plugin.engine.predicted import Prompt, Scorer
from vswa_plugin.selection import (
    Candidate,
    Chooser,
    LoadBook,
    RoutedRequest,
    Scored,
    Weights,
    adjusted,
    booked_prefill,
    choose,
    scored,
)
from vswa_plugin.wire import Event, Rank, layout_event

RANDOM, ROUND_ROBIN, ORACLE = "random", "round robin", "oracle"
#: No choice: one rank with the blocks of all, see ``Bench``.
ONE_CACHE = "one cache"
#: The model that simulated ranks serve, for those that choose.
MODEL = "simulated"


class Routed(NamedTuple):
    """One choice.

    :param rank: index of the chosen rank.
    :param promised: tokens that it was expected to reuse; None: the policy predicts nothing.
    :param agrees: whether the cost would choose the same with what the caches say; None: not by cost.
    """

    rank: int
    promised: int | None
    agrees: bool | None


class Policy(Protocol):
    """Chooses ranks, and follows the requests that it has placed. One run."""

    @property
    def listens(self) -> bool:
        """Whether :meth:`observe` is to get the ranks' events."""

    def route(self, key: int, prompt: Prompt, truth: Sequence[int]) -> Routed:
        """Choose for one request.

        :param key: names the request from here on.
        :param truth: tokens that each rank would reuse right now; only the oracle may choose by it.
        """

    def observe(self, rank: int, events: Sequence[RawEvent]) -> None:
        """Take in the events of a rank's engine."""

    def restarted(self, rank: int) -> None:
        """A rank has begun anew and holds nothing; what was under way there goes on."""

    def first_token(self, key: int) -> None:
        """The prompt of a request is computed."""

    def ended(self, key: int) -> None:
        """A request has ended."""


class Unaware:
    """Random or round robin."""

    listens = False

    def __init__(self, ranks: int, rng: random.Random | None) -> None:
        self._ranks = ranks
        self._rng = rng
        self._next = -1

    def route(self, key: int, prompt: Prompt, truth: Sequence[int]) -> Routed:
        self._next = (self._next + 1) % self._ranks
        return Routed(self._rng.randrange(self._ranks) if self._rng else self._next, None, None)

    def observe(self, rank: int, events: Sequence[RawEvent]) -> None:
        """Do nothing: the choice depends on no events and no load."""

    def restarted(self, rank: int) -> None:
        """Do nothing: the choice depends on no events and no load."""

    def first_token(self, key: int) -> None:
        """Do nothing: the choice depends on no events and no load."""

    def ended(self, key: int) -> None:
        """Do nothing: the choice depends on no events and no load."""


def whole_blocks(prompt: Prompt, naming: Naming) -> Sequence[int]:
    """Names of the prompt's prefixes that end with a block in which prompts are counted."""
    stride = naming.block_size // naming.hash_block_size
    return prompt.sequence_hashes[stride - 1 :: stride]


class RankEstimator(Protocol):
    """Estimates what one rank would reuse."""

    def feed(self, raw: RawEvent) -> object:
        """Take in one event of the rank's engine."""

    def predict(self, prompt: Prompt) -> int:
        """Tokens of the prompt that the rank would reuse."""

    def sent(self, prompt: Prompt) -> None:
        """The prompt goes to the rank, whose worker hands it to its event adapter."""

    def lost(self) -> None:
        """The rank holds nothing any more."""


class EventEstimator:
    """The estimate of a scorer that follows the events of one rank, as a router's does."""

    def __init__(
        self,
        layout: CacheLayout,
        new_adapter: Callable[[], EventAdapter],
        scorer: Scorer,
        watch: Callable[[Event], None] | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._scorer = scorer
        scorers = [scorer] if watch is None else [scorer, _Watcher(watch, memory)]
        self._pipeline = EventPipeline(layout, new_adapter, scorers)

    def feed(self, raw: RawEvent) -> None:
        self._pipeline.feed(raw)

    def predict(self, prompt: Prompt) -> int:
        self._pipeline.settle()
        return self._scorer.predict(prompt)

    def sent(self, prompt: Prompt) -> None:
        self._pipeline.prompt(prompt.token_ids, None, None)

    def lost(self) -> None:
        self._pipeline.lose()


class _Watcher:
    """Passes the events of a rank on, as the scorers get them."""

    name = "watcher"

    def __init__(self, watch: Callable[[Event], None], memory: Memory | None) -> None:
        self._watch = watch
        self._memory = memory

    def begin(self, layout: CacheLayout) -> None:
        self._watch(layout_event(msgspec.structs.replace(layout, model=MODEL), memory=self._memory))

    def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        """Do nothing: the events name the blocks."""

    def apply(self, event: Event) -> None:
        self._watch(event)

    def predict(self, prompt: Prompt) -> int:
        return 0


class ByCost:
    """The router's cost over what each rank is expected to reuse.

    :param views: per rank; None: the oracle, which goes by the caches themselves.
    :param chooser: adjusts the costs, or chooses; None: the cheapest is taken.
    """

    def __init__(
        self,
        ranks: int,
        views: Sequence[RankEstimator] | None,
        naming: Naming,
        rng: random.Random,
        weights: Weights | None = None,
        chooser: Chooser | None = None,
    ) -> None:
        self._ranks = [Rank(index) for index in range(ranks)]
        self._views = views
        self._naming = naming
        self._block_size = naming.block_size
        self._rng = rng
        self._weights = weights or Weights()
        self._book = LoadBook(naming.block_size)
        self._chooser = chooser
        if chooser is not None:
            self._book.watch = partial(chooser.load_changed, MODEL)

    @property
    def listens(self) -> bool:
        return self._views is not None

    def route(self, key: int, prompt: Prompt, truth: Sequence[int]) -> Routed:
        cached = truth if self._views is None else [view.predict(prompt) for view in self._views]
        candidates = self._scored(prompt, cached)
        chosen = self._choose(prompt, candidates).candidate
        index = chosen.rank.worker_id
        if self._views is not None:
            self._views[index].sent(prompt)
        agrees = None
        if self._chooser is None:
            true_costs = candidates if self._views is None else self._scored(prompt, truth)
            agrees = true_costs[index].cost <= min(each.cost for each in true_costs)
        prompt_len = len(prompt.token_ids)
        self._book.add(
            key,
            chosen.rank,
            whole_blocks(prompt, self._naming),
            prompt_len,
            booked_prefill(chosen, prompt_len, self._block_size, self._weights),
            cached_blocks=chosen.cached_tokens // self._block_size,
        )
        return Routed(index, chosen.cached_tokens, agrees)

    def observe(self, rank: int, events: Sequence[RawEvent]) -> None:
        if self._views is not None:
            for raw in events:
                self._views[rank].feed(raw)

    def restarted(self, rank: int) -> None:
        if self._views is not None:
            self._views[rank].lost()

    def first_token(self, key: int) -> None:
        self._book.first_token(key)

    def ended(self, key: int) -> None:
        self._book.free(key)

    def _choose(self, prompt: Prompt, candidates: Sequence[Scored]) -> Scored:
        if self._chooser is not None:
            hashes = whole_blocks(prompt, self._naming)
            request = RoutedRequest("", MODEL, len(prompt.token_ids), self._block_size, hashes)
            candidates = adjusted(candidates, self._chooser.score(request, candidates))
            wanted = self._chooser.select_worker(request, candidates)
            for each in candidates if wanted is not None else ():
                if each.rank == wanted:
                    return each
        return choose(candidates, self._weights.router_temperature, self._rng)

    def _scored(self, prompt: Prompt, cached: Sequence[int]) -> list[Scored]:
        size = self._block_size
        candidates = []
        blocks = whole_blocks(prompt, self._naming)
        for rank, tokens in zip(self._ranks, cached, strict=True):
            on_rank = self._book.projected(rank, blocks, tokens // size)
            candidates.append(
                Candidate(
                    rank,
                    tokens,
                    in_flight_tokens=on_rank.in_flight_blocks * size,
                    load=on_rank.load,
                    new_blocks=on_rank.new_blocks,
                )
            )
        return scored(candidates, len(prompt.token_ids), size, self._weights)
