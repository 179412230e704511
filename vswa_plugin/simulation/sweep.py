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

from vswa_plugin.accuracy.scorers import EXACT, built_in_scorers
from vswa_plugin.blocks.memory import Memory, Pool
from vswa_plugin.engine.predicted import RankSetup, Scorer, SimulatedRank
from vswa_plugin.engine.presets import preset_named, rank_setup
from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.simulation.costs import CostModel
from vswa_plugin.simulation.policies import (
    ONE_CACHE,
    ORACLE,
    RANDOM,
    ROUND_ROBIN,
    ByCost,
    EventEstimator,
    Policy,
    Unaware,
)
from vswa_plugin.simulation.research import PUBLISHED
from vswa_plugin.simulation.simulation import Clock, Faults, Simulation, Totals
from vswa_plugin.simulation.workloads import WORKLOADS, Arrival, made_up, mooncake, poisson
from vswa_plugin.wire import Rank

if TYPE_CHECKING:
    from vswa_plugin.host.host import PluginHost

#: What is compared by default; the oracle is always among them.
DEFAULT_POLICIES = (RANDOM, ROUND_ROBIN, "global only", "boundary projection", "exact", ORACLE)
#: Requests from which the mean prompt is taken.
_SAMPLE = 300
_MAX_SEQ_LEN = 131_072
#: Policies whose names no plugin may use.
_BUILT_IN = (RANDOM, ROUND_ROBIN, ORACLE, ONE_CACHE, *PUBLISHED)


class Plan(msgspec.Struct, frozen=True):
    """What all runs of a comparison have in common.

    :param workload: one of the built-in ones, or a file in Mooncake's format.
    :param requests: how many; of a file None means all.
    :param rate: requests a second; None: by ``load``, or as the file says.
    :param block_size: tokens per block, where the engine leaves them to the user; None: the usual ones.
    :param load: seconds of prefill that arrive per second and rank, were nothing cached.
    :param slow_rank: the first rank takes so many times as long as the others.
    :param small_rank: the first rank has this share of the others' blocks.
    :param restart_after: the first rank begins anew with nothing when so many requests have come.
    :param stretch: the requests take so many times as long to come.
    """

    workload: str
    requests: int | None = 1_000
    ranks: int = 4
    block_size: int | None = None
    sliding_share: float = 0.5
    rate: float | None = None
    load: float = 1.2
    cost: CostModel = CostModel()
    slow_rank: float = 1.0
    small_rank: float = 1.0
    restart_after: int | None = None
    stretch: float = 1.0

    def check(self) -> Plan:
        """Return self, or raise :class:`ConfigError` that names the value that cannot be used."""
        if self.workload not in WORKLOADS and not Path(self.workload).is_file():
            raise ConfigError(
                f"expected a workload, {', '.join(WORKLOADS)} or a file in Mooncake's format, got "
                f"{self.workload!r}"
            )
        for name in ("requests", "ranks", "block_size", "rate", "load", "slow_rank", "restart_after"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')}: expected a number above 0, got {value}")
        for name in ("sliding_share", "small_rank"):
            if not 0 < (share := getattr(self, name)) <= 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option}: expected a share above 0, up to 1, got {share}")
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
        if case.policy == ONE_CACHE:
            return self._one_cache(case, progress)
        plan, clock = self.plan, Clock()
        setups = [self._setup(case, plan.small_rank)] + (plan.ranks - 1) * [self._setup(case)]
        ranks = [self._host.simulated_rank(setup) for setup in setups]
        policy = self._policy(case, setups, ranks, clock)
        faults = Faults(
            slower=plan.slow_rank,
            restart_after=plan.restart_after,
            fresh=lambda: self._host.simulated_rank(setups[0]),
        )
        simulation = Simulation(ranks, policy, plan.cost, setups[0].layout.naming, clock, faults)
        return run_of(case, simulation.run(self.arrivals(case.seed), progress))

    def _setup(self, case: Case, share: float = 1.0) -> RankSetup:
        """One rank, with this share of the blocks."""
        events = case.policy not in (RANDOM, ROUND_ROBIN, ORACLE, *PUBLISHED)
        blocks = max(1, round(share * case.blocks))
        share = self.plan.sliding_share
        return rank_setup(case.preset, blocks, share, self.plan.block_size, _MAX_SEQ_LEN, events)

    def _one_cache(self, case: Case, progress: Callable[[int], None]) -> Run:
        """The same requests on one rank with all blocks, to which they come at the rate of one rank."""
        plan = msgspec.structs.replace(
            self.plan, ranks=1, stretch=self.plan.ranks * self.plan.stretch, slow_rank=1.0, small_rank=1.0
        )
        plan = msgspec.structs.replace(plan, restart_after=None)
        count = self.plan.ranks - 1 + self.plan.small_rank
        whole = Case(case.preset, round(count * case.blocks), ORACLE, case.seed)
        return msgspec.structs.replace(Bench(plan, self._host).run(whole, progress), case=case)

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """The requests of every case with that seed."""
        plan = self.plan
        arrivals = self._arrivals(seed)
        if plan.stretch == 1:
            return arrivals
        return (Arrival(plan.stretch * arrival.at_s, arrival.request) for arrival in arrivals)

    def _arrivals(self, seed: int) -> Iterator[Arrival]:
        plan = self.plan
        if plan.workload not in WORKLOADS:
            return _at_rate(mooncake(Path(plan.workload), plan.requests), plan)
        requests = islice(made_up(plan.workload, seed), plan.requests)
        rate = plan.rate
        if rate is None:
            sample = list(islice(made_up(plan.workload, seed), _SAMPLE))
            cold_s = sum(plan.cost.prefill_s(len(each.prompt), 0) for each in sample) / len(sample)
            rate = plan.load * plan.ranks * plan.stretch / cold_s
        return poisson(requests, rate, seed)

    def _policy(
        self,
        case: Case,
        setups: Sequence[RankSetup],
        ranks: Sequence[SimulatedRank],
        clock: Callable[[], float],
    ) -> Policy:
        setup = setups[-1]
        rng = random.Random(f"policy {case.seed}")
        if case.policy == RANDOM:
            return Unaware(len(ranks), rng)
        if case.policy == ROUND_ROBIN:
            return Unaware(len(ranks), None)
        naming, chooser = setup.layout.naming, None
        if case.policy in PUBLISHED:
            chooser = PUBLISHED[case.policy](clock, self.plan.cost, case.blocks)
        if case.policy == ORACLE or chooser is not None:
            return ByCost(len(ranks), None, naming, rng, chooser=chooser)
        chooser = self._host.simulated_choosers(clock, _BUILT_IN).get(case.policy)
        views = [
            EventEstimator(
                setup.layout,
                partial(self._host.event_adapter, rank.event_format, setup.layout),
                self._scorer(EXACT if chooser is not None else case.policy, setup),
                None if chooser is None else partial(chooser.rank_changed, Rank(index)),
                _memory_of(setups[index]),
            )
            for index, rank in enumerate(ranks)
        ]
        return ByCost(len(ranks), views, naming, rng, chooser=chooser)

    def _scorer(self, name: str, setup: RankSetup) -> Scorer:
        scorers = built_in_scorers(self._rules)
        names = [each.name for each in scorers]
        scorers += self._host.accuracy_scorers(setup.layout, self._rules, names)
        for scorer in scorers:
            if scorer.name == name:
                return scorer
        choosers = self._host.simulated_choosers(lambda: 0.0, _BUILT_IN)
        known = [
            RANDOM,
            ROUND_ROBIN,
            *(each.name for each in scorers),
            *choosers,
            *PUBLISHED,
            ORACLE,
            ONE_CACHE,
        ]
        raise ConfigError(unknown_choice("policy", name, known))


