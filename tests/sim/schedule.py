"""What happens when: made from a seed, and made smaller where it fails."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

#: Things that happen, with their weights; ``step`` is what an engine does, everything else is a fault.
KINDS = {
    "step": 60,
    "weather": 8,
    "cut": 4,
    "broker away": 1,
    "registry away": 2,
    "crash": 2,
    "start": 4,
    "twin": 1,
    "lose events": 3,
    "spoil an event": 1,
    "burst": 1,
    "clock": 2,
    "forge": 6,
    "suspend": 1,
    "restart a router": 1,
}
FORGERIES = (
    "garbage",
    "past epoch",
    "far epoch",
    "high id",
    "alias",
    "stranger",
    "odd subject",
    "later version",
)


class Action(NamedTuple):
    """:ivar at: seconds after the start.
    :ivar who: a number from which a worker or a link is chosen.
    :ivar seed: of what the action itself draws.
    """

    at: float
    kind: str
    who: int
    seed: int


class Schedule(NamedTuple):
    """:ivar seed: of the network too, which is the same for equal messages in equal order.
    :ivar lasts: seconds, after which the faults end.
    """

    seed: int
    workers: int
    routers: int
    lasts: float
    actions: tuple[Action, ...]


def generate(seed: int) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(seed)
    lasts = rng.uniform(3.0, 15.0)
    kinds, weights = list(KINDS), [weight * rng.choice([0, 1, 1, 2]) for weight in KINDS.values()]
    weights[0] = KINDS["step"]
    count = rng.randint(10, 70)
    actions = (
        Action(round(rng.uniform(0.0, lasts), 3), kind, rng.randrange(12), rng.getrandbits(32))
        for kind in rng.choices(kinds, weights, k=count)
    )
    return Schedule(seed, rng.choice([1, 1, 2]), rng.choice([1, 1, 1, 2]), lasts, tuple(sorted(actions)))


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """A schedule with as few actions as fail still, found by leaving out ever smaller runs of them."""
    size = max(1, len(schedule.actions) // 2)
    while True:
        at = 0
        smaller = False
        while at < len(schedule.actions):
            without = schedule.actions[:at] + schedule.actions[at + size :]
            if fails(tried := schedule._replace(actions=without)):
                schedule, smaller = tried, True
            else:
                at += size
        if size == 1 and not smaller:
            return schedule
        size = max(1, size // 2)
