"""Ways to choose a rank that others have published, to be compared with ours. Pure.

Each is written from what its authors describe, with their default numbers. In two respects each does better
here than at home: it gets what the caches really hold, where most of them estimate it, and it learns of each
first token and end at once. Sources: docs/placement.md.

sglang   the longest prefix, unless the ranks' queues differ much or no prefix is long
preble   E2: the longest prefix where it is more than half of the prompt, else the least of three costs
lbgr     the earliest end, by a queue that fades with time and by what the last predictions missed
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence

from vswa_plugin.selection import ENDED, SENT, Booked, Chooser, RoutedRequest, Scored
from vswa_plugin.simulation.costs import CostModel
from vswa_plugin.wire import Event, Rank

#: SGLang's router: below this share of the prompt a prefix is not followed; and when queues differ too much.
MATCHES, ABSOLUTE, RELATIVE = 0.3, 64, 1.5
#: Preble: how long a request counts as load, and how much more loaded a rank may be before it is left.
HISTORY_S, UNBALANCED = 180.0, 2.0
#: LBGR: the queue fades by a 32nd part every 20 ms; a prediction's error counts by a 20th part.
FADES_S, FORGETS = 0.02 / math.log(32 / 31), 0.05


class _Published:
    """Chooses by :meth:`cost`, the least of it; equals go to the fewer requests, then to the first."""

    def __init__(self, clock: Callable[[], float], cost: CostModel, blocks: int) -> None:
        self._clock = clock
        self._cost = cost
        self._blocks = blocks

    def score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float]:
        """The router's costs are not used."""
        return {}

    def select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        """The rank that this policy chooses."""
        costs = self.costs(request, candidates)
        loads = [each.candidate.load.requests for each in candidates]
        best = min(range(len(candidates)), key=lambda index: (costs[index], loads[index], index))
        return candidates[best].rank

    def costs(self, request: RoutedRequest, candidates: Sequence[Scored]) -> list[float]:
        """What each candidate costs, in a unit of the policy's own."""
        raise NotImplementedError

    def load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None:
        """Do nothing."""

    def rank_changed(self, rank: Rank, event: Event | None) -> None:
        """Do nothing: none of these follows events."""


class SGLang(_Published):
    """SGLang's cache-aware router."""

    def __init__(self, clock: Callable[[], float], cost: CostModel, blocks: int) -> None:
        super().__init__(clock, cost, blocks)
        self._stored: Counter[Rank] = Counter()

    def costs(self, request: RoutedRequest, candidates: Sequence[Scored]) -> list[float]:
        loads = [each.candidate.load.requests for each in candidates]
        least, most = min(loads), max(loads)
        if most - least > ABSOLUTE and most > RELATIVE * least:
            return [float(load) for load in loads]
        longest = max(each.candidate.cached_tokens for each in candidates)
        if longest > MATCHES * request.prompt_tokens:
            return [-float(each.candidate.cached_tokens) for each in candidates]
        return [float(self._stored[each.rank]) for each in candidates]

    def load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None:
        if step == SENT:
            self._stored[request.rank] += len(request.hashes) - request.cached_blocks


class _Tree:
    """What a rank got, in the order of use, and how often each block was requested lately."""

    def __init__(self, blocks: int) -> None:
        self.used: OrderedDict[int, None] = OrderedDict()
        self._blocks = blocks

    def use(self, hashes: Sequence[int]) -> None:
        for name in hashes:
            self.used[name] = None
            self.used.move_to_end(name)
        while len(self.used) > self._blocks:
            self.used.popitem(last=False)

    def lost(self, new_blocks: int, hits: Mapping[int, int]) -> int:
        """Hits of the blocks that so many new ones would evict."""
        over = len(self.used) + new_blocks - self._blocks
        return sum(hits[name] for name, _ in zip(self.used, range(over), strict=False))


