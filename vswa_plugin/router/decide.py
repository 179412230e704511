"""One choice: what each rank would reuse, what is on it, what it costs, which is chosen, and the booking."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from vswa_plugin.blocks.hashing import with_lookahead
from vswa_plugin.blocks.layout import Naming
from vswa_plugin.engine.contract import RequestDict
from vswa_plugin.engine.requests import Fields, reads_cache, unchecked_token_ids
from vswa_plugin.errors import InvalidRequest
from vswa_plugin.forecast import Forecasts
from vswa_plugin.index import WindowIndex
from vswa_plugin.router.pools import Pool
from vswa_plugin.router.recent import Choice, RecentChoices
from vswa_plugin.router.tallies import Buckets, Names
from vswa_plugin.router.wishes import constraints_of
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
#: Seconds; a choice among a few ranks takes some 50 microseconds.
DURATION_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1)


class PromptHashes(msgspec.Struct, frozen=True):
    """What routing needs to know of a request.

    :param hashes: sequence hashes of its full blocks, by which the load is counted.
    :param names: of its prefixes, by which reuse is scored: the same, but for models whose prefixes have
        other names.
    :param scorable: False: no reuse is promised, because its tokens do not say what it consists of (images),
        or because it switches the cache off (log probabilities of the prompt).
    """

    length: int
    hashes: Sequence[int]
    names: Sequence[int]
    scorable: bool = True


def hashed_prompt(
    hasher: Hasher,
    token_ids: Sequence[int],
    naming: Naming,
    salt: str | None,
    lora: str | None,
    *,
    scorable: bool = True,
) -> PromptHashes:
    """A prompt as models of that naming need it.

    :raises ValueError, TypeError: as ``hasher`` does.
    """
    hashes = hasher(token_ids, naming.block_size, salt, lora)
    names = hashes
    if naming.hash_block_size != naming.block_size:
        names = hasher(token_ids, naming.hash_block_size, salt, lora)
    names = with_lookahead(names, token_ids, naming.hash_block_size, naming.lookahead)
    # The load book looks the hashes up one by one, the index reads the names in memory.
    return PromptHashes(len(token_ids), list(hashes), names, scorable)


class Decision(msgspec.Struct, frozen=True):
    """The rank that serves a request, and what was known when it was chosen.

    :param key: of the request in the load book.
    :param cached_tokens: promised for the chosen rank.
    :param prompt: what was read of the request; the next choice for it need not read it again.
    :param busy: whether other requests were active there.
    :param in_flight: whether they were computing more of its prompt, which it may or may not find cached.
    :param ranks: how many could have been chosen; ``scored_s``: how long their scores took, of ``took_s``.
    """

    key: int
    rank: Rank
    cost: float
    cached_tokens: int
    prompt: PromptHashes
    busy: bool
    in_flight: bool
    model: str
    ranks: int = 1
    scored_s: float = 0.0
    took_s: float = 0.0

    @property
    def prompt_len(self) -> int:
        return self.prompt.length


class Weighed(NamedTuple):
    """One candidate of a choice that is only explained.

    :ivar added: what plugins add to its cost, in blocks.
    :ivar terms: what a plugin says of its cost.
    """

    scored: Scored
    added: float
    chosen: bool
    terms: Mapping[str, float]


class Decider:
    """Scores, selects and books. Event loop only.

    :param index: what all ranks hold.
    :param hasher: as ``dynamo.client.namespaced_sequence_hashes``.
    :param rng: breaks ties and draws by temperature.
    :param forecasts: of what each rank will have cached when the turn of a request comes, which is then what
        is promised; None: what it has cached now.
    """

    def __init__(
        self,
        index: WindowIndex,
        weights: Weights,
        hasher: Hasher,
        hooks: SelectionHooks | None = None,
        rng: random.Random | None = None,
        forecasts: Forecasts | None = None,
    ) -> None:
        #: Of the choices that were made, by model and phase.
        self.durations: dict[tuple[str, str], Buckets] = {}
        #: The last choices, for people who look.
        self.recent = RecentChoices()
        self._names = Names()
        self._index = index
        self._weights = weights
        self._hasher = hasher
        self._hooks = hooks if hooks is not None else NoHooks()
        self._rng = rng if rng is not None else random.Random()
        self._forecasts = forecasts
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
            prompt = self._prompt(fields, routing, pool.naming)
        offered = self._scored(pool, ranks, prompt, weights, constraints)
        scored_s = time.perf_counter() - began
        routed = RoutedRequest(
            request_id,
            pool.model,
            prompt.length,
            pool.block_size,
            prompt.hashes,
            routing.text("lora_name"),
            metadata or {},
            pool.phase,
            # Where Dynamo's frontend puts the header X-Dynamo-Session-ID, and those of coding agents.
            fields.object("agent_context").text("session_id") if self.hooked else None,
        )
        chosen, candidates, by_plugin = self._choose(routed, offered, weights)
        decision = self._book(pool, chosen, prompt, weights, len(offered), (began, scored_s))
        self.recent.add(
            Choice(
                at=time.time(),
                key=decision.key,
                request_id=request_id,
                model=pool.model,
                phase=pool.phase,
                prompt_tokens=prompt.length,
                block_size=pool.block_size,
                chosen=chosen,
                candidates=candidates,
                by_plugin=by_plugin,
                book=pool.book,
            )
        )
        key = self._names.label(pool.model), pool.phase
        if key not in self.durations:
            self.durations[key] = Buckets(DURATION_BOUNDS)
        self.durations[key].observe(decision.took_s)
        return decision

    def weighed(self, pool: Pool, prompt: PromptHashes) -> list[Weighed]:
        """What a request with that prompt, and without any wish, would cost on each rank of ``pool`` now."""
        weights = of_phase(self._weights, pool.phase)
        candidates = self._scored(pool, pool.ranks, prompt, weights, Constraints())
        routed = RoutedRequest(
            "", pool.model, prompt.length, pool.block_size, prompt.hashes, phase=pool.phase
        )
        terms = self._hooks.choice_terms(routed, candidates)
        chosen, _, _ = self._choose(
            routed, candidates, msgspec.structs.replace(weights, router_temperature=0.0)
        )
        added = self._hooks.score(routed, candidates)
        return [
            Weighed(each, added.get(each.rank, 0.0), each.rank == chosen.rank, terms.get(each.rank, {}))
            for each in candidates
        ]

    def _prompt(self, request: Fields, routing: Fields, naming: Naming) -> PromptHashes:
        token_ids = unchecked_token_ids(request)
        images = request.data.get("mm_routing_info") or request.data.get("multi_modal_data")
        scorable = reads_cache(request) and not images
        salt, lora = routing.text("cache_salt"), routing.text("lora_name")
        try:
            return hashed_prompt(self._hasher, token_ids, naming, salt, lora, scorable=scorable)
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"cache_salt or lora_name: expected text, got half of a surrogate: {error}"
            ) from error
        except (OverflowError, TypeError, ValueError) as error:
            raise InvalidRequest(f"expected token ids from 0 to 2**32 - 1: {error}") from error

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
            cached = self._index.score(prompt.names, prompt.length, pool.model)
            if forecasts := self._forecasts_of(pool):
                cached = forecasts.promises(cached, ranks, prompt.names, prompt.length)
        shared = weights.assume_kv_reuse
        candidates = [self._candidate(pool, rank, cached.get(rank, 0), prompt, shared) for rank in ranks]
        return scored(candidates, prompt.length, pool.block_size, weights, constraints.preferred_taints)

    def _forecasts_of(self, pool: Pool) -> Forecasts | None:
        """None where the load book has no names of blocks, and where prompts come from another worker."""
        return self._forecasts if pool.naming.by_blocks and pool.phase != "decode" else None

    def _candidate(
        self, pool: Pool, rank: Rank, cached_tokens: int, prompt: PromptHashes, shared: bool
    ) -> Candidate:
        size = pool.block_size
        on_rank = pool.book.projected(rank, prompt.hashes, cached_tokens // size, shared=shared)
        host = disk = 0
        if cached_tokens:
            tiers = self._index.tiers(rank, prompt.names, cached_tokens)
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

    def _choose(
        self, routed: RoutedRequest, candidates: Sequence[Scored], weights: Weights
    ) -> tuple[Scored, Sequence[Scored], bool]:
        """The one that is chosen, all with what plugins add to their costs, and whether a plugin chose."""
        candidates = adjusted(candidates, self._hooks.score(routed, candidates))
        wanted = self._hooks.select_worker(routed, candidates)
        for each in candidates if wanted is not None else ():
            if each.rank == wanted:
                return each, candidates, True
        return choose(candidates, weights.router_temperature, self._rng), candidates, False

    def _book(
        self,
        pool: Pool,
        chosen: Scored,
        prompt: PromptHashes,
        weights: Weights,
        ranks: int,
        times: tuple[float, float],
    ) -> Decision:
        """:param times: when the choice began, and how long the scores took."""
        candidate = chosen.candidate
        self._last_key += 1
        pool.book.watcher = self._forecasts_of(pool)
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
            pool.model,
            ranks,
            times[1],
            time.perf_counter() - times[0],
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
