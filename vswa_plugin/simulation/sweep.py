"""Routing simulations side by side: policies, models, memory, seeds; each run by itself."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vswa_plugin.accuracy.scorers import built_in_scorers
from vswa_plugin.engine.predicted import RankSetup, Scorer, SimulatedRank
from vswa_plugin.engine.presets import preset_named, rank_setup
from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.simulation.costs import CostModel
from vswa_plugin.simulation.policies import (
    ORACLE,
    RANDOM,
    ROUND_ROBIN,
    ByCost,
    EventEstimator,
    Policy,
    Unaware,
)
from vswa_plugin.simulation.simulation import Simulation, Totals
from vswa_plugin.simulation.workloads import WORKLOADS, Arrival, made_up, mooncake, poisson

if TYPE_CHECKING:
    from vswa_plugin.host.host import PluginHost

#: What is compared by default; the oracle is always among them.
DEFAULT_POLICIES = (RANDOM, ROUND_ROBIN, "global only", "boundary projection", "exact", ORACLE)
#: Its tree has one set of blocks of one size, so that it cannot show a layout that is not plain.
_PLAIN_ONLY = "boundary projection"
#: Requests from which the mean prompt is taken.
_SAMPLE = 300
_MAX_SEQ_LEN = 131_072


class Plan(msgspec.Struct, frozen=True):
    """What all runs of a comparison have in common.

    :param workload: one of the built-in ones, or a file in Mooncake's format.
    :param requests: how many; of a file None means all.
    :param rate: requests a second; None: by ``load``, or as the file says.
    :param block_size: tokens per block, where the engine leaves them to the user; None: the usual ones.
    :param load: seconds of prefill that arrive per second and rank, were nothing cached.
    """

    workload: str
    requests: int | None = 1_000
    ranks: int = 4
    block_size: int | None = None
    sliding_share: float = 0.5
    rate: float | None = None
    load: float = 1.2
    cost: CostModel = CostModel()

    def check(self) -> Plan:
        """Return self, or raise :class:`ConfigError` that names the value that cannot be used."""
        if self.workload not in WORKLOADS and not Path(self.workload).is_file():
            raise ConfigError(
                f"expected a workload, {', '.join(WORKLOADS)} or a file in Mooncake's format, got "
                f"{self.workload!r}"
            )
        for name in ("requests", "ranks", "block_size", "rate", "load"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')}: expected a number above 0, got {value}")
        if not 0 < self.sliding_share <= 1:
            raise ConfigError(f"--sliding-share: expected a share above 0, up to 1, got {self.sliding_share}")
        self.cost.check()
        return self


class Case(msgspec.Struct, frozen=True):
    """One run of a plan.

    :param blocks: for global attention, per rank.
    """

    preset: str
    blocks: int
    policy: str
    seed: int


class Measures(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured of a run. Shares are 0 to 1, of prompt tokens unless said otherwise.

    :param hit_rate: reused.
    :param recomputed: computed though some rank had computed them before.
    :param kept: of the promised tokens, those that were reused. None from here to ``agreed``: it promises
        nothing.
    :param true_promises: of the promises, those right in whole blocks when they were made.
    :param kept_promises: the same when the prompt's turn came.
    :param agreed: of the choices, those that are cheapest by what the caches held.
    :param imbalance: prefill seconds of the busiest rank over the mean.
    :param utilisation: prefill seconds over all seconds.
    """

    hit_rate: float
    recomputed: float
    kept: float | None
    true_promises: float | None
    kept_promises: float | None
    agreed: float | None
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    imbalance: float
    utilisation: float


class Run(Measures, frozen=True, kw_only=True):
    """What came of one run; tokens are of prompts."""

    case: Case
    requests: int
    refused: int
    prompt_tokens: int
    computed_tokens: int


