"""``python -m tests.endurance``: many ranks and events for long; memory must stay flat, and lag small."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

from tests.endurance.measuring import soak

#: A batch is applied within that; memory grows by no more than that share after the caches are full.
LAG_P99_MS, GROWTH = 250.0, 0.05


def faults_of(figures: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    memory, descriptors = figures["memory_mib"], figures["descriptors"]
    checks = {
        f"lag p99 {figures['lag_ms']['p99']} ms": figures["lag_ms"]["p99"] <= LAG_P99_MS,
        f"memory {memory[0]} MiB, then {memory[1]}": memory[1] <= memory[0] * (1 + GROWTH),
        f"descriptors {descriptors[0]}, then {descriptors[1]}": descriptors[1] <= descriptors[0],
        f"{figures['stale']} times a view was not live": figures["stale"] == 0,
        f"{figures['wrong']} views are wrong in the end": figures["wrong"] == 0,
    }
    return [what for what, holds in checks.items() if not holds]


def main() -> int:
    reader = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__)
    reader.add_argument("--ranks", type=int, default=200, help="publishers (200)")
    reader.add_argument("--events", type=float, default=20_000, help="of all of them, a second (20000)")
    reader.add_argument("--queries", type=float, default=200, help="scores of 256 blocks, a second (200)")
    reader.add_argument("--seconds", type=float, default=600, help="how long (600)")
    reader.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    given = reader.parse_args()
    figures = asyncio.run(soak(given.ranks, given.events, given.queries, given.seconds)).figures()
    about = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": [round(load, 1) for load in os.getloadavg()],
    }
    wrong = faults_of(figures)
    shown = json.dumps({**about, **figures, "not_held": wrong}, indent=1)
    print(shown)
    if given.json is not None:
        given.json.write_text(f"{shown}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
