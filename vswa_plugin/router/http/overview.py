"""Everything that the live page shows, as one answer. Event loop only; nothing is changed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import msgspec

from vswa_plugin import __version__
from vswa_plugin.blocks.layout import FULL
from vswa_plugin.following.fleet import Fleet, RankStatus
from vswa_plugin.index import IndexStats
from vswa_plugin.registry import Entry
from vswa_plugin.router.counts import RequestCounts
from vswa_plugin.router.http.metrics import Counted
from vswa_plugin.router.pools import Pool
from vswa_plugin.router.promises import Promises, RankPromises
from vswa_plugin.router.recent import Choice, reason_of
from vswa_plugin.selection import Load, Scored
from vswa_plugin.wire.events import Rank, id_text

#: Ranks and candidates that one answer has at most; ranks that are not live come first.
MAX_RANKS = 256
MAX_CANDIDATES = 5
#: Reuse rules of engines with one pool of blocks for all windows.
_ONE_POOL = ("vllm", "vllm_hybrid")
_LIVE = "live"


class WindowOverview(msgspec.Struct, frozen=True):
    """One window of one rank; cache groups with the same window are counted together.

    :param window: in tokens, ``global``, or the kind of a group that is neither.
    :param resident: tier -> blocks held.
    :param capacity: blocks that the device has for it; null: the worker does not state it.
    """

    window: str
    resident: dict[str, int]
    capacity: int | None


class PromisesOverview(msgspec.Struct, frozen=True):
    """Finished requests by promised against reused blocks, and the tokens of both."""

    exact: int = 0
    over: int = 0
    under: int = 0
    unreported: int = 0
    promised_tokens: int = 0
    reused_tokens: int = 0


class RankOverview(msgspec.Struct, frozen=True):
    """One rank of a worker.

    :param state: live, stale, silent, unreadable or waiting; ``reason``: why it is not live.
    :param pool_capacity: blocks of the one pool that all windows share; null: each window has its own.
    """

    worker_id: str
    dp_rank: int
    model: str
    mode: str
    engine: str
    engine_version: str
    rule: str
    state: str
    reason: str
    lag_ms: float | None
    windows: list[WindowOverview]
    pool_capacity: int | None
    load: Load
    promises: PromisesOverview


class CandidateOverview(msgspec.Struct, frozen=True):
    """A rank that could have served a request: what it would reuse, what was on it, its cost in blocks."""

    worker_id: str
    dp_rank: int
    cached_tokens: int
    cost: float
    load: Load


class ChoiceOverview(msgspec.Struct, frozen=True):
    """One choice.

    :param at: Unix time.
    :param phase: agg, prefill or decode.
    :param promised_tokens: of the prompt, what the chosen rank was expected to reuse.
    :param reused_tokens: what its engine reported; null: nothing was reported.
    :param outcome: under way, kept, over, under or unreported.
    :param error_blocks: whole blocks promised minus whole blocks reused.
    :param candidates: the cheapest ones, the chosen one among them; ``of``: how many there were.
    """

    at: float
    request_id: str
    model: str
    phase: str
    prompt_tokens: int
    worker_id: str
    dp_rank: int
    promised_tokens: int
    reused_tokens: int | None
    outcome: str
    error_blocks: int
    reason: str
    candidates: list[CandidateOverview]
    of: int


class ModelOverview(msgspec.Struct, frozen=True):
    """Requests and promises of one model; promises also those of workers that have gone.

    :param received: requests that came; null: this router forwards none.
    """

    name: str
    ranks: int
    live_ranks: int
    received: int | None
    in_flight: int | None
    promises: PromisesOverview


class Overview(msgspec.Struct, frozen=True):
    """:param now: Unix time of this answer.
    :param left_out: ranks beyond those that one answer has.
    """

    version: str
    program: str
    now: float
    ready: bool
    reason: str | None
    models: list[ModelOverview]
    ranks: list[RankOverview]
    left_out: int
    choices: list[ChoiceOverview]
    index: IndexStats
    replicas: int


def overview(fleet: Fleet, counted: Counted, program: str, ready: bool, reason: str | None) -> Overview:
    """What the router knows now.

    :param program: ``router`` or ``selector``.
    :param ready: whether requests are routed; ``reason``: why not.
    """
    entries = {rank: entry for entry in fleet.entries.values() for rank in _ranks(entry)}
    statuses = {status.source.rank: status for status in fleet.statuses(time.time_ns())}
    books = {rank: pool for pool in counted.pools() for rank in pool.ranks}
    shown = _shown(entries, statuses)
    return Overview(
        version=__version__,
        program=program,
        now=time.time(),
        ready=ready,
        reason=reason,
        models=_models(entries, statuses, counted),
        ranks=[
            _rank(rank, entries[rank], statuses.get(rank), books.get(rank), counted.promises)
            for rank in shown
        ],
        left_out=len(entries) - len(shown),
        choices=[_choice(each) for each in counted.decider.recent],
        index=fleet.index.stats(),
        replicas=0 if counted.replicas is None else len(counted.replicas.others),
    )


def _ranks(entry: Entry) -> Iterable[Rank]:
    return (Rank(entry.worker_id, dp_rank) for dp_rank in entry.epochs)


def _shown(entries: Mapping[Rank, Entry], statuses: Mapping[Rank, RankStatus]) -> list[Rank]:
    """At most :data:`MAX_RANKS`, by model and id; live ones are left out before others."""

    def is_live(rank: Rank) -> bool:
        return rank in statuses and statuses[rank].state == _LIVE

    kept = sorted(entries, key=lambda rank: (is_live(rank), rank))[:MAX_RANKS]
    return sorted(kept, key=lambda rank: (entries[rank].served_model_name, rank))


def _rank(
    rank: Rank, entry: Entry, status: RankStatus | None, pool: Pool | None, promises: Promises
) -> RankOverview:
    windows, pool_capacity = windows_of(entry, {} if status is None else status.blocks)
    return RankOverview(
        worker_id=id_text(rank.worker_id),
        dp_rank=rank.dp_rank,
        model=entry.served_model_name,
        mode=entry.mode,
        engine=entry.engine,
        engine_version=entry.engine_version,
        rule=entry.rule,
        state="waiting" if status is None else status.state,
        reason="" if status is None else status.reason,
        lag_ms=None if status is None else status.lag_ms,
        windows=windows,
        pool_capacity=pool_capacity,
        load=Load() if pool is None else pool.book.load(rank),
        promises=_promises([promises.ranks[rank]] if rank in promises.ranks else []),
    )


def windows_of(entry: Entry, blocks: Mapping[str, dict[str, int]]) -> tuple[list[WindowOverview], int | None]:
    """All windows of a rank in the order of its groups, also empty ones; and the capacity of a shared pool.

    :param blocks: window -> tier -> blocks held.
    """
    one_pool = entry.rule in _ONE_POOL
    kinds = {group.label: group.kind for group in entry.groups}
    windows = [
        WindowOverview(
            label,
            blocks.get(label, {}),
            entry.capacity.get(label)
            or (entry.total_kv_blocks if kinds.get(label) == FULL and not one_pool else None),
        )
        for label in dict.fromkeys([*kinds, *blocks])
    ]
    return windows, entry.total_kv_blocks if one_pool else None


def _promises(counts: Iterable[RankPromises]) -> PromisesOverview:
    total = RankPromises()
    for each in counts:
        total.add(each)
    return PromisesOverview(
        total.exact,
        total.over,
        total.under,
        total.unreported,
        total.predicted_tokens,
        total.actual_tokens,
    )


def _models(
    entries: Mapping[Rank, Entry], statuses: Mapping[Rank, RankStatus], counted: Counted
) -> list[ModelOverview]:
    requests, promises = counted.requests, counted.promises
    of_models: dict[str, list[Rank]] = {}
    for rank, entry in entries.items():
        of_models.setdefault(entry.served_model_name, []).append(rank)
    return [
        ModelOverview(
            name=name,
            ranks=len(ranks),
            live_ranks=sum(rank in statuses and statuses[rank].state == _LIVE for rank in ranks),
            received=_count(requests, "received", name),
            in_flight=_count(requests, "in_flight", name),
            promises=_promises(
                [each for each in promises.ranks.values() if each.model == name]
                + [each for model, each in promises.gone.items() if model == name]
            ),
        )
        for name, ranks in sorted(of_models.items())
    ]


def _count(requests: RequestCounts | None, field: str, model: str) -> int | None:
    if requests is None:
        return None
    number: int = getattr(requests, field)[model]
    return number


def _choice(choice: Choice) -> ChoiceOverview:
    rank = choice.chosen.rank
    cheapest = sorted(choice.candidates, key=lambda each: each.cost)[:MAX_CANDIDATES]
    if choice.chosen not in cheapest:
        cheapest[-1] = choice.chosen
    return ChoiceOverview(
        at=choice.at,
        request_id=choice.request_id,
        model=choice.model,
        phase=choice.phase,
        prompt_tokens=choice.prompt_tokens,
        worker_id=id_text(rank.worker_id),
        dp_rank=rank.dp_rank,
        promised_tokens=choice.promised,
        reused_tokens=choice.reused,
        outcome=choice.outcome,
        error_blocks=choice.error_blocks,
        reason=reason_of(choice),
        candidates=[_candidate(each) for each in cheapest],
        of=len(choice.candidates),
    )


def _candidate(scored: Scored) -> CandidateOverview:
    candidate = scored.candidate
    return CandidateOverview(
        id_text(scored.rank.worker_id),
        scored.rank.dp_rank,
        candidate.cached_tokens,
        scored.cost,
        candidate.load,
    )
