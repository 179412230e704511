"""Random schedules of an engine whose events are lost: the view never claims too much, and comes back."""

from __future__ import annotations

import os

import pytest

from tests.properties import examples
from tests.publishing.healing_schedules import BLOCK, GLOBAL, RULES, SLIDING, Schedule

STEPS = 200
#: Seeds that lied: by claims from before the loss, by removals that were not looked at and, under the rules
#: of V1, by names that a sliding window holds otherwise and by blocks that hung on what was stored before.
LIED = {
    "trtllm_v2": [34, 87, 150, 393, 5, 41, 63],
    "trtllm_v1": [56, 158, 160, 213, 5, 12, 16],
    "trtllm_v1_contiguous": [1, 9, 11, 12, 35, 46, 61, 153],
}
#: More schedules, for hours or minutes: VSWA_HEALING_SEEDS=5000 and `-k never`.
SEEDS = int(os.environ.get("VSWA_HEALING_SEEDS", examples(60).max_examples))


def lies(rule: str, seed: int) -> list[str]:
    schedule = Schedule(seed, rule)
    schedule.run(STEPS)
    schedule.finish()
    for prompt in schedule.prompts:
        schedule.ask(prompt)
        schedule.settle()
    schedule.run(STEPS // 2)
    return [f"{rule}, seed {seed}, step {lie.step}: {sorted(lie.blocks)}" for lie in schedule.lies]


@pytest.mark.parametrize("rule", RULES)
def test_a_view_never_claims_what_the_engine_does_not_hold(rule: str) -> None:
    told = [lie for seed in {*LIED[rule], *range(SEEDS)} for lie in lies(rule, seed)]

    assert [] == told


@pytest.mark.parametrize("rule", ["trtllm_v2", "trtllm_v1"])
def test_claims_bring_blocks_back_in_the_schedules(rule: str) -> None:
    """Or the test above would hold of a worker that claims nothing."""
    schedules = [Schedule(seed, rule) for seed in range(20)]
    for schedule in schedules:
        schedule.run(STEPS)

    assert all(schedule.losses for schedule in schedules)
    assert 10 < sum(schedule.healed for schedule in schedules)


def test_a_prompt_that_comes_again_after_a_loss_is_promised_what_it_reuses() -> None:
    """Of manager V2: what was too low at first is right once the prompt has been served.

    A block whose own announcement was lost has no name, and is promised again when it is stored again.
    """
    promised = []
    for seed in range(12):
        schedule = Schedule(seed, "trtllm_v2")
        schedule.run(STEPS)
        schedule.finish()
        schedule.lose_in_the_worker()
        schedule.settle()
        for prompt in filter(schedule.is_named, schedule.prompts):
            for _ in range(2):
                schedule.ask(prompt)
                schedule.settle()
            promised.append((schedule.promised(prompt), schedule.ask(prompt)))
            schedule.settle()

    assert {(3 * BLOCK, 3 * BLOCK)} == set(promised)
    assert 10 < len(promised)


@pytest.mark.parametrize(
    ("rule", "groups"),
    [("trtllm_v2", {SLIDING, GLOBAL}), ("trtllm_v1", {GLOBAL}), ("trtllm_v1_contiguous", set())],
)
def test_a_request_proves_the_groups_whose_names_are_certain(rule: str, groups: set[int]) -> None:
    schedule = Schedule(0, rule)
    (prompt, *_) = schedule.prompts
    schedule.ask(prompt)
    schedule.settle()
    schedule.lose_in_the_worker()
    schedule.settle()
    schedule.ask(prompt)
    schedule.settle()

    counts = schedule.publisher.ledger.residency.counts()
    assert groups == {group for group, count in counts.items() if count}
