"""What was promised against what the engines report as reused, in whole blocks. Pure but for the log.

A worker whose last predictions were often wrong is logged once, with the likely cause.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable
from typing import Protocol

import msgspec

from vswa_plugin.router.tallies import Buckets, Names
from vswa_plugin.wire.events import Rank

logger = logging.getLogger(__name__)

#: Upper bounds of the histograms of how many blocks too many or too few were promised.
BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128)
#: Why a promise was wrong: requests before it stored more than was promised, or what was promised was evicted
#: before its turn came; the view of the rank was not live; or the rank had nothing else to do.
CAUSES = ("queueing", "eviction", "lag", "other")
#: How many requests of a worker are looked at, and how many of them are needed for a verdict.
LOOKED_AT, LEAST = 100, 20
#: Share of wrong ones above which an error is systematic, and below which it is over.
SYSTEMATIC, OVER = 0.2, 0.1


class Promise(Protocol):
    """What is known of a promise when it is made: a :class:`~vswa_plugin.router.decide.Decision`."""

    @property
    def rank(self) -> Rank: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    @property
    def in_flight(self) -> bool: ...
    @property
    def model(self) -> str: ...
    @property
    def key(self) -> Hashable: ...


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """One finished request.

    :param predicted: cached tokens promised when it was routed.
    :param actual: cached tokens that the engine reported.
    :param live: whether the view of the rank was live when it was routed.
    :param busy: whether other requests were active on the rank then.
    :param in_flight: whether they were computing more of its prompt: what it finds then depends on when it is
        admitted, and is counted but not judged.
    """

    rank: Rank
    block_size: int
    predicted: int
    actual: int
    live: bool = True
    busy: bool = False
    in_flight: bool = False
    model: str = ""

    @property
    def cause(self) -> str:
        """Of :data:`CAUSES`, the one that an error has most likely."""
        if not self.live:
            return "lag"
        if not self.busy:
            return "other"
        return "eviction" if self.predicted > self.actual else "queueing"

    @property
    def error(self) -> int:
        """Promised minus reused, in whole blocks."""
        return self.predicted // self.block_size - self.actual // self.block_size


class RankPromises(msgspec.Struct):
    """Counters of one rank since it came.

    :param over: more was promised than reused; ``under``: less.
    :param predicted_tokens: sum of what was promised; ``actual_tokens``: of what was reused.
    :param unreported: finished requests of which the engine reported nothing.
    """

    exact: int = 0
    over: int = 0
    under: int = 0
    predicted_tokens: int = 0
    actual_tokens: int = 0
    unreported: int = 0
    model: str = ""

    def add(self, other: RankPromises) -> None:
        """Count what ``other`` has counted too."""
        self.exact += other.exact
        self.over += other.over
        self.under += other.under
        self.predicted_tokens += other.predicted_tokens
        self.actual_tokens += other.actual_tokens
        self.unreported += other.unreported


class Promises:
    """Takes outcomes, keeps counters per rank, and says where an error is systematic.

    :ivar ranks: of the workers that are there.
    :ivar gone: by model, of all ranks that have gone.
    :ivar causes: by model and one of :data:`CAUSES`: tokens promised and not reused, or the reverse.
    :ivar errors: by model and ``over`` or ``under``: how many blocks too many, or too few, were promised.
    :param reported: called for each promise of which an engine reports what it reused, with the tokens.
    """

    def __init__(self, reported: Callable[[Promise, int], None] | None = None) -> None:
        self._reported = reported
        self.ranks: dict[Rank, RankPromises] = {}
        self.gone: dict[str, RankPromises] = {}
        self.errors: dict[tuple[str, str], Buckets] = {}
        self.causes: dict[tuple[str, str], int] = {}
        self._names = Names()
        self._recent: dict[int, deque[Outcome]] = {}
        self._systematic: set[int] = set()

    def compare(self, promise: Promise, block_size: int, live: bool, cached_tokens: int | None) -> None:
        """A request has finished; ``cached_tokens``: what its engine reused, None where it does not say.

        :param live: whether the view of the rank was live when it was chosen.
        """
        if cached_tokens is None:
            self.unreported(promise.rank, promise.model)
            return
        if self._reported is not None:
            self._reported(promise, cached_tokens)
        self.record(
            Outcome(
                promise.rank,
                block_size,
                promise.cached_tokens,
                cached_tokens,
                live,
                promise.busy,
                promise.in_flight,
                promise.model,
            )
        )

    def record(self, outcome: Outcome) -> None:
        """One request has finished and its engine reported what it reused."""
        counts = self._counts(outcome.rank, outcome.model)
        error = outcome.error
        counts.exact += error == 0
        counts.over += error > 0
        counts.under += error < 0
        counts.predicted_tokens += outcome.predicted
        counts.actual_tokens += outcome.actual
        for cause in CAUSES:
            self.causes.setdefault((counts.model, cause), 0)
        if error:
            self.causes[counts.model, outcome.cause] += abs(outcome.predicted - outcome.actual)
            self._errors(counts.model, "over" if error > 0 else "under").observe(abs(error))
        if not outcome.in_flight:
            self._judge(outcome)

    def unreported(self, rank: Rank, model: str = "") -> None:
        """One request has finished and its engine did not report what it reused."""
        self._counts(rank, model).unreported += 1

    def drop(self, worker_id: int) -> None:
        """The worker has gone."""
        for rank in [rank for rank in self.ranks if rank.worker_id == worker_id]:
            counts = self.ranks.pop(rank)
            self.gone.setdefault(counts.model, RankPromises(model=counts.model)).add(counts)
        self._recent.pop(worker_id, None)
        self._systematic.discard(worker_id)

    def systematic(self, worker_id: int) -> bool:
        """Whether the worker's last requests were wrong too often, as the log has said."""
        return worker_id in self._systematic

    def _counts(self, rank: Rank, model: str) -> RankPromises:
        counts = self.ranks.get(rank)
        if counts is None:
            counts = self.ranks[rank] = RankPromises(model=self._names.label(model))
        return counts

    def _errors(self, model: str, direction: str) -> Buckets:
        if (model, direction) not in self.errors:
            self.errors[model, direction] = Buckets(BOUNDS)
        return self.errors[model, direction]

    def _judge(self, outcome: Outcome) -> None:
        worker_id = outcome.rank.worker_id
        recent = self._recent.setdefault(worker_id, deque(maxlen=LOOKED_AT))
        recent.append(outcome)
        if outcome.error == 0 and worker_id not in self._systematic:
            return
        wrong = [each for each in recent if each.error]
        if worker_id in self._systematic:
            if len(wrong) < OVER * len(recent):
                self._systematic.discard(worker_id)
                logger.info("worker %d: predictions are right again", worker_id)
        elif len(recent) >= LEAST and len(wrong) > SYSTEMATIC * len(recent):
            self._systematic.add(worker_id)
            logger.warning(
                "worker %d: %d of its last %d predictions were wrong, by %+.1f blocks in the mean "
                "(promised minus reused); likely cause: %s",
                worker_id,
                len(wrong),
                len(recent),
                sum(each.error for each in wrong) / len(wrong),
                likely_cause(wrong),
            )


def likely_cause(wrong: list[Outcome]) -> str:
    """What the wrong ones have in common, in words."""
    over = sum(each.error > 0 for each in wrong)
    if sum(not each.live for each in wrong) * 2 > len(wrong):
        cause = "lag: most were routed while the view of this worker was stale; look at NATS and its load"
    elif over * 2 <= len(wrong):
        cause = (
            "rule mismatch or unpublished blocks: the engine reuses more than the rule of its layout "
            "says, or its worker cannot attribute its blocks (LoRA, salt); see `vswa explain`"
        )
    elif sum(each.error > 0 and each.busy for each in wrong) * 2 > over:
        cause = (
            "eviction between choice and admission: the worker was busy each time, its cache is too small "
            "for what is under way"
        )
    else:
        cause = (
            "rule mismatch: the worker was idle and reused less than the rule of its layout says; compare "
            "the rule with the engine's version and its partial-reuse setting"
        )
    return cause
