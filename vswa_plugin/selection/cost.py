"""What it costs to serve a request on each candidate, in blocks, and which candidate is chosen.

The formula is Dynamo's, fed with the tokens that an engine would really reuse:

    prefill  = (prompt tokens in flight there + this prompt) / block size  -  credit for cached blocks, >= 0
    cost     = prefill_load_scale * prefill  +  blocks held there, with this prompt  +  active requests

Where prefill and decode workers are apart, see ``weights.of_phase`` for what counts in each phase.

A prefix that the rank is computing for another request counts as cached already, in both parts of
``prefill``: so a burst of one new prefix stays together, as it would a moment later.

The cheapest wins, equals at random; with a temperature, chance is exp(-cost / (range * temperature)).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import msgspec

from vswa_plugin.errors import InvalidRequest, RequestError
from vswa_plugin.selection.book import Load
from vswa_plugin.selection.weights import Weights
from vswa_plugin.wire.events import Rank

_NOTHING: frozenset[str] = frozenset()
_NO_LOAD = Load()


class NoCandidate(RequestError):
    """No rank may serve the request; the message says which wish excluded the last one."""


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A rank that could serve the request.

    :param cached_tokens: of the prompt, what the rank would reuse, in whatever tier.
    :param host_blocks: of these, whole blocks that must be loaded from host memory.
    :param disk_blocks: the same from disk.
    :param in_flight_tokens: of the prompt, behind the cached ones, what the rank is computing for others.
    :param load: what is on the rank already.
    :param new_blocks: blocks of this prompt that no active request of the rank holds.
    :param taints: labels of the worker.
    """

    rank: Rank
    cached_tokens: int = 0
    host_blocks: int = 0
    disk_blocks: int = 0
    in_flight_tokens: int = 0
    load: Load = _NO_LOAD
    new_blocks: int = 0
    taints: frozenset[str] = _NOTHING


class Scored(msgspec.Struct, frozen=True, gc=False):
    """A candidate and its cost, in blocks."""

    candidate: Candidate
    cost: float

    @property
    def rank(self) -> Rank:
        return self.candidate.rank


class Constraints(msgspec.Struct, frozen=True):
    """The conditions of a request on the ranks that may serve it.

    :param worker_id: only this worker; None: any.
    :param dp_rank: only this data-parallel rank; None: any.
    :param allowed: only these workers; None: any.
    :param required_taints: the worker must carry all of them.
    :param preferred_taints: weight by label: above 0 attracts, below 0 repels.
    :param fields: names of the first two in the request, for messages.
    """

    worker_id: int | None = None
    dp_rank: int | None = None
    allowed: frozenset[int] | None = None
    required_taints: frozenset[str] = _NOTHING
    preferred_taints: Mapping[str, float] = {}
    fields: tuple[str, str] = ("backend_instance_id", "dp_rank")

    @property
    def binding(self) -> bool:
        """Whether any candidate could be excluded."""
        return not (
            self.worker_id is None
            and self.dp_rank is None
            and self.allowed is None
            and not self.required_taints
        )


def eligible(
    ranks: Sequence[Rank], constraints: Constraints, taints: Mapping[int, frozenset[str]]
) -> Sequence[Rank]:
    """Those of ``ranks`` that ``constraints`` allow.

    :param taints: labels by worker id; a worker left out has none.
    :raises InvalidRequest: it is pinned to a worker or dp_rank that this model does not have.
    :raises NoCandidate: none is left.
    """
    if not ranks:
        raise NoCandidate("no worker serves this model right now")
    if not constraints.binding:
        return ranks
    wishes = (
        (constraints.worker_id, constraints.fields[0], lambda r: r.worker_id == constraints.worker_id),
        (constraints.dp_rank, constraints.fields[1], lambda r: r.dp_rank == constraints.dp_rank),
        (constraints.allowed, "allowed_worker_ids", lambda r: r.worker_id in (constraints.allowed or ())),
        (
            constraints.required_taints or None,
            "routing_constraints.required_taints",
            lambda r: constraints.required_taints <= taints.get(r.worker_id, _NOTHING),
        ),
    )
    remaining = ranks
    for wish, name, fits in wishes:
        if wish is None:
            continue
        before, remaining = remaining, [rank for rank in remaining if fits(rank)]
        if not remaining:
            wished = _some(sorted(wish) if isinstance(wish, frozenset) else [wish])
            pinned = name in constraints.fields
            raise (InvalidRequest if pinned else NoCandidate)(
                f"{name}: expected a rank of this model that fits {wished}, got (worker.dp_rank): "
                f"{_some([f'{rank.worker_id}.{rank.dp_rank}' for rank in before])}"
            )
    return remaining


