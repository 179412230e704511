"""``python -m tests.sim``: run schedules by their seeds, one after another, and say what they came to."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.schedule import generate, shrink
from tests.sim.world import run_schedule


def main() -> int:
    reader = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    reader.add_argument("--schedules", type=int, default=3_000, help="how many (3000)")
    reader.add_argument(
        "--seed", type=int, default=0, help="of the first one; each next one is one higher (0)"
    )
    reader.add_argument("--seconds", type=float, help="end after so many seconds of wall clock")
    given = reader.parse_args()
    began, checks, slowest, run = time.monotonic(), 0, 0.0, 0
    for seed in range(given.seed, given.seed + given.schedules):
        if given.seconds is not None and time.monotonic() - began > given.seconds:
            break
        outcome = run_schedule(generate(seed))
        run, checks, slowest = run + 1, checks + outcome.checks, max(slowest, outcome.converged_s)
        if outcome.wrong:
            return _report(seed, outcome.wrong)
    seconds = time.monotonic() - began
    print(f"{run} schedules, seeds {given.seed} to {given.seed + run - 1}, {checks} looks at everything:")
    print(f"nothing wrong; every view right at most {slowest:.1f} s after the faults")
    print(f"{run / seconds * 60:.0f} schedules a minute")
    return 0


def _report(seed: int, wrong: tuple[str, ...]) -> int:
    print(f"seed {seed}: {wrong[0]}", file=sys.stderr)
    smallest = shrink(generate(seed), lambda schedule: bool(run_schedule(schedule).wrong))
    print(f"shrunk to {len(smallest.actions)} actions:", file=sys.stderr)
    for action in smallest.actions:
        print(f"  {action}", file=sys.stderr)
    print(f"which ends with: {run_schedule(smallest).wrong[0]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
