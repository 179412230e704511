"""Sessions stay on a rank: what is chosen, over a router's own choice; what is kept, and for how long."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.affinity import Affinity
from vswa_plugins.affinity.sessions import Sessions, outcome_of, stays_or_moves

from tests.properties import examples
from tests.router.test_decide import HASHES, PROMPT, A, B, C, Setting
from vswa_plugin.engine import Section
from vswa_plugin.errors import ConfigError, InvalidRequest
from vswa_plugin.host.host import PluginHost
from vswa_plugin.selection import Candidate, Load, Scored
from vswa_plugin.wire.events import Rank, Removed


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Router:
    """A decider with the plugin, of which nothing stays booked."""

    options: dict[str, Any]
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.host = PluginHost()
        self.host.register(Affinity(self.clock), "affinity")
        self.host.options({"affinity": Section(self.options, "options.yaml", "affinity")})
        self.setting = Setting(self.host.selection_hooks())

    def ask(self, session: Any = "s", tokens: Any = PROMPT, done: bool = True, **options: Any) -> Rank:
        context = {"agent_context": {"session_id": session, "input_trigger": "other"}}
        decision = self.setting.decide(tokens, request=context, **options)
        if done:
            self.setting.pool.book.free(decision.key)
        return decision.rank

    def outcomes(self) -> dict[str, int]:
        beginning = 'vswa_affinity_choices_total{outcome="'
        lines = [line for line in self.host.metrics().splitlines() if line.startswith(beginning)]
        counted = {line.split('"')[1]: int(line.split()[-1]) for line in lines}
        return {outcome: count for outcome, count in counted.items() if count}

    def metric(self, name: str) -> int:
        (value,) = (
            line.split()[1] for line in self.host.metrics().splitlines() if line.startswith(f"{name} ")
        )
        return int(value)


@pytest.fixture
def router(request: pytest.FixtureRequest) -> Iterator[Router]:
    made = Router(request.param)
    yield made
    assert {} == made.host.failures()
    made.host.close()


def given_options(**options: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("router", [options], indirect=True)


def another(rank: Rank) -> Rank:
    return next(each for each in (A, B, C) if each != rank)


# -- what is chosen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"mode": "off"}, {"mode": False}])
def test_it_is_off_unless_asked_for_and_then_no_choice_asks_a_plugin(options: dict[str, Any]) -> None:
    host = Router(options).host

    assert host.selection_hooks() is None
    assert "" == host.metrics()


@given_options(mode="hard")
def test_hard_a_session_stays_where_its_first_request_went_also_where_another_would_be_cheaper(
    router: Router,
) -> None:
    first = router.ask()
    router.setting.holds(another(first), sliding=range(8), whole=range(8))

    assert [first] * 5 == [router.ask() for _ in range(5)]
    assert {"new": 1, "kept": 5} == router.outcomes()


@given_options(mode="hard")
def test_requests_without_a_session_go_where_they_are_cheapest(router: Router) -> None:
    first = router.ask()
    other = another(first)
    router.setting.holds(other, sliding=range(8), whole=range(8))

    assert [other, other] == [router.ask(None), router.setting.decide().rank]
    assert {"new": 1} == router.outcomes()


@given_options(mode="soft", credit_blocks=5)
@pytest.mark.parametrize(("blocks", "moves"), [(4, False), (6, True)])
def test_soft_a_session_moves_for_more_blocks_than_its_credit(
    router: Router, blocks: int, moves: bool
) -> None:
    first = router.ask()
    other = another(first)
    router.setting.holds(other, sliding=range(blocks), whole=range(blocks))

    assert (other if moves else first) == router.ask()
    # It is bound to where it went: the blocks go, the session stays.
    for block in range(blocks):
        router.setting.index.apply(other, Removed(1, (HASHES[block],)))
    assert (other if moves else first) == router.ask()
    assert {"new": 1, **({"moved": 1, "kept": 1} if moves else {"kept": 2})} == router.outcomes()


@pytest.mark.parametrize("router", [{"mode": "hard"}, {"mode": "soft"}], indirect=True)
def test_a_session_whose_worker_is_gone_or_avoided_is_bound_to_another(router: Router) -> None:
    first = router.ask()
    reachable = {rank.worker_id for rank in (A, B)} - {first.worker_id}
    second = router.ask(reachable=reachable)
    third = router.ask(avoided={second.worker_id: 1.0})

    assert first.worker_id != second.worker_id != third.worker_id
    assert third == router.ask()
    assert {"new": 1, "lost": 2, "kept": 1} == router.outcomes()


@given_options(mode="hard", max_requests=2)
def test_a_session_leaves_a_rank_with_too_many_requests_for_one_with_fewer_and_else_stays(
    router: Router,
) -> None:
    first = router.ask(done=False)
    assert first == router.ask(done=False)
    second = router.ask(done=False)
    assert second != first
    assert second == router.ask(done=False)
    third = router.ask(done=False)
    assert third not in (first, second)
    assert [third] * 3 == [router.ask(done=False) for _ in range(3)], "all are full: it stays"
    assert {"new": 1, "kept": 5, "moved": 2} == router.outcomes()


@given_options(mode="hard")
def test_a_pin_of_the_client_counts_more_and_binds(router: Router) -> None:
    first = router.ask()
    other = A if first != A else B
    assert other == router.ask(routing={"backend_instance_id": other.worker_id, "dp_rank": other.dp_rank})
    assert other == router.ask()


@given_options(mode="hard")
def test_what_another_plugin_chooses_counts_more(router: Router) -> None:
    first = router.ask()
    other = another(first)

    class Zealous:  # by its name it would be asked behind "affinity"
        from vswa_plugin.hookspecs import hookimpl

        @hookimpl
        def vswa_select_worker(self) -> Rank:
            return other

    router.host.register(Zealous(), "zealous")

    assert other == router.ask()


@given_options(mode="hard", metadata="user")
def test_the_session_may_be_named_by_metadata_of_the_client(router: Router) -> None:
    first = router.ask(None, metadata={"user": "u"})
    router.setting.holds(another(first), sliding=range(8), whole=range(8))

    assert first == router.ask("other", metadata={"user": "u"})
    assert another(first) == router.ask("s", metadata={})
    assert {"new": 1, "kept": 1} == router.outcomes()


@given_options(mode="hard")
def test_prefill_and_decode_have_a_rank_each(router: Router) -> None:
    pool = router.setting.pool
    pool.phase = "prefill"
    first = router.ask()
    pool.phase = "decode"
    router.setting.pool.book.add(99, first, [1, 2, 3], 48, 0)  # dearer for the other phase
    second = router.ask()
    pool.book.free(99)

    assert first != second
    assert second == router.ask()
    pool.phase = "prefill"
    assert first == router.ask()
    assert 2 == router.metric("vswa_affinity_sessions")


@given_options(mode="hard")
def test_a_session_id_that_is_no_text_is_refused(router: Router) -> None:
    with pytest.raises(InvalidRequest, match=r"agent_context\.session_id: expected a string, got int"):
        router.ask(7)


@given_options(mode="hard", ttl_s=60, max_sessions=2)
def test_sessions_end_when_they_are_unused_or_too_many(router: Router) -> None:
    first = router.ask("a")
    router.setting.holds(another(first), sliding=range(8), whole=range(8))
    router.clock.now = 59.0
    assert first == router.ask("a"), "each use begins the time anew"
    router.clock.now = 118.0
    assert first == router.ask("a")
    router.clock.now = 178.0
    assert 0 == router.metric("vswa_affinity_sessions")
    assert another(first) == router.ask("a")
    router.ask("b")
    router.ask("a")
    router.ask("c")

    assert 2 == router.metric("vswa_affinity_sessions")
    assert 1 == router.metric("vswa_affinity_evicted_total")
    assert {"new": 4, "kept": 3} == router.outcomes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sticky"}, "mode"),
        ({"ttl_s": 0}, "ttl_s"),
        ({"max_sessions": 0}, "max_sessions"),
        ({"max_requests": 0}, "max_requests"),
        ({"credit_blocks": -1}, "credit_blocks"),
        ({"metadata": 1}, "metadata"),
        ({"credit": 1}, "did you mean"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Router(options)


# -- memory ------------------------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.integers(0, 7), st.sampled_from((0.0, 1.0, 4.0, 11.0)), st.booleans()))


@given(steps=STEPS, most=st.integers(1, 5))
@examples(200)
def test_sessions_keep_the_last_used_ones_that_are_not_too_old_and_no_others(
    steps: list[tuple[int, float, bool]], most: int
) -> None:
    clock = Clock()
    sessions = Sessions(10.0, most, clock)
    naive: list[tuple[int, Rank, float]] = []  # least recently used first
    for number, (name, pause, binds) in enumerate(steps):
        clock.now += pause
        naive = [each for each in naive if clock.now - each[2] < 10.0]
        if binds:
            naive = [each for each in naive if each[0] != name]
            naive = [*naive, (name, Rank(number), clock.now)][-most:]
            sessions.bind(("m", "agg", str(name)), Rank(number))
        kept = {each[0]: each[1] for each in naive}

        assert kept.get(name) == sessions.rank_of(("m", "agg", str(name)))
        assert len(kept) == len(sessions)
    every = {name: sessions.rank_of(("m", "agg", str(name))) for name in range(8)}
    assert {each[0]: each[1] for each in naive} == {n: rank for n, rank in every.items() if rank is not None}


def test_what_is_kept_of_a_session_does_not_grow_with_its_id() -> None:
    sessions = Sessions(10.0, 100, Clock())
    for number in range(1_000):
        sessions.bind(("m", "agg", "x" * 100_000 + str(number)), A)

    assert 100 == len(sessions)
    assert 900 == sessions.evicted
    assert all(len(name) == 16 for name in sessions._bound)


def test_sessions_of_other_models_and_phases_are_others() -> None:
    sessions = Sessions(10.0, 100, Clock())
    sessions.bind(("m", "agg", "s"), A)

    assert [A, None, None] == [
        sessions.rank_of(each) for each in (("m", "agg", "s"), ("n", "agg", "s"), ("m", "decode", "s"))
    ]


CANDIDATES = st.lists(
    st.tuples(st.integers(0, 5), st.floats(0, 9), st.integers(0, 4)),
    min_size=1,
    unique_by=lambda each: each[0],
)


@given(
    rows=CANDIDATES,
    bound=st.none() | st.integers(0, 5),
    hard=st.booleans(),
    most=st.none() | st.integers(1, 4),
    seed=st.integers(0, 9),
)
@examples(300)
def test_a_session_stays_or_takes_a_cheapest_rank_that_is_not_full(
    rows: list[tuple[int, float, int]], bound: int | None, hard: bool, most: int | None, seed: int
) -> None:
    candidates = [
        Scored(Candidate(Rank(worker), load=Load(0, 0, requests)), cost) for worker, cost, requests in rows
    ]
    rank = None if bound is None else Rank(bound)
    chosen = stays_or_moves(rank, candidates, hard, most, random.Random(seed))
    limit = float("inf") if most is None else most
    allowed = [row for row in rows if row[2] < limit] or rows
    (taken,) = (row for row in allowed if Rank(row[0]) == chosen)

    if hard and bound in {row[0] for row in allowed}:
        assert bound == taken[0]
    else:
        assert min(row[1] for row in allowed) == taken[1]
    expected = "new" if bound is None else "kept" if taken[0] == bound else "moved"
    if expected == "moved" and bound not in {row[0] for row in rows}:
        expected = "lost"
    assert expected == outcome_of(rank, chosen, candidates)
