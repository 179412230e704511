"""What placement and greedy choose, term by term, and through the real host and router."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from vswa_plugins.placement import MODES, Placement
from vswa_plugins.placement.cost import Placer, Prices, plain_cost
from vswa_plugins.placement.greedy import Greedy, dynamo_cost

from tests.router.test_decide import HASHES, LAYOUT, PROMPT, A, B, C, Setting
from vswa_plugin.engine import Section
from vswa_plugin.errors import ConfigError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.router.decide import PromptHashes
from vswa_plugin.router.watched import books_for
from vswa_plugin.selection import Candidate, Load, LoadBook, RoutedRequest, Scored, Weights, of_phase, scored
from vswa_plugin.wire import Rank, Removed, Stored, layout_event

SIZE = 16


def any_candidates(rng: random.Random, prompt_tokens: int, *, in_flight: bool) -> list[Candidate]:
    found = []
    for worker in range(rng.randint(1, 5)):
        blocks = prompt_tokens // SIZE
        cached = rng.randint(0, blocks)
        host = rng.randint(0, cached)
        disk = rng.randint(0, cached - host)
        ahead = rng.randint(0, blocks - cached) if in_flight else 0
        load = Load(rng.randint(0, 50), rng.randint(0, 5_000), rng.randint(0, 9))
        new = rng.randint(0, blocks)
        found.append(Candidate(Rank(worker), cached * SIZE, host, disk, ahead * SIZE, load, new))
    return found


def routed(prompt_tokens: int, phase: str = "agg", model: str = "m") -> RoutedRequest:
    return RoutedRequest("", model, prompt_tokens, SIZE, list(range(prompt_tokens // SIZE)), phase=phase)


@pytest.mark.parametrize("phase", ["agg", "prefill", "decode"])
def test_greedy_costs_what_the_router_costs_with_dynamos_own_weights(phase: str) -> None:
    """These are compared with Dynamo's running router in tests/selection/test_selection_dynamo.py."""
    weights = of_phase(Weights(in_flight_credit=0.0, transfer_credit=0.0), phase)
    rng = random.Random(phase)
    for _ in range(300):
        tokens = rng.randint(1, 2_000)
        candidates = scored(any_candidates(rng, tokens, in_flight=True), tokens, SIZE, weights)
        costs = [dynamo_cost(each, routed(tokens, phase)) for each in candidates]
        chosen = Greedy(rng).select_worker(routed(tokens, phase), candidates)

        assert [each.cost for each in candidates] == pytest.approx(costs, rel=1e-12)
        assert costs[[each.rank for each in candidates].index(chosen or A)] == min(costs)


@pytest.mark.parametrize("phase", ["agg", "prefill"])
def test_what_placement_adds_leaves_its_own_cost_and_what_others_have_changed(phase: str) -> None:
    rng = random.Random(phase)
    for _ in range(100):
        tokens = rng.randint(1, 2_000)
        candidates = scored(
            any_candidates(rng, tokens, in_flight=True), tokens, SIZE, of_phase(Weights(), phase)
        )
        request = routed(tokens, phase)
        assert [each.cost for each in candidates] == pytest.approx(
            [plain_cost(each, request) for each in candidates]
        )
        placer = Placer(lambda: 0.0)
        added, terms = placer.score(request, candidates), placer.terms(request, candidates)
        block_s = SIZE * 1e-4
        for each, term in zip(candidates, terms, strict=True):
            assert each.cost + added[each.rank] == pytest.approx(term.total / block_s)
        liked = [Scored(each.candidate, each.cost * 0.5) for each in candidates]  # a client prefers them
        assert added == placer.score(request, liked)


def placer_with(layout: Any = LAYOUT, **prices: float) -> tuple[Placer, LoadBook]:
    """Ranks A, B and C of the model m, and the load book that the placer follows."""
    placer = Placer(lambda: 0.0, Prices(**prices))
    book = LoadBook(SIZE)
    book.watch = lambda key, step, request: placer.load_changed("m", key, step, request)
    for rank in (A, B, C):
        placer.rank_changed(rank, layout_event(layout))
    return placer, book


def names_of(start: int, blocks: int) -> tuple[int, ...]:
    return tuple(16 * (start + number) for number in range(blocks))  # each of them is sampled


