"""One choice: what each rank would reuse, what is on it, what it costs, which is chosen, and the booking."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from vswa_plugin.engine.contract import RequestDict
from vswa_plugin.engine.requests import Fields, unchecked_token_ids
from vswa_plugin.errors import InvalidRequest
from vswa_plugin.index import WindowIndex
from vswa_plugin.router.pools import Pool
from vswa_plugin.selection import (
    Candidate,
    Constraints,
    NoHooks,
    RoutedRequest,
    Scored,
    SelectionHooks,
    Weights,
    adjusted,
    booked_prefill,
    choose,
    eligible,
    of_phase,
    overridden,
    scored,
)
from vswa_plugin.wire.events import Rank

#: (token ids, block size, cache salt, LoRA) -> sequence hashes of the full blocks
Hasher = Callable[[Sequence[int], int, str | None, str | None], Sequence[int]]
_NO_TAINTS: frozenset[str] = frozenset()


class PromptHashes(msgspec.Struct, frozen=True):
    """What routing needs to know of a request.

    :param hashes: sequence hashes of its full blocks.
    :param scorable: False: its tokens do not say what it consists of (images), no reuse is promised.
    """

    length: int
    hashes: Sequence[int]
    scorable: bool = True


class Decision(msgspec.Struct, frozen=True):
    """The rank that serves a request, and what was known when it was chosen.

    :param key: of the request in the load book.
    :param cached_tokens: promised for the chosen rank.
    :param prompt: what was read of the request; the next choice for it need not read it again.
    :param busy: whether other requests were active there.
    :param in_flight: whether they were computing more of its prompt, which it may or may not find cached.
    """

    key: int
    rank: Rank
    cost: float
    cached_tokens: int
    prompt: PromptHashes
    busy: bool
    in_flight: bool

    @property
    def prompt_len(self) -> int:
        return self.prompt.length


class DecisionStats(msgspec.Struct):
    """Counters since start."""

    decisions: int = 0
    seconds: float = 0.0


class Decider:
    """Scores, selects and books. Event loop only.

    :param index: what all ranks hold.
    :param hasher: as ``dynamo.client.namespaced_sequence_hashes``.
    :param rng: breaks ties and draws by temperature.
    """

    def __init__(
        self,
        index: WindowIndex,
        weights: Weights,
        hasher: Hasher,
        hooks: SelectionHooks | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.stats = DecisionStats()
        self._index = index
        self._weights = weights
        self._hasher = hasher
        self._hooks = hooks if hooks is not None else NoHooks()
        self._rng = rng if rng is not None else random.Random()
        self._last_key = 0

    @property
    def hooked(self) -> bool:
        """Whether plugins may want to know what the client sent along."""
        return not isinstance(self._hooks, NoHooks)

    @property
    def tracks_output(self) -> bool:
        """Whether the load book wants to know of generated tokens."""
        return self._weights.track_output_blocks

    def decide(
        self,
        pool: Pool,
        request: RequestDict,
        *,
        reachable: Collection[int] | None = None,
        avoided: Mapping[int, float] = MappingProxyType({}),
        prompt: PromptHashes | None = None,
        own_id: int | None = None,
        request_id: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> Decision:
        """Choose a rank of ``pool`` for ``request`` and book it there.

        :param reachable: workers that can be called right now; None: all of the pool.
        :param avoided: workers that are chosen only where there is no other, and until when.
        :param prompt: of the request, where it is known already: from the choice of its other phase.
        :param own_id: a pin to this id is not one: it is how the frontend addresses the router.
        :raises NoCandidate: no worker may serve it now.
        :raises InvalidRequest: what it says about routing cannot be read, or pins it to an absent worker.
        """
        began = time.perf_counter()
        fields = Fields(request)
        routing = fields.object("routing")
        weights = of_phase(overridden(self._weights, request.get("router_config_override")), pool.phase)
        constraints = constraints_of(routing.data, own_id, pool.phase)
        ranks = eligible(_among(pool.ranks, reachable), constraints, pool.taints)
        if avoided:
            ranks = _preferred(ranks, avoided)
        if prompt is None:
            prompt = self._prompt(fields, routing, pool.block_size)
        candidates = self._scored(pool, ranks, prompt, weights, constraints)
        routed = RoutedRequest(
            request_id,
            pool.model,
            prompt.length,
            pool.block_size,
            prompt.hashes,
            routing.text("lora_name"),
            metadata or {},
            pool.phase,
        )
        chosen = self._choose(routed, candidates, weights)
        decision = self._book(pool, chosen, prompt, weights)
        self.stats.decisions += 1
        self.stats.seconds += time.perf_counter() - began
        return decision

    def _prompt(self, request: Fields, routing: Fields, block_size: int) -> PromptHashes:
        token_ids = unchecked_token_ids(request)
        scorable = not (request.data.get("mm_routing_info") or request.data.get("multi_modal_data"))
        salt, lora = routing.text("cache_salt"), routing.text("lora_name")
        try:
            hashes = self._hasher(token_ids, block_size, salt, lora)
        except (OverflowError, TypeError, ValueError) as error:
            raise InvalidRequest(f"expected token ids from 0 to 2**32 - 1: {error}") from error
        return PromptHashes(len(token_ids), hashes, scorable)

    def _scored(
        self,
        pool: Pool,
        ranks: Sequence[Rank],
        prompt: PromptHashes,
        weights: Weights,
        constraints: Constraints,
    ) -> list[Scored]:
        cached: Mapping[Rank, int] = {}
        if prompt.scorable:
            cached = self._index.score(prompt.hashes, prompt.length, pool.model)
        shared = weights.assume_kv_reuse
        candidates = [self._candidate(pool, rank, cached.get(rank, 0), prompt, shared) for rank in ranks]
        return scored(candidates, prompt.length, pool.block_size, weights, constraints.preferred_taints)

    def _candidate(
        self, pool: Pool, rank: Rank, cached_tokens: int, prompt: PromptHashes, shared: bool
    ) -> Candidate:
        size = pool.block_size
        on_rank = pool.book.projected(rank, prompt.hashes, cached_tokens // size, shared=shared)
        host = disk = 0
        if cached_tokens:
            tiers = self._index.tiers(rank, prompt.hashes, cached_tokens)
            host, disk = tiers.get("host", 0), tiers.get("disk", 0)
        return Candidate(
            rank,
            cached_tokens,
            host,
            disk,
            on_rank.in_flight_blocks * size if prompt.scorable else 0,
            on_rank.load,
            on_rank.new_blocks,
            pool.taints.get(rank.worker_id, _NO_TAINTS),
        )

    def _choose(self, routed: RoutedRequest, candidates: Sequence[Scored], weights: Weights) -> Scored:
        candidates = adjusted(candidates, self._hooks.score(routed, candidates))
        wanted = self._hooks.select_worker(routed, candidates)
        for each in candidates if wanted is not None else ():
            if each.rank == wanted:
                return each
        return choose(candidates, weights.router_temperature, self._rng)

    def _book(self, pool: Pool, chosen: Scored, prompt: PromptHashes, weights: Weights) -> Decision:
        candidate = chosen.candidate
        self._last_key += 1
        pool.book.add(
            self._last_key,
            candidate.rank,
            prompt.hashes,
            prompt.length,
            booked_prefill(candidate, prompt.length, pool.block_size, weights),
            cached_blocks=candidate.cached_tokens // pool.block_size,
            shared=weights.assume_kv_reuse,
        )
        return Decision(
            self._last_key,
            candidate.rank,
            chosen.cost,
            candidate.cached_tokens,
            prompt,
            candidate.load.requests > 0,
            candidate.in_flight_tokens > 0,
        )


def _among(ranks: Sequence[Rank], workers: Collection[int] | None) -> Sequence[Rank]:
    return ranks if workers is None else [rank for rank in ranks if rank.worker_id in workers]


def _preferred(ranks: Sequence[Rank], avoided: Mapping[int, float]) -> Sequence[Rank]:
    """Those of no avoided worker; where there are none, those of the worker that failed longest ago."""
    best = [rank for rank in ranks if rank.worker_id not in avoided]
    if best:
        return best
    first = min(ranks, key=lambda rank: avoided[rank.worker_id]).worker_id
    return [rank for rank in ranks if rank.worker_id == first]


class _RoutingConstraints(msgspec.Struct):
    required_taints: frozenset[str] = _NO_TAINTS
    preferred_taints: dict[str, float] = {}


class _Routing(msgspec.Struct):
    """What is read of a request's ``routing``; None and missing mean the same."""

    backend_instance_id: int | None = None
    dp_rank: int | None = None
    prefill_worker_id: int | None = None
    prefill_dp_rank: int | None = None
    decode_worker_id: int | None = None
    allowed_worker_ids: frozenset[int] | None = None
    routing_constraints: _RoutingConstraints | None = None


#: Fields of ``routing`` that pin a request to a worker and a rank, the first that is given.
_PINS = {
    "agg": (("backend_instance_id",), "dp_rank"),
    "prefill": (("prefill_worker_id",), "prefill_dp_rank"),
    "decode": (("decode_worker_id", "backend_instance_id"), "dp_rank"),
}


def constraints_of(routing: Mapping[str, Any], own_id: int | None, phase: str = "agg") -> Constraints:
    """The constraints in a request's ``routing``.

    :raises InvalidRequest: one cannot be read; says which.
    """
    if not routing:
        return Constraints()
    try:
        fields = msgspec.convert(routing, _Routing)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"routing: {error}") from error
    allowed = fields.allowed_worker_ids
    workers, rank = _PINS[phase]
    pins = {name: getattr(fields, name) for name in workers if getattr(fields, name) not in (None, own_id)}
    name, worker_id = next(iter(pins.items()), (workers[0], None))
    if allowed is not None and own_id in allowed:
        allowed = None
    taints = fields.routing_constraints or _RoutingConstraints()
    return Constraints(
        worker_id,
        getattr(fields, rank),
        allowed,
        taints.required_taints,
        taints.preferred_taints,
        (name, rank),
    )
