"""Placement and the policies of others in simulations: what is worth what, and what is wrong with a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import msgspec
import pytest

from tests.host_helpers import plugin as plugin_of
from vswa_plugin.errors import ConfigError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host
from vswa_plugin.selection import ENDED, SENT, Booked, Candidate, Load, RoutedRequest, Scored
from vswa_plugin.simulation.costs import CostModel
from vswa_plugin.simulation.policies import ONE_CACHE, ORACLE
from vswa_plugin.simulation.report import Report, conclusions
from vswa_plugin.simulation.research import PUBLISHED, SGLang
from vswa_plugin.simulation.sweep import Bench, Case, Plan, Run
from vswa_plugin.wire import Rank

MODEL = "gemma-3-1b"
A, B, C = Rank(0), Rank(1), Rank(2)


@pytest.fixture(scope="module")
def host() -> Iterator[PluginHost]:
    with load_host(environ={}) as loaded:
        yield loaded


def run(host: PluginHost, policy: str, blocks: int = 1024, seed: int = 0, **plan: object) -> Run:
    made = msgspec.structs.replace(Plan("documents", requests=150), **plan)
    return Bench(made, host).run(Case(MODEL, blocks, policy, seed))


def test_placement_computes_less_again_than_the_greedy_oracle_where_memory_is_tight(host: PluginHost) -> None:
    """The short form of benchmarks/bench_placement.py."""
    oracle, ours, whole = (run(host, policy) for policy in (ORACLE, "placement", ONE_CACHE))

    assert ours.computed_tokens < 0.95 * oracle.computed_tokens
    assert whole.recomputed < ours.recomputed < oracle.recomputed


def test_placement_does_no_harm_where_memory_holds_everything(host: PluginHost) -> None:
    oracle, ours = (run(host, policy, 4096, workload="chat") for policy in (ORACLE, "placement"))

    assert ours.computed_tokens < 1.02 * oracle.computed_tokens


def test_greedy_as_dynamo_and_placement_are_there_to_be_compared_and_repeat_themselves(
    host: PluginHost,
) -> None:
    for policy in ("dynamo", "placement", *PUBLISHED):
        first, again = (run(host, policy, requests=60) for _ in range(2))
        assert first == again, policy
        assert 60 == first.requests


def test_an_unknown_policy_is_refused_with_the_names_of_all(host: PluginHost) -> None:
    with pytest.raises(ConfigError, match=r"lbgr, .*one cache, oracle, placement, preble, .*sglang"):
        run(host, "placment")


# -- the bound, and what is wrong with a rank --------------------------------------------------------


def test_one_cache_serves_the_same_requests_and_has_the_blocks_of_all_ranks(host: PluginHost) -> None:
    whole, alone = run(host, ONE_CACHE, 1024), run(host, ORACLE, 4096, ranks=1)
    many = run(host, ORACLE, 1024)

    assert (whole.prompt_tokens, whole.computed_tokens) == (alone.prompt_tokens, alone.computed_tokens)
    assert whole.prompt_tokens == many.prompt_tokens
    assert ONE_CACHE == whole.case.policy and 1024 == whole.case.blocks
    # At the rate of one rank, also where the rate is given.
    assert run(host, ONE_CACHE, rate=8.0).ttft_p90_s == pytest.approx(
        run(host, ORACLE, 4096, ranks=1, rate=2.0).ttft_p90_s
    )
    small = run(host, ONE_CACHE, 1024, small_rank=0.5)
    assert small.recomputed >= whole.recomputed


def test_a_slow_rank_makes_all_wait_and_placement_sends_less_there(host: PluginHost) -> None:
    even, slow = (run(host, "placement", slow_rank=factor) for factor in (1.0, 4.0))
    unaware = run(host, "round robin", slow_rank=4.0)

    assert slow.ttft_p90_s > even.ttft_p90_s
    assert slow.ttft_p90_s < unaware.ttft_p90_s
    assert slow.imbalance < unaware.imbalance


@pytest.mark.parametrize("policy", [ORACLE, "placement"])
def test_a_rank_that_restarts_empty_costs_what_it_held(host: PluginHost, policy: str) -> None:
    whole, restarted = (run(host, policy, 4096, restart_after=after) for after in (None, 75))

    assert restarted.requests == whole.requests
    assert restarted.computed_tokens > whole.computed_tokens


def test_a_small_rank_refuses_what_does_not_fit_it(host: PluginHost) -> None:
    assert 0 == run(host, ORACLE, 1024).refused < run(host, ORACLE, 1024, small_rank=0.1).refused


@pytest.mark.parametrize("wrong", [{"slow_rank": 0.0}, {"small_rank": 1.5}, {"restart_after": 0}])
def test_wrong_numbers_are_refused_by_the_options_name(wrong: dict[str, float]) -> None:
    option = f"--{next(iter(wrong)).replace('_', '-')}"
    with pytest.raises(ConfigError, match=option):
        msgspec.structs.replace(Plan("chat"), **wrong).check()


# -- policies of others ------------------------------------------------------------------------------


def candidates_of(*given: tuple[int, int]) -> list[Scored]:
    """(cached tokens, requests) of the ranks A, B, C."""
    return [
        Scored(Candidate(Rank(index), cached, load=Load(requests=count)), 0.0)
        for index, (cached, count) in enumerate(given)
    ]


REQUEST = RoutedRequest("", "m", 1_000, 32, range(31))


def test_sglang_follows_a_long_prefix_until_the_queues_differ_much() -> None:
    policy = SGLang(lambda: 0.0, CostModel(), 100)
    policy.load_changed("m", 1, SENT, Booked(B, range(9), 300, 300, 0, True))

    assert B == policy.select_worker(REQUEST, candidates_of((0, 0), (400, 60), (320, 0)))
    assert A == policy.select_worker(REQUEST, candidates_of((0, 0), (400, 90), (320, 1)))
    assert A == policy.select_worker(REQUEST, candidates_of((0, 3), (200, 0)))  # B has more blocks already


def test_preble_follows_a_prefix_of_more_than_half_and_else_the_least_cost() -> None:
    policy = PUBLISHED["preble"](lambda: 0.0, CostModel(), 100)

    assert B == policy.select_worker(REQUEST, candidates_of((400, 0), (600, 5)))
    policy.load_changed("m", 1, SENT, Booked(A, range(1000, 1100), 3_000, 3_000, 0, True))
    assert C == policy.select_worker(REQUEST, candidates_of((400, 0), (300, 5), (450, 9)))
    assert B == policy.select_worker(
        REQUEST, candidates_of((400, 0), (300, 5))
    )  # A is loaded, and would evict


def test_preble_counts_what_a_full_rank_would_evict() -> None:
    policy = PUBLISHED["preble"](lambda: 0.0, CostModel(), 100)
    assert A == policy.select_worker(REQUEST, candidates_of((0, 0), (0, 0)))
    policy.load_changed("m", 1, SENT, Booked(A, range(1000, 1100), 3_200, 1, 99, True))
    policy.load_changed("m", 2, SENT, Booked(B, range(2000, 2030), 3_200, 1, 29, True))

    assert B == policy.select_worker(REQUEST, candidates_of((0, 0), (0, 0)))


def test_lbgr_learns_which_rank_is_later_than_expected() -> None:
    now = [0.0]
    policy = PUBLISHED["lbgr"](lambda: now[0], CostModel(), 100)
    assert A == policy.select_worker(REQUEST, candidates_of((100, 0), (0, 0)))
    for key in range(20):
        booked = Booked(A, range(31), 1_000, 900, 3, True)
        policy.load_changed("m", key, SENT, booked)
        now[0] += 5.0
        policy.load_changed("m", key, ENDED, booked)

    assert B == policy.select_worker(REQUEST, candidates_of((100, 0), (0, 0)))


# -- policies of plugins -----------------------------------------------------------------------------


class First:
    """Takes the first rank."""

    def score(self, request: RoutedRequest, candidates: list[Scored]) -> Mapping[Rank, float]:
        return {}

    def select_worker(self, request: RoutedRequest, candidates: list[Scored]) -> Rank | None:
        return candidates[0].rank

    def load_changed(self, model: str, key: object, step: str, request: Booked) -> None: ...

    def rank_changed(self, rank: Rank, event: object) -> None: ...


def choosers_of(answer: object) -> Callable[..., object]:
    return lambda: answer


@pytest.mark.parametrize("answer", [[First()], {"mine": object()}, {ORACLE: First()}])
def test_a_plugin_whose_policies_are_none_loses_them(answer: object) -> None:
    host = PluginHost()
    host.register(plugin_of(vswa_simulated_choosers=choosers_of(answer)), "wrong")
    host.register(plugin_of(vswa_simulated_choosers=choosers_of({"first": First()})), "right")

    assert ["first"] == list(host.simulated_choosers(lambda: 0.0, [ORACLE]))
    assert 1 == sum(host.failures().values())


def test_a_policy_of_a_plugin_chooses(host: PluginHost) -> None:
    with load_host(environ={}) as own:
        own.register(plugin_of(vswa_simulated_choosers=choosers_of({"first": First()})), "mine")

        assert pytest.approx(4.0) == run(own, "first", 4096, requests=40).imbalance


# -- the report --------------------------------------------------------------------------------------


def test_the_report_says_what_placement_was_worth(host: PluginHost) -> None:
    plan = Plan("documents", requests=100)
    bench = Bench(plan, host)
    runs = [
        bench.run(Case(MODEL, 1024, policy, seed)) for policy in (ORACLE, "placement") for seed in (0, 1, 2)
    ]
    told = conclusions(Report(plan, runs))

    assert told[0].startswith("In brackets")
    assert told[1].startswith("Placement ") and "computed tokens" in told[2]
    assert 3 == len(told)
    halved = [
        msgspec.structs.replace(each, computed_tokens=each.computed_tokens // 2)
        if each.case.policy == "placement"
        else each
        for each in runs
    ]
    better = conclusions(Report(plan, halved))
    assert "Placement was better than the oracle's greedy choice:" == better[1]
