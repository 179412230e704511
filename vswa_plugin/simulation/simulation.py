"""Simulated ranks behind a router: requests in, what was reused and how long it took out. Pure.

A discrete-event simulation. Each rank computes one prompt at a time, first come first served; what it
generates goes on beside. A prompt is matched when its turn comes, its blocks can be reused when it is
computed, and it holds them until its last token. The router learns of all this at once.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import msgspec

from vswa_plugin.blocks.hashing import prefix_names
from vswa_plugin.blocks.layout import Naming
from vswa_plugin.engine.predicted import Prompt, RankSequence, SimulatedRank
from vswa_plugin.simulation.costs import CostModel
from vswa_plugin.simulation.policies import Policy, Routed, whole_blocks
from vswa_plugin.simulation.workloads import Arrival, Request


class Totals(msgspec.Struct):
    """Sums over one run, in tokens unless said otherwise.

    :param refused: requests that are larger than a rank's cache; they count nowhere else.
    :param new_tokens: computed behind all whole blocks that a request before had.
    :param promised: for the chosen ranks; None: the policy promises nothing.
    :param kept: of the promises, what was reused.
    :param true_promises: promises that were right, in whole blocks, when they were made.
    :param kept_promises: promises that were right, in whole blocks, when the prompt's turn came.
    :param agreed: choices that are the cheapest by what the caches held; None: not by cost.
    :param ttft_s: of each request, in order of the first tokens.
    :param busy_s: seconds of prefill, per rank.
    """

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0
    promised: int | None = None
    kept: int = 0
    true_promises: int = 0
    kept_promises: int = 0
    agreed: int | None = None
    end_s: float = 0.0
    ttft_s: list[float] = []
    busy_s: list[float] = []

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def recomputed_tokens(self) -> int:
        """Computed though some rank had computed them before."""
        return self.computed_tokens - self.new_tokens


class _Job(msgspec.Struct):
    """A request on its way; ``routed`` says where to."""

    key: int
    arrival: Arrival
    routed: Routed
    new_tokens: int

    @property
    def request(self) -> Request:
        return self.arrival.request


class _Server:
    """One rank's queue."""

    def __init__(self, rank: SimulatedRank) -> None:
        self.rank = rank
        self.queue: deque[_Job] = deque()
        self.busy = False
        self.busy_s = 0.0


