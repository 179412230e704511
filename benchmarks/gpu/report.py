"""Tables in Markdown of what run.py measured.

python benchmarks/gpu/report.py RESULTS.json [RESULTS.json ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "exact": "exact (our router)",
    "placement": "exact with placement",
    "forecast": "exact, promises by forecast",
    "dynamo": "Dynamo's router",
    "round_robin": "round robin",
    "on": "events on",
    "off": "events off",
    "alone": "one worker for both phases",
}
Run = Mapping[str, Any]
Column = tuple[str, Callable[[Run], float | None], str]


def _ttft(mark: str) -> Callable[[Run], float | None]:
    return lambda run: run["ttft_ms"].get(mark)


COLUMNS: Sequence[Column] = (
    ("requests", lambda run: run["requests"], "{:.0f}"),
    ("errors", lambda run: run["errors"], "{:.0f}"),
    ("promises kept", lambda run: _percent(run["promises"].get("exact_share")), "{:.1f} %"),
    ("cached", lambda run: 100 * run["cached_tokens"] / (run["prompt_tokens"] or 1), "{:.1f} %"),
    ("prompt tokens computed", lambda run: run["computed_prompt_tokens"], "{:,.0f}"),
    ("of these, a second", lambda run: run["computed_prompt_tokens_per_s"], "{:,.0f}"),
    ("TTFT p50, ms", _ttft("p50"), "{:,.0f}"),
    ("p90", _ttft("p90"), "{:,.0f}"),
    ("p99", _ttft("p99"), "{:,.0f}"),
    ("seconds", lambda run: run["seconds"], "{:.1f}"),
    ("requests/s", lambda run: run["requests_per_s"], "{:.1f}"),
)
EVENTS: Sequence[Column] = (
    *(
        column
        for column in COLUMNS
        if column[0] in ("requests", "errors", "TTFT p50, ms", "p99", "requests/s")
    ),
    ("output tokens/s", lambda run: run["output_tokens_per_s"], "{:,.0f}"),
    ("KV events", lambda run: run["engines"].get("kv_events", 0), "{:,.0f}"),
)


#: Of prefill and decode apart: what the decode workers fetched.
MOVED: Sequence[Column] = (
    ("prompts moved", lambda run: run["engines"].get("transfers"), "{:,.0f}"),
    ("MB moved", lambda run: _mega(run["engines"].get("transfer_bytes")), "{:,.1f}"),
    ("failures", lambda run: run["engines"].get("transfer_failures"), "{:.0f}"),
)


def policy_table(runs: Sequence[Run], more: Sequence[Column] = ()) -> list[str]:
    """A table for each workload; of several runs the mean, in brackets the lowest and the highest."""
    made, columns = [], (*COLUMNS, *more)
    for workload in _unique(run["workload"] for run in runs):
        made += [f"\n**{workload}**\n", *_head("policy", columns)]
        of_workload = [run for run in runs if run["workload"] == workload]
        for front, events in _unique((run["front"], run.get("dynamo_events", "")) for run in of_workload):
            same = [r for r in of_workload if (r["front"], r.get("dynamo_events", "")) == (front, events)]
            name = NAMES.get(front, front) + (
                f", sent {events} blocks" if front == "dynamo" and events else ""
            )
            made.append(_line(name + _cut(same), same, columns))
    return made


def event_table(runs: Sequence[Run]) -> list[str]:
    made = []
    for workload in _unique(run["workload"] for run in runs):
        made += [f"\n**{workload}**, runs in turn\n", *_head("", EVENTS)]
        sides = {}
        for kind in ("on", "off"):
            same = [run for run in runs if run["workload"] == workload and run["front"] == kind]
            if same:
                sides[kind] = {run["repeat"]: run["seconds"] for run in same if not run["cut"]}
                made.append(_line(NAMES[kind] + _cut(same), same, EVENTS))
        pairs = sorted(set(sides.get("on", ())) & set(sides.get("off", ())))
        if pairs:
            ratios = [sides["on"][each] / sides["off"][each] for each in pairs]
            listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            median = statistics.median(ratios)
            made.append(f"\nTime with events on / off, pair by pair: {listed}; median {median:.3f}.")
    return made


def report(results: Sequence[Mapping[str, Any]]) -> str:
    first = results[0]
    lines = [f"{first['gpu'] or 'no GPU'}; {first['machine']}; {first['date']}; " + ", ".join(
        f"{name} {version}" for name, version in first["versions"].items()
    )]  # fmt: skip
    runs = [run for each in results for run in each["runs"]]
    lines += policy_table([run for run in runs if run["step"] == "policies"])
    lines += policy_table([run for run in runs if run["step"] == "disaggregated"], MOVED)
    lines += event_table([run for run in runs if run["step"] == "events"])
    for each in results:
        for step, what in each["steps"].items():
            lines += [f"\n{step}: {how} ({why})" for how, why in what.items()]
    return "\n".join(lines) + "\n"


def _head(first: str, columns: Sequence[Column]) -> list[str]:
    return [
        f"| {first} | " + " | ".join(name for name, _, _ in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]


def _line(name: str, runs: Sequence[Run], columns: Sequence[Column]) -> str:
    cells = []
    for _, value, form in columns:
        values = [each for run in runs if (each := value(run)) is not None]
        if not values:
            cells.append("-")
            continue
        cell = form.format(statistics.mean(values))
        low, high = form.format(min(values)), form.format(max(values))
        cells.append(cell if low == high else f"{cell} ({low} to {high})")
    return f"| {name} | " + " | ".join(cells) + " |"


def _cut(runs: Sequence[Run]) -> str:
    cut = sum(run["cut"] for run in runs)
    return f", {cut} of {len(runs)} runs cut at their limit" if cut else ""


def _mega(amount: int | None) -> float | None:
    return None if amount is None else amount / 1e6


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    given = parser.parse_args()
    print(report([json.loads(path.read_text()) for path in given.results]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