def _some(things: Sequence[object]) -> str:
    return ", ".join(map(str, things[:8])) + (" ..." if len(things) > 8 else "")


def scored(
    candidates: Sequence[Candidate],
    prompt_len: int,
    block_size: int,
    weights: Weights,
    preferred_taints: Mapping[str, float] | None = None,
) -> list[Scored]:
    """All candidates with their costs, in the same order.

    :param prompt_len: tokens of the prompt.
    :param preferred_taints: see :class:`Constraints`.
    """
    decaying = weights.track_prefill_tokens and weights.overlap_score_credit_decay > 0
    least = min((c.load.prefill_tokens for c in candidates), default=0) if decaying else 0
    results = []
    for candidate in candidates:
        credit = weights.overlap_score_credit
        if decaying:
            credit *= _faded(candidate.load.prefill_tokens - least, prompt_len, block_size, weights)
        cost = _cost(candidate, prompt_len, block_size, weights, credit)
        if preferred_taints:
            cost *= _attraction(candidate.taints, preferred_taints)
        results.append(Scored(candidate, cost))
    return results


def _cost(candidate: Candidate, prompt_len: int, block_size: int, weights: Weights, credit: float) -> float:
    load = candidate.load
    credited = credit * candidate.cached_tokens / block_size
    if slow := candidate.host_blocks + candidate.disk_blocks:
        credited = credit * max(0.0, candidate.cached_tokens / block_size - slow)
        credited += weights.host_cache_hit_weight * candidate.host_blocks
        credited += weights.disk_cache_hit_weight * candidate.disk_blocks
    held = load.blocks + candidate.new_blocks if weights.track_active_blocks else 0
    requests = weights.decode_active_request_weight * load.requests
    if weights.track_prefill_tokens:
        to_compute = (load.prefill_tokens + prompt_len) / block_size - credited
        if candidate.in_flight_tokens:
            # Neither waited for apart from the others' work nor computed again.
            to_compute -= 2 * _in_flight(candidate, weights) / block_size
        return weights.prefill_load_scale * max(0.0, to_compute) + held + requests
    if weights.overlap_score_credit > 0:
        return max(0.0, held - credited) + requests
    return held + requests


def _in_flight(candidate: Candidate, weights: Weights) -> float:
    """Tokens of the prompt that count as computed once the rank's work in flight is done."""
    return min(1.0, weights.in_flight_credit * weights.overlap_score_credit) * candidate.in_flight_tokens


def _faded(excess_tokens: int, prompt_len: int, block_size: int, weights: Weights) -> float:
    """What is left of the credit with so many prompt tokens more in flight than on the least loaded rank."""
    request_blocks = -(-prompt_len // block_size) or 1
    return 1 / (1 + weights.overlap_score_credit_decay * excess_tokens / block_size / request_blocks)


def _attraction(taints: frozenset[str], preferred: Mapping[str, float]) -> float:
    """Factor of the cost, between 1/e and e."""
    return math.exp(-math.tanh(sum(weight for taint, weight in preferred.items() if taint in taints)))


def adjusted(candidates: Sequence[Scored], additions: Mapping[Rank, float]) -> Sequence[Scored]:
    """The candidates with ``additions`` (blocks, by rank) on top of their costs."""
    if not additions:
        return candidates
    return [Scored(each.candidate, each.cost + additions.get(each.rank, 0.0)) for each in candidates]


def choose(candidates: Sequence[Scored], temperature: float, rng: random.Random) -> Scored:
    """The cheapest, equals at random; with a temperature, one drawn by its cost.

    :raises NoCandidate: there is none.
    """
    if not candidates:
        raise NoCandidate("expected at least one candidate, got none")
    lowest = min(each.cost for each in candidates)
    scale = (max(each.cost for each in candidates) - lowest) * temperature
    # Equal costs or no temperature; also a product that is too small or too large for a float.
    if not 0 < scale < math.inf:
        best = [each for each in candidates if each.cost == lowest]
        return best[0] if len(best) == 1 else rng.choice(best)
    chances = [math.exp((lowest - each.cost) / scale) for each in candidates]
    return rng.choices(candidates, chances)[0]


def booked_prefill(candidate: Candidate, prompt_len: int, block_size: int, weights: Weights) -> int:
    """Prompt tokens to book on the chosen rank until the first token: what is not cached, or slow to load."""
    if not weights.track_prefill_tokens:
        return 0
    slow = (1 - weights.host_cache_hit_weight) * candidate.host_blocks
    slow += (1 - weights.disk_cache_hit_weight) * candidate.disk_blocks
    computed = candidate.cached_tokens + _in_flight(candidate, weights)
    return max(0, prompt_len - round(computed - slow * block_size))