class Clock:
    """The simulated time, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Faults(msgspec.Struct, frozen=True):
    """What is wrong with the first rank.

    :param slower: it takes so many times as long to compute.
    :param restart_after: it begins anew when so many requests have come; None: never.
    :param fresh: makes the rank that it is then.
    """

    slower: float = 1.0
    restart_after: int | None = None
    fresh: Callable[[], SimulatedRank] | None = None


class Simulation:
    """One policy in front of ``ranks``, which hold nothing yet. :meth:`run` once.

    :param naming: how the prefixes of prompts are named and counted.
    :param clock: shows the time to the policy.
    """

    def __init__(
        self,
        ranks: Sequence[SimulatedRank],
        policy: Policy,
        cost: CostModel,
        naming: Naming,
        clock: Clock | None = None,
        faults: Faults | None = None,
    ) -> None:
        self._clock = clock or Clock()
        self._faults = faults or Faults()
        self._servers = [_Server(rank) for rank in ranks]
        self._policy = policy
        self._cost = cost
        self._naming = naming
        self._block_size = naming.block_size
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._seen: set[int] = set()
        self.totals = Totals()

    def run(self, arrivals: Iterable[Arrival], progress: Callable[[int], None] = lambda done: None) -> Totals:
        """Serve all ``arrivals``, which come in order of their times.

        :param progress: called from time to time with the number that have arrived.
        """
        for index in range(len(self._servers)):
            self._tell(index)
        for key, arrival in enumerate(arrivals):
            self._run_until(arrival.at_s)
            self._clock.now = arrival.at_s
            if key == self._faults.restart_after:
                self._restart()
            self._arrive(key, arrival)
            if key % 64 == 0:
                progress(key)
        self._run_until(float("inf"))
        self.totals.busy_s = [server.busy_s for server in self._servers]
        self.totals.end_s = self._clock.now
        return self.totals

    def _run_until(self, at_s: float) -> None:
        while self._agenda and self._agenda[0][0] <= at_s:
            self._clock.now, _, action = heapq.heappop(self._agenda)
            action()

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self._clock.now + delay_s, next(self._numbers), action))

    def _restart(self) -> None:
        """The first rank holds nothing any more. What it computes and generates goes on, on what was."""
        assert self._faults.fresh is not None, "a restart needs another rank"
        self._servers[0].rank = self._faults.fresh()
        self._policy.restarted(0)

    def _arrive(self, key: int, arrival: Arrival) -> None:
        tokens = arrival.request.prompt
        if not all(server.rank.fits(len(tokens), len(arrival.request.output)) for server in self._servers):
            self.totals.refused += 1
            return
        prompt = Prompt(tokens, prefix_names(tokens, self._naming.hash_block_size, self._naming.lookahead))
        truth = [server.rank.would_reuse(tokens) for server in self._servers]
        routed = self._policy.route(key, prompt, truth)
        job = _Job(key, arrival, routed, self._new_tokens(prompt))
        self._count_choice(routed, truth[routed.rank])
        self._servers[routed.rank].queue.append(job)
        self._next(routed.rank)

    def _new_tokens(self, prompt: Prompt) -> int:
        """Tokens behind the longest prefix, in whole blocks, that any request before had."""
        hashes = whole_blocks(prompt, self._naming)
        known_blocks = next((i for i, each in enumerate(hashes) if each not in self._seen), len(hashes))
        self._seen.update(hashes[known_blocks:])
        return len(prompt.token_ids) - min(known_blocks * self._block_size, len(prompt.token_ids) - 1)

    def _count_choice(self, routed: Routed, truth: int) -> None:
        totals, size = self.totals, self._block_size
        if routed.promised is not None:
            totals.promised = (totals.promised or 0) + routed.promised
            totals.true_promises += routed.promised // size == truth // size
        if routed.agrees is not None:
            totals.agreed = (totals.agreed or 0) + routed.agrees

    def _next(self, index: int) -> None:
        """Begin the first prompt that waits, if the rank is free and has room for it."""
        server = self._servers[index]
        while server.queue and not server.busy:
            job = server.queue[0]
            sequence = server.rank.open(job.request.prompt, len(job.request.output))
            if sequence is None:  # a request that ends makes room
                return
            server.queue.popleft()
            self._begin(index, job, sequence)

    def _begin(self, index: int, job: _Job, sequence: RankSequence) -> None:
        server, totals, size = self._servers[index], self.totals, self._block_size
        cached, prompt_len = sequence.cached_tokens, len(job.request.prompt)
        totals.requests += 1
        totals.prompt_tokens += prompt_len
        # A part of some block may have been reused that no request before had whole.
        totals.new_tokens += min(job.new_tokens, prompt_len - cached)
        totals.cached_tokens += cached
        if (promised := job.routed.promised) is not None:
            totals.kept += min(promised, cached)
            totals.kept_promises += promised // size == cached // size
        took = self._cost.prefill_s(prompt_len, cached) * (self._faults.slower if index == 0 else 1.0)
        server.busy = True
        server.busy_s += took
        self._tell(index)
        self._later(took, partial(self._computed, index, job, sequence))

    def _computed(self, index: int, job: _Job, sequence: RankSequence) -> None:
        sequence.compute_prompt()
        self._tell(index)
        self._policy.first_token(job.key)
        self.totals.ttft_s.append(self._clock.now - job.arrival.at_s)
        self._later(self._cost.decode_s(len(job.request.output)), partial(self._ended, index, job, sequence))
        self._servers[index].busy = False
        self._next(index)

    def _ended(self, index: int, job: _Job, sequence: RankSequence) -> None:
        sequence.finish(job.request.output)
        self._tell(index)
        self._policy.ended(job.key)
        self._next(index)

    def _tell(self, index: int) -> None:
        if self._policy.listens:
            self._policy.observe(index, self._servers[index].rank.take_events())