def run_of(case: Case, totals: Totals) -> Run:
    """:raises ConfigError: nothing was served, so there is nothing to compare."""
    count = totals.requests
    if not count and not totals.refused:
        raise ConfigError("the workload has no requests: expected one on each line of the file")
    if not count:
        raise ConfigError(
            f"no request of the workload fits {case.blocks} blocks of {case.preset}; raise --blocks"
        )
    promises = totals.promised is not None
    ttft, busy = sorted(totals.ttft_s), totals.busy_s
    return Run(
        case=case,
        requests=count,
        refused=totals.refused,
        prompt_tokens=totals.prompt_tokens,
        computed_tokens=totals.computed_tokens,
        hit_rate=totals.cached_tokens / totals.prompt_tokens,
        recomputed=totals.recomputed_tokens / totals.prompt_tokens,
        kept=totals.kept / max(1, totals.promised or 0) if promises else None,
        true_promises=totals.true_promises / count if promises else None,
        kept_promises=totals.kept_promises / count if promises else None,
        agreed=totals.agreed / count if totals.agreed is not None else None,
        ttft_p50_s=percentile(ttft, 0.50),
        ttft_p90_s=percentile(ttft, 0.90),
        ttft_p99_s=percentile(ttft, 0.99),
        imbalance=max(busy) * len(busy) / sum(busy),
        utilisation=sum(busy) / len(busy) / totals.end_s,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least value that at least ``share`` of all are not above."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Bench:
    """Runs the cases of one plan.

    :param host: whose plugins simulate ranks, read their events, and add scorers.
    """

    def __init__(self, plan: Plan, host: PluginHost) -> None:
        self.plan = plan
        self._host = host
        self._rules = host.reuse_rules()

    def run(self, case: Case, progress: Callable[[int], None] = lambda done: None) -> Run:
        """One case, from empty caches.

        :raises ConfigError: no such preset or policy, or sizes that cannot work.
        """
        plan = self.plan
        events = case.policy not in (RANDOM, ROUND_ROBIN, ORACLE)
        setup = rank_setup(
            case.preset, case.blocks, plan.sliding_share, plan.block_size, _MAX_SEQ_LEN, events
        )
        ranks = [self._host.simulated_rank(setup) for _ in range(plan.ranks)]
        policy = self._policy(case, setup, ranks)
        simulation = Simulation(ranks, policy, plan.cost, setup.layout.naming)
        return run_of(case, simulation.run(self.arrivals(case.seed), progress))

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """The requests of every case with that seed."""
        plan = self.plan
        if plan.workload not in WORKLOADS:
            return _at_rate(mooncake(Path(plan.workload), plan.requests), plan)
        requests = islice(made_up(plan.workload, seed), plan.requests)
        rate = plan.rate
        if rate is None:
            sample = list(islice(made_up(plan.workload, seed), _SAMPLE))
            cold_s = sum(plan.cost.prefill_s(len(each.prompt), 0) for each in sample) / len(sample)
            rate = plan.load * plan.ranks / cold_s
        return poisson(requests, rate, seed)

    def _policy(self, case: Case, setup: RankSetup, ranks: Sequence[SimulatedRank]) -> Policy:
        rng = random.Random(f"policy {case.seed}")
        if case.policy == RANDOM:
            return Unaware(len(ranks), rng)
        if case.policy == ROUND_ROBIN:
            return Unaware(len(ranks), None)
        views = None
        if case.policy != ORACLE:
            views = [
                EventEstimator(
                    setup.layout,
                    partial(self._host.event_adapter, rank.event_format, setup.layout),
                    self._scorer(case.policy, setup),
                )
                for rank in ranks
            ]
        return ByCost(len(ranks), views, setup.layout.naming, rng)

    def _scorer(self, name: str, setup: RankSetup) -> Scorer:
        scorers = built_in_scorers(self._rules)
        names = [each.name for each in scorers]
        scorers += self._host.accuracy_scorers(setup.layout, self._rules, names)
        for scorer in scorers:
            if scorer.name == name:
                return scorer
        known = [RANDOM, ROUND_ROBIN, *(each.name for each in scorers), ORACLE]
        raise ConfigError(unknown_choice("policy", name, known))


def _at_rate(arrivals: Iterator[Arrival], plan: Plan) -> Iterator[Arrival]:
    """The times of a file, stretched to ``plan.rate`` where it is given."""
    if plan.rate is None:
        return arrivals
    last, count = 0.0, 0
    for arrival in mooncake(Path(plan.workload), plan.requests):
        last, count = arrival.at_s, count + 1
    stretch = count / plan.rate / last if last else 1.0
    return (Arrival(arrival.at_s * stretch, arrival.request) for arrival in arrivals)


def default_policies(preset: str) -> list[str]:
    """What is compared for a model unless the user says it.

    :raises ConfigError: no such model.
    """
    plain = preset_named(preset).layout(preset).plain
    return [name for name in DEFAULT_POLICIES if plain or name != _PLAIN_ONLY]


def cases(
    presets: Sequence[str], blocks: Sequence[int], names: Sequence[str] | None, seeds: Sequence[int]
) -> list[Case]:
    """All combinations; policies of one cell next to each other.

    :param names: of policies; None: the default ones of each model.
    :raises ConfigError: no such model.
    """
    return [
        Case(preset, count, policy, seed)
        for preset in presets
        for count in blocks
        for seed in seeds
        for policy in (names or default_policies(preset))
    ]
