"""``python -m tests.fuzz``: many spoilt messages for each decoder; what fails is kept in the corpus."""

from __future__ import annotations

import argparse
import resource
import sys
import time

from tests.fuzz.targets import CORPUS, TARGETS
from tests.fuzz.trying import run_cases

#: Memory of the whole process: a message of some bytes that takes more is a fault.
MEMORY_BYTES = 2 << 30


def main() -> int:
    names = [target.name for target in TARGETS]
    reader = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    reader.add_argument("--cases", type=int, default=20_000, help="of each target (20000)")
    reader.add_argument("--seed", type=int, default=0, help="of the first case (0)")
    reader.add_argument(
        "--target", choices=names, action="append", help="this one only; may be repeated (all)"
    )
    given = reader.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    failed = 0
    for target in TARGETS:
        if given.target and target.name not in given.target:
            continue
        began = time.monotonic()
        tried = run_cases(target, given.cases, given.seed)
        seconds = time.monotonic() - began
        print(f"{target.name:<18} {tried.cases:>8} cases, {tried.refused:>8} refused, {seconds:6.1f} s")
        if tried.failure is not None:
            failed += 1
            path = CORPUS / target.name / f"seed-{tried.seed}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tried.payload)
            print(f"  seed {tried.seed}: {tried.failure}; kept as {path}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
