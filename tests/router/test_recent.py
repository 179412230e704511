"""The last choices: what became of each promise, and the reason in a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.router.test_decide import PROMPT, A, B, C, Setting
from vswa_plugin.router.promises import Promises
from vswa_plugin.router.recent import KEPT, Choice, RecentChoices, reason_of
from vswa_plugin.selection import Candidate, Load, LoadBook, Scored


def choice(*costs: tuple[int, float], chosen: int = 0, by_plugin: bool = False, key: Any = 1) -> Choice:
    """Of ranks A, B and C with (cached tokens, cost)."""
    scored = [
        Scored(Candidate(rank, cached), cost) for rank, (cached, cost) in zip((A, B, C), costs, strict=False)
    ]
    return Choice(0.0, key, "r", "m", "agg", 130, 16, scored[chosen], scored, by_plugin, LoadBook(16))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (choice((0, 8.0)), "It is the only rank that may serve this request now."),
        (
            choice((96, 4.0), (32, 6.5)),
            "It reuses 64 tokens more than any other rank, and is 2.5 blocks cheaper",
        ),
        (
            choice((32, 4.0), (32, 6.0)),
            "Others reuse as much, but it has less to do: it is 2.0 blocks cheaper",
        ),
        (
            choice((0, 4.0), (96, 6.0)),
            "Rank 2/0 would reuse 96 tokens more, but has more to do: this one is 2.0",
        ),
        (choice((0, 4.0), (0, 4.0)), "Several ranks are equal"),
        (choice((0, 4.0), (0, 3.0)), "It was drawn by chance, at 1.0 blocks more than the cheapest"),
        (choice((0, 4.0), (96, 1.0), by_plugin=True), "A plugin chose it."),
        (choice((96, 4.0), (32, 4.0)), "It reuses 64 tokens more than any other rank, and is as cheap"),
    ],
)
def test_the_reason_of_a_choice_says_what_decided(made: Choice, reason: str) -> None:
    assert reason_of(made).startswith(reason)


def test_a_choice_is_under_way_until_its_request_ends_and_then_says_how_its_promise_was_kept() -> None:
    setting = Setting()
    setting.holds(A, sliding=[3, 4], whole=range(5))
    promises = Promises(setting.decider.recent.reported)
    outcomes = []
    for reused in (80, 95, 64, 112, None):
        decision = setting.decide()
        (made, *_) = setting.decider.recent
        assert (made.key, made.outcome, made.promised) == (decision.key, "under way", 80)
        setting.pool.book.free(decision.key)
        promises.compare(decision, 16, True, reused)
        outcomes.append((made.outcome, made.error_blocks))

    assert [("kept", 0), ("kept", 0), ("over", 1), ("under", -2), ("unreported", 0)] == outcomes


def test_only_the_last_ones_are_kept_and_a_late_report_of_a_forgotten_one_changes_nothing() -> None:
    recent = RecentChoices()
    for key in range(KEPT + 1):
        recent.add(choice((0, 1.0), key=key))

    recent.reported(choice((0, 1.0), key=0), 16)
    recent.reported(choice((0, 1.0), key=1), 16)

    assert [each.key for each in recent] == list(range(KEPT, 0, -1))
    assert [each.reused for each in recent] == [None] * (KEPT - 1) + [16]


def test_a_plugin_that_chooses_and_one_that_adds_to_costs_are_seen_in_the_choice() -> None:
    class Hooks:
        def score(self, *_: Any) -> dict[Any, float]:
            return {A: 100.0, B: 1.0}

        def select_worker(self, *_: Any) -> Any:
            return B

    setting = Setting(Hooks())
    plain, hooked = Setting(), setting

    plain.decide(PROMPT)
    hooked.decide(PROMPT)
    (before,), (after,) = plain.decider.recent, hooked.decider.recent

    assert not before.by_plugin and after.by_plugin
    costs = {each.rank: each.cost for each in before.candidates}
    assert {each.rank: each.cost - costs[each.rank] for each in after.candidates} == {A: 100, B: 1, C: 0}
    assert after.chosen.candidate.load == Load()