def _memory_of(setup: RankSetup) -> Memory:
    """The pools of a simulated rank, as its engine would state them."""
    ids = [group.group_id for group in setup.layout.groups]
    if setup.layout.rule in ("vllm", "vllm_hybrid"):
        return Memory((Pool(tuple(ids), sum(setup.blocks)),))
    return Memory(tuple(Pool((each,), blocks) for each, blocks in zip(ids, setup.blocks, strict=True)))


def _at_rate(arrivals: Iterator[Arrival], plan: Plan) -> Iterator[Arrival]:
    """The times of a file, stretched to ``plan.rate`` where it is given."""
    if plan.rate is None:
        return arrivals
    last, count = 0.0, 0
    for arrival in mooncake(Path(plan.workload), plan.requests):
        last, count = arrival.at_s, count + 1
    stretch = count / plan.rate / last if last else 1.0
    return (Arrival(arrival.at_s * stretch, arrival.request) for arrival in arrivals)


def cases(
    presets: Sequence[str], blocks: Sequence[int], names: Sequence[str] | None, seeds: Sequence[int]
) -> list[Case]:
    """All combinations; policies of one cell next to each other.

    :param names: of policies; None: the default ones.
    :raises ConfigError: no such model.
    """
    if names is None:
        for preset in presets:
            preset_named(preset)
    return [
        Case(preset, count, policy, seed)
        for preset in presets
        for count in blocks
        for seed in seeds
        for policy in (names or DEFAULT_POLICIES)
    ]
