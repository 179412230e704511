"""What each choice costs, in seconds: now for this request, and later for others. Pure.

    cost = wait + price * (compute + room + loss) + held

wait      until the prompts before it on the rank are computed
compute   of what the rank does not hold of the prompt
room      seconds of the whole rank that the request's blocks take up while it runs
loss      seconds to compute again what is evicted for it and expected back
held      pressure of the blocks that requests under way hold there
price     what a second of a rank's time costs all: more, the more requests wait
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from vswa_plugin.selection import ENDED, FIRST_TOKEN, SENT, Booked, Candidate, RoutedRequest, Scored
from vswa_plugin.wire import Event, Layout, Rank

from .holdings import Holdings, sampled
from .odds import ReuseOdds
from .pace import Pace

#: Blocks whose last request is remembered, per model: of these one in ``SAMPLE`` is.
MOST_SAMPLED = 65_536
#: Of a block in host memory or on disk, what must be paid of computing it: 1 minus Dynamo's credits.
HOST_COST, DISK_COST = 0.25, 0.75


class Prices(msgspec.Struct, frozen=True):
    """What the terms weigh.

    :param base: price of a rank's second where nothing waits.
    :param per_waiting: what each request that waits, in the mean over the ranks, adds to it.
    :param room: weight of the room that a request takes up.
    :param loss: weight of what is evicted.
    :param held: weight of what is held already.
    :param copy_worth: worth of a block that another rank holds too: little is lost with it.
    """

    base: float = 3.0
    per_waiting: float = 1.0
    room: float = 1.0
    loss: float = 1.0
    held: float = 0.3
    copy_worth: float = 0.1


class Terms(NamedTuple):
    """One rank, in seconds but for ``price``.

    :ivar evicted: blocks that go; ``back``: of these, how many are expected to be requested again.
    """

    wait: float
    compute: float
    room: float
    loss: float
    held: float
    price: float
    evicted: float
    back: float

    @property
    def total(self) -> float:
        return self.wait + self.price * (self.compute + self.room + self.loss) + self.held


class _Model:
    """What is known of one model."""

    def __init__(self, prices: Prices) -> None:
        self.odds = ReuseOdds(MOST_SAMPLED)
        self.holdings = Holdings(self.odds, prices.copy_worth)
        self.pace = Pace()


class _Choice:
    """One request, and what each rank costs it.

    :ivar price: of a second of a rank's time.
    """

    def __init__(
        self, model: _Model, prices: Prices, request: RoutedRequest, candidates: Sequence[Scored]
    ) -> None:
        self._paces = model.pace.ranks
        self._holdings = model.holdings
        self._prices = prices
        self._tokens = request.prompt_tokens
        self._blocks = len(request.sequence_hashes)
        self._size = request.block_size
        self._fixed_s, self.token_s = model.pace.line
        self._hold_s = model.pace.hold_s
        waiting = sum(self._paces[each.rank].waiting for each in candidates)
        self.price = prices.base + prices.per_waiting * waiting / len(candidates)

    def now(self, each: Candidate) -> tuple[float, float, float, float]:
        """Wait, compute, room and held, in seconds."""
        pace, load = self._paces[each.rank], each.load
        wait = pace.slower * (self._fixed_s * pace.waiting + self.token_s * load.prefill_tokens)
        wait += pace.waiting * pace.blocked_s
        tokens: float = self._tokens - each.cached_tokens - each.in_flight_tokens
        if each.host_blocks or each.disk_blocks:
            tokens += (HOST_COST * each.host_blocks + DISK_COST * each.disk_blocks) * self._size
        compute = pace.slower * (self._fixed_s + self.token_s * max(1, tokens))
        capacity = self._holdings.capacity(each.rank)
        if capacity is None:
            return wait, compute, 0.0, 0.0
        block_s = self._hold_s / capacity
        return (
            wait,
            compute,
            self._prices.room * each.new_blocks * block_s,
            self._prices.held * load.blocks * block_s,
        )

    def later(self, each: Candidate) -> tuple[float, float, float]:
        """Loss in seconds, blocks that are evicted, and how many of these are expected back."""
        reused = (each.cached_tokens + each.in_flight_tokens) // self._size
        evicted, back = self._holdings.victims(each.rank, self._blocks - reused)
        return self._prices.loss * back * self._size * self.token_s, evicted, back


class Placer:
    """Places the requests of all models, and follows what becomes of them.

    :param clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float], prices: Prices | None = None) -> None:
        self._clock = clock
        self._prices = prices or Prices()
        self._models: dict[str, _Model] = {}
        self._model_of: dict[Rank, str] = {}
        #: Ranks that only generate: what is given to them has been counted on its prefill rank.
        self._generating: set[Rank] = set()

    # -- what happens --------------------------------------------------------------------------------

    def rank_changed(self, rank: Rank, event: Event | None) -> None:
        """What a rank holds has changed; None: the rank has gone."""
        if isinstance(event, Layout):
            self._leave(rank)
            self._model_of[rank] = event.model
        name = self._model_of.get(rank)
        if name is None:
            return
        if event is None:
            self._leave(rank)
            return
        self._model(name).holdings.apply(rank, event)

    def load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None:
        """A request was given to a rank (``sent``), has its ``first_token``, or has ``ended``."""
        if request.rank in self._generating:
            return
        known, now = self._model(model), self._clock()
        if step == SENT:
            known.odds.seen(sampled(request.hashes))
            known.holdings.used(request.rank, request.hashes, request.cached_blocks)
            known.pace.sent(key, request.rank, request.prefill_tokens, now)
        elif step == FIRST_TOKEN:
            known.pace.first_token(key, now)
        elif step == ENDED:
            known.pace.ended(key, now)

    # -- the choice ----------------------------------------------------------------------------------

    def terms(self, request: RoutedRequest, candidates: Sequence[Scored]) -> list[Terms]:
        """What each candidate costs, in their order."""
        choice = self._choice(request, candidates)
        found = []
        for each in candidates:
            wait, compute, room, held = choice.now(each.candidate)
            loss, evicted, back = choice.later(each.candidate)
            found.append(Terms(wait, compute, room, loss, held, choice.price, evicted, back))
        return found

    def score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float]:
        """Blocks that turn the router's costs into :meth:`terms`, of which a block's seconds are one block.

        What a rank would evict is looked at only where it could still be the cheapest; else its loss is left
        out. Where a request is routed to be decoded, nothing is computed or stored that a choice could save.
        """
        if request.phase == "decode":
            self._generating.update(each.rank for each in candidates)
            return {}
        choice = self._choice(request, candidates)
        costs = []
        for each in candidates:
            wait, compute, room, held = choice.now(each.candidate)
            costs.append(wait + choice.price * (compute + room) + held)
        lowest = math.inf
        for index in sorted(range(len(costs)), key=costs.__getitem__):
            if costs[index] > lowest:
                break
            costs[index] += choice.price * choice.later(candidates[index].candidate)[0]
            lowest = min(lowest, costs[index])
        block_s = choice.token_s * request.block_size
        return {
            each.rank: cost / block_s - plain_cost(each, request)
            for each, cost in zip(candidates, costs, strict=True)
        }

    def _choice(self, request: RoutedRequest, candidates: Sequence[Scored]) -> _Choice:
        return _Choice(self._model(request.model), self._prices, request, candidates)

    def shown(
        self, request: RoutedRequest, candidates: Sequence[Scored]
    ) -> Mapping[Rank, Mapping[str, float]] | None:
        """The terms by name, in seconds or blocks; None: the router's own cost is not changed."""
        if request.phase == "decode":
            return None
        return {
            each.rank: {**term._asdict(), "total": term.total}
            for each, term in zip(candidates, self.terms(request, candidates), strict=True)
        }

    def select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        """None: the cheapest."""
        return None

    def _model(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = _Model(self._prices)
        return model

    def _leave(self, rank: Rank) -> None:
        name = self._model_of.pop(rank, None)
        self._generating.discard(rank)
        if name is not None:
            model = self._model(name)
            model.holdings.apply(rank, None)
            model.pace.forget(rank)


def plain_cost(scored: Scored, request: RoutedRequest) -> float:
    """The router's own cost of a candidate with its default weights, in blocks.

    What a client's preferences or other weights change of the cost is left as it is.
    """
    each, size = scored.candidate, request.block_size
    slow = each.host_blocks + each.disk_blocks
    credited = max(0.0, each.cached_tokens / size - slow) + 0.75 * each.host_blocks + 0.25 * each.disk_blocks
    to_compute = (
        each.load.prefill_tokens + request.prompt_tokens - 2 * each.in_flight_tokens
    ) / size - credited
    held = each.load.blocks + each.new_blocks if request.phase == "agg" else 0
    return max(0.0, to_compute) + held