def fill(placer: Placer, rank: Rank, names: Sequence[int]) -> None:
    for group in (0, 1):
        placer.rank_changed(rank, Stored(group, 0, None, tuple(names), "device"))
        placer.rank_changed(rank, Stored(group, 0, None, (16 << 20,), "device"))
        placer.rank_changed(rank, Removed(group, (16 << 20,)))


def candidates_of(*ranks: Rank, tokens: int = 480) -> list[Scored]:
    return scored([Candidate(rank, new_blocks=tokens // SIZE) for rank in ranks], tokens, SIZE, Weights())


def test_what_others_will_need_again_is_not_evicted_for_a_new_prompt() -> None:
    placer, book = placer_with()
    often, never = names_of(0, 10), names_of(1_000, 10)
    for number in range(200):
        book.add(number, A, often if number % 2 else names_of(5_000 + 20 * number, 10), 170, 170)
        book.free(number)
    fill(placer, A, often)
    fill(placer, B, never)
    book.add("last", C, never, 170, 170)
    book.free("last")
    for number in range(1_000, 1_100):  # so that what B holds has not been requested for long
        book.add(number, C, names_of(90_000 + 20 * number, 10), 170, 170)
        book.free(number)
    book.add("again", A, often, 170, 10, cached_blocks=10)
    book.free("again")

    of_a, of_b = placer.terms(routed(480), candidates_of(A, B))
    assert of_a.evicted == of_b.evicted > 0
    assert of_a.loss > 3 * of_b.loss > 0
    assert of_a.total > of_b.total


def test_time_and_memory_are_one_currency_with_a_price_that_rises_with_the_queue() -> None:
    placer, book = placer_with(base=3.0, per_waiting=1.0)
    (calm,) = placer.terms(routed(480), candidates_of(A))
    for number in range(8):
        book.add(number, (A, B)[number % 2], names_of(100 * number, 10), 170, 170)
    of_a, of_c = placer.terms(routed(480), candidates_of(A, C))

    assert 3.0 == calm.price and 3.0 + 4 / 2 == of_a.price == of_c.price
    assert pytest.approx(480e-4) == of_c.compute
    assert of_c.total == pytest.approx(of_c.wait + of_c.price * (of_c.compute + of_c.room + of_c.loss))


def test_the_blocks_of_a_request_take_up_room_where_it_is_scarce() -> None:
    now = [0.0]
    placer = Placer(lambda: now[0])
    book = LoadBook(SIZE)
    book.watch = lambda key, step, request: placer.load_changed("m", key, step, request)
    placer.rank_changed(A, layout_event(LAYOUT))
    book.add(1, A, names_of(0, 10), 170, 170)
    book.first_token(1)
    now[0] = 4.0
    book.free(1)
    assert 0.0 == placer.terms(routed(480), candidates_of(A))[0].room
    fill(placer, A, names_of(0, 60))

    (term,) = placer.terms(routed(480), candidates_of(A))
    assert term.room == pytest.approx(30 * 4.0 / (61 * 16), rel=0.05)


def test_what_cannot_win_is_not_looked_at_and_the_winner_is_the_same() -> None:
    rng = random.Random(8)
    placer, book = placer_with()
    for rank in (A, B, C):
        fill(placer, rank, names_of(rng.randrange(100), 40))
    for number in range(60):
        book.add(number, (A, B, C)[number % 3], names_of(rng.randrange(120), 10), 170, 170)
        book.first_token(number)
        candidates = candidates_of(A, B, C, tokens=SIZE * rng.randint(2, 60))
        request = routed(SIZE * rng.randint(2, 60))
        added = placer.score(request, candidates)
        totals = [term.total for term in placer.terms(request, candidates)]
        adjusted = [each.cost + added[each.rank] for each in candidates]

        assert totals.index(min(totals)) == adjusted.index(min(adjusted))


def test_a_decode_worker_is_chosen_as_without_the_plugin() -> None:
    placer, _ = placer_with()

    assert {} == placer.score(routed(480, "decode"), candidates_of(A, B))
    assert placer.shown(routed(480, "decode"), candidates_of(A, B)) is None


def test_a_request_that_is_decoded_elsewhere_has_come_once() -> None:
    placer, book = placer_with()
    placer.score(routed(480, "decode"), candidates_of(B))
    for number in range(5):
        book.add((number, "prefill"), A, names_of(20 * number, 10), 170, 170)
        book.add((number, "decode"), B, names_of(20 * number, 10), 170, 0)

    assert 5 == placer._models["m"].odds.now
    assert 3.0 + 5 / 2 == placer.terms(routed(480), candidates_of(A, B))[0].price


def test_models_are_apart_and_a_rank_that_has_gone_is_forgotten() -> None:
    placer, book = placer_with()
    for number in range(6):
        book.add(number, A, names_of(100 * number, 10), 170, 170)

    assert 3.0 == placer.terms(routed(480, model="other"), candidates_of(A))[0].price
    assert 9.0 == placer.terms(routed(480), candidates_of(A))[0].price
    placer.rank_changed(A, None)
    assert 3.0 == placer.terms(routed(480), candidates_of(A))[0].price
    placer.rank_changed(A, Removed(0, (1,)))  # of a rank that is not known: it changes nothing


# -- the plugin --------------------------------------------------------------------------------------


def host_in(mode: str, **options: Any) -> PluginHost:
    host = PluginHost()
    host.register(Placement(lambda: 0.0), "placement")
    host.options({"placement": Section({"mode": mode, **options}, "a test", "placement")})
    return host


@pytest.mark.parametrize(
    ("mode", "called"),
    [
        ("off", set()),
        ("greedy", {"vswa_select_worker"}),
        ("placement", {"vswa_score", "vswa_load_changed", "vswa_rank_changed", "vswa_choice_terms"}),
    ],
)
def test_only_what_a_mode_needs_is_called(mode: str, called: set[str]) -> None:
    host = host_in(mode)
    hooks = (
        "vswa_score",
        "vswa_select_worker",
        "vswa_load_changed",
        "vswa_rank_changed",
        "vswa_choice_terms",
    )

    assert called == {hook for hook in hooks if host.implements(hook)}
    assert (host.selection_hooks() is None) == (mode == "off")


def test_it_is_off_unless_an_operator_says_otherwise() -> None:
    host = PluginHost()
    host.register(Placement(), "placement")
    host.options({})

    assert host.selection_hooks() is None


@pytest.mark.parametrize("wrong", [{"mode": "best"}, {"loss": -1}, {"base": "dear"}, {"lost": 1}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        host_in(**{"mode": "placement", **wrong})


def test_greedy_scatters_a_burst_of_one_prefix_as_dynamo_does_and_placement_keeps_it() -> None:
    scattered, kept = Setting(host_in("greedy")), Setting(host_in("placement"))

    assert {A, B, C} == {scattered.decide().rank for _ in range(3)}
    assert 1 == len({kept.decide().rank for _ in range(3)})


def test_a_prefix_is_waited_for_where_dynamo_would_compute_it_again() -> None:
    """A rank with the prefix has so much to compute that the router's own cost goes elsewhere."""
    chosen = {}
    for mode in MODES:
        host = host_in(mode)
        setting = Setting(host.selection_hooks())
        setting.pool.book = books_for(host, lambda _, size: LoadBook(size))("m", SIZE)
        setting.holds(A, sliding=range(8), whole=range(8))
        setting.pool.book.add("other", A, [1 << 40], 200, 200)
        chosen[mode] = setting.decide().rank == A
        assert not host.failures()

    assert {"off": False, "greedy": False, "placement": True} == chosen


def test_a_pin_and_a_choice_of_another_plugin_go_before() -> None:
    setting = Setting(host_in("placement"))
    setting.holds(A, sliding=range(8), whole=range(8))

    assert A == setting.decide().rank
    assert C == setting.decide(routing={"backend_instance_id": 2, "dp_rank": 1}).rank


def test_a_choice_is_explained_and_nothing_is_counted() -> None:
    host = host_in("placement")
    setting = Setting(host)
    setting.holds(B, sliding=range(8), whole=range(8))
    prompt = PromptHashes(len(PROMPT), HASHES, HASHES)
    weighed = setting.decider.weighed(setting.pool, prompt)

    assert [False, True, False] == [each.chosen for each in weighed]
    assert 0 == len(setting.pool.book)
    for each in weighed:
        block_s = SIZE * 1e-4
        assert each.scored.cost + each.added == pytest.approx(each.terms["total"] / block_s)
        assert {"wait", "compute", "room", "loss", "held", "price", "evicted", "back", "total"} == set(
            each.terms
        )
    without = Setting().decider.weighed(Setting().pool, prompt)
    assert all(0.0 == each.added and {} == each.terms for each in without)