class Preble(_Published):
    """Preble's E2, its global scheduler: exploit a long prefix, else explore."""

    def __init__(self, clock: Callable[[], float], cost: CostModel, blocks: int) -> None:
        super().__init__(clock, cost, blocks)
        self._history: deque[tuple[float, Rank, float, Sequence[int]]] = deque()
        self._load: Counter[Rank] = Counter()
        self._hits: Counter[int] = Counter()
        self._trees: dict[Rank, _Tree] = {}

    def costs(self, request: RoutedRequest, candidates: Sequence[Scored]) -> list[float]:
        self._expire()
        longest = max(each.candidate.cached_tokens for each in candidates)
        loads = {each.rank: float(self._load[each.rank]) for each in candidates}
        if longest > request.prompt_tokens - longest:
            holders = [each.rank for each in candidates if each.candidate.cached_tokens == longest]
            best = min(holders, key=lambda rank: loads[rank])
            if loads[best] <= UNBALANCED * min(loads.values()) + self._cost.prefill_s(
                request.prompt_tokens, 0
            ):
                return [float(each.rank != best) for each in candidates]
        found = []
        for each in candidates:
            cached = each.candidate.cached_tokens
            compute_s = self._cost.prefill_s(request.prompt_tokens, cached)
            new = len(request.sequence_hashes) - cached // request.block_size
            lost = self._tree(each.rank).lost(new, self._hits) * request.block_size
            found.append(loads[each.rank] + compute_s + lost * self._cost.per_token_s)
        return found

    def load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None:
        if step != SENT:
            return
        cached = max(0, request.prompt_len - request.prefill_tokens)
        took = self._cost.prefill_s(request.prompt_len, cached)
        self._history.append((self._clock(), request.rank, took, request.hashes))
        self._load[request.rank] += took  # type: ignore[assignment]
        self._hits.update(request.hashes)
        self._tree(request.rank).use(request.hashes)

    def _tree(self, rank: Rank) -> _Tree:
        return self._trees.setdefault(rank, _Tree(self._blocks))

    def _expire(self) -> None:
        since = self._clock() - HISTORY_S
        while self._history and self._history[0][0] < since:
            _, rank, took, hashes = self._history.popleft()
            self._load[rank] -= took  # type: ignore[assignment]
            self._hits.subtract(hashes)


class LearnedGreedy(_Published):
    """LBGR of arXiv 2601.18999, its routing half: the engines here evict as they do."""

    def __init__(self, clock: Callable[[], float], cost: CostModel, blocks: int) -> None:
        super().__init__(clock, cost, blocks)
        self._queue: dict[Rank, tuple[float, float]] = {}
        self._missed: Counter[Rank] = Counter()
        self._sent: dict[Hashable, tuple[float, float]] = {}

    def costs(self, request: RoutedRequest, candidates: Sequence[Scored]) -> list[float]:
        return [
            self._queued(each.rank)
            + self._cost.prefill_s(request.prompt_tokens, each.candidate.cached_tokens)
            + self._missed[each.rank]
            for each in candidates
        ]

    def load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None:
        now, rank = self._clock(), request.rank
        if step == SENT:
            queued = self._queued(rank)
            cached = max(0, request.prompt_len - request.prefill_tokens)
            took = self._cost.prefill_s(request.prompt_len, cached)
            self._sent[key] = now, queued + took
            self._queue[rank] = now, queued + took
        elif step == ENDED and (sent := self._sent.pop(key, None)) is not None:
            missed = max(0.0, now - sent[0] - sent[1])
            self._missed[rank] += FORGETS * (missed - self._missed[rank])  # type: ignore[assignment]

    def _queued(self, rank: Rank) -> float:
        at_s, seconds = self._queue.get(rank, (0.0, 0.0))
        return seconds * math.exp((at_s - self._clock()) / FADES_S)


#: Name -> (clock, cost model, blocks of a rank) -> a new policy.
PUBLISHED: Mapping[str, Callable[[Callable[[], float], CostModel, int], Chooser]] = {
    "sglang": SGLang,
    "preble": Preble,
    "lbgr": LearnedGreedy,
}
