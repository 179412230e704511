"""One choice, from request to booking, over a real window index."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Naming
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.errors import InvalidRequest
from vswa_plugin.index import WindowIndex
from vswa_plugin.router.decide import Decider, Decision
from vswa_plugin.router.pools import Pool
from vswa_plugin.selection import Load, LoadBook, NoCandidate, RoutedRequest, Scored, Weights
from vswa_plugin.wire.events import Rank, Stored

LAYOUT = CacheLayout((CacheGroup(0, 32, 16), CacheGroup(1, None, 16)), "trtllm_v2", "m")
A, B, C = Rank(1), Rank(2), Rank(2, 1)
PROMPT = list(range(130))
HASHES = list(namespaced_sequence_hashes(PROMPT, 16))


class Setting:
    """Ranks A, B and C in one pool."""

    def __init__(self, hooks: Any = None, **weights: Any) -> None:
        self.index = WindowIndex()
        for rank in (A, B, C):
            self.index.join(rank, LAYOUT)
        self.pool = Pool("m", Naming(16, 16), LoadBook(16), (A, B, C))
        self.decider = Decider(
            self.index, Weights(**weights), namespaced_sequence_hashes, hooks, random.Random(3)
        )

    def holds(
        self, rank: Rank, *, sliding: Sequence[int], whole: Sequence[int], tier: str = "device"
    ) -> None:
        for group, blocks in ((0, sliding), (1, whole)):
            for block in blocks:
                self.index.apply(rank, Stored(group, block, None, (HASHES[block],), tier))

    def decide(self, tokens: Any = PROMPT, routing: Any = None, **options: Any) -> Decision:
        request = {"model": "m", "token_ids": tokens, "routing": routing, **options.pop("request", {})}
        return self.decider.decide(self.pool, request, **options)


def test_a_long_prefix_without_its_sliding_blocks_loses_against_a_shorter_one_that_can_be_resumed() -> None:
    """A group-blind router promises eight blocks of A, which the engine would compute all anew."""
    setting = Setting()
    setting.holds(A, sliding=[0, 1], whole=range(8))
    setting.holds(B, sliding=[3, 4], whole=range(5))

    decision = setting.decide()

    assert (decision.rank, decision.cached_tokens) == (B, 80)
    assert decision.cost == 130 / 16 - 5 + 8
    assert setting.pool.book.load(B) == Load(8, 50, 1)


def test_a_burst_of_one_new_prefix_stays_where_its_first_request_went() -> None:
    setting = Setting()
    chosen = [setting.decide([*PROMPT[:112], *range(500 + 9 * n, 530 + 9 * n)]) for n in range(3)]
    ranks = {decision.rank for decision in chosen}

    assert [(each.busy, each.in_flight) for each in chosen] == [(False, False), (True, True), (True, True)]
    assert len(ranks) == 1
    assert setting.pool.book.load(ranks.pop()) == Load(7 + 3, 142 + 2 * 30, 3)
    scattering = Setting(in_flight_credit=0)
    assert len({scattering.decide().rank for _ in range(3)}) == 3


def test_different_prompts_spread_by_what_is_in_flight() -> None:
    setting = Setting()
    chosen = [setting.decide([start + i for i in range(130)]).rank for start in (0, 1_000, 2_000)]

    assert sorted(chosen) == [A, B, C]


def test_blocks_on_slower_tiers_are_credited_less() -> None:
    setting = Setting()
    setting.holds(A, sliding=[6, 7], whole=range(8), tier="host")
    setting.holds(B, sliding=[5, 6], whole=range(7))

    decision = setting.decide()

    assert (decision.rank, decision.cached_tokens) == (B, 112)
    assert setting.decide(routing={"backend_instance_id": 1}).cost == pytest.approx(130 / 16 - 0.75 * 8 + 8)


def test_a_view_that_is_not_scored_promises_nothing_and_stays_routable() -> None:
    setting = Setting()
    setting.holds(A, sliding=range(8), whole=range(8))
    setting.index.set_scored(A, False)

    assert setting.decide(routing={"backend_instance_id": 1}).cached_tokens == 0


def test_salt_and_lora_have_namespaces_of_their_own() -> None:
    setting = Setting()
    setting.holds(A, sliding=range(8), whole=range(8))
    salted = namespaced_sequence_hashes(PROMPT, 16, "s")
    for group in (0, 1):
        setting.index.apply(C, Stored(group, 0, None, tuple(salted)))

    assert setting.decide().rank == A
    assert setting.decide(routing={"cache_salt": "s"}).rank == C
    assert setting.decide(routing={"lora_name": "l"}).cached_tokens == 0


def test_images_are_promised_no_reuse_and_packed_tokens_are_read() -> None:
    setting = Setting()
    setting.holds(A, sliding=range(8), whole=range(8))

    assert setting.decide(request={"multi_modal_data": {"image": ["x"]}}).cached_tokens == 0
    setting.pool.book.drop(1)
    assert setting.decide(array("I", PROMPT).tobytes()).cached_tokens == 128


def test_workers_that_are_away_are_no_candidates_and_avoided_ones_come_last() -> None:
    setting = Setting()
    setting.holds(A, sliding=range(8), whole=range(8))

    assert setting.decide(reachable={2}).rank.worker_id == 2
    assert setting.decide(avoided={1: 9.0}).rank.worker_id == 2
    assert setting.decide(avoided={1: 8.0, 2: 9.0}).rank == A
    assert setting.decide(avoided={1: 9.0, 2: 8.0}).rank.worker_id == 2
    assert setting.decide(avoided={2: 9.0}, routing={"backend_instance_id": 2}).rank.worker_id == 2
    with pytest.raises(NoCandidate):
        setting.decide(reachable=set())


def test_pins_and_lists_are_kept_unless_they_name_the_router_itself() -> None:
    setting = Setting()
    setting.holds(A, sliding=range(8), whole=range(8))

    assert setting.decide(routing={"dp_rank": 1}).rank == C
    assert setting.decide(routing={"allowed_worker_ids": [2], "dp_rank": 0}).rank == B
    assert setting.decide(routing={"backend_instance_id": 77}, own_id=77).rank == A
    assert setting.decide(routing={"allowed_worker_ids": [77]}, own_id=77).rank == A
    with pytest.raises(InvalidRequest, match="backend_instance_id"):
        setting.decide(routing={"backend_instance_id": 77})
    with pytest.raises(InvalidRequest, match=r"routing: .*dp_rank"):
        setting.decide(routing={"dp_rank": "first"})


def test_taints_are_required_or_preferred_as_the_request_says() -> None:
    setting = Setting()
    setting.pool.taints = {1: frozenset({"old"}), 2: frozenset({"new"})}

    def ask(**constraints: Any) -> Rank:
        return setting.decide(routing={"routing_constraints": constraints}).rank

    assert ask(required_taints=["old"]) == A
    assert ask(preferred_taints={"new": 1.0}) in (B, C)
    with pytest.raises(NoCandidate, match="required_taints"):
        ask(required_taints=["none"])


def test_an_override_counts_for_its_own_request_only() -> None:
    setting = Setting()
    setting.holds(A, sliding=range(8), whole=range(8))
    setting.decide(request={"router_config_override": {"assume_kv_reuse": False}})

    assert (
        setting.decide(request={"router_config_override": {"overlap_score_credit": 0.0}}).cost == 130 / 16 + 8
    )
    assert setting.pool.book.load(A).blocks == 8
    setting.pool.book.drop(1)
    assert setting.decide().rank == A


class Prefers:
    """A plugin's word: how much to add to each rank's cost, and which to take."""

    def __init__(self, additions: Mapping[Rank, float], rank: Rank | None = None) -> None:
        self.additions, self.rank = additions, rank
        self.told: list[tuple[RoutedRequest, Sequence[Scored]]] = []

    def score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float]:
        return self.additions

    def select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        self.told.append((request, candidates))
        return self.rank


def test_plugins_adjust_costs_or_take_the_choice() -> None:
    adjusting = Prefers({A: 100.0, B: 0.5})
    setting = Setting(adjusting)
    setting.holds(A, sliding=range(8), whole=range(8))

    assert setting.decide(request_id="r", metadata={"tier": "gold"}).rank == C
    ((request, candidates),) = adjusting.told
    assert (request.request_id, request.prompt_tokens, request.metadata) == ("r", 130, {"tier": "gold"})
    assert {each.rank: each.cost - 130 / 16 for each in candidates} == {A: 100.0, B: 8.5, C: 8.0}
    assert Setting(Prefers({}, B)).decide().rank == B
    assert Setting(Prefers({}, Rank(9))).decide().rank in (A, B, C)


def test_a_prompt_that_an_earlier_choice_has_read_is_not_read_again() -> None:
    setting = Setting()
    setting.holds(A, sliding=range(8), whole=range(8))
    first = setting.decide()
    second = setting.decide([1, 2, 3], prompt=first.prompt)

    assert (first.prompt.length, first.prompt.hashes) == (130, HASHES)
    assert (second.rank, second.cached_tokens, second.prompt_len) == (A, 128, 130)


def test_tokens_that_are_none_refuse_the_request() -> None:
    with pytest.raises(InvalidRequest, match="token ids"):
        Setting().decide([1, 2, -5] * 16)
