"""What is exactness worth? Simulated ranks behind routers that differ in what they believe is cached.

    python benchmarks/bench_route.py [--seeds N] --json benchmarks/results/route.json --page docs/accuracy.md
    python benchmarks/bench_route.py --from benchmarks/results/route.json --page docs/accuracy.md

`vswa accuracy route` over 36 cells: 4 workloads, 3 models, 3 sizes of memory; 10 seeds each, which take
about 40 minutes on two cores. `--page` rewrites the table between the two marks of a Markdown page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from vswa_plugin.simulation.report import Comparison

FULL = (
    *("forks", "documents", "chat", "agents", "--model", "gemma-3-1b,gemma-3-27b,gpt-oss"),
    *("--blocks", "1024,2048,4096", "--requests", "500"),
)
SHORT = (
    *("forks", "documents", "--model", "gemma-3-1b", "--blocks", "2048", "--requests", "150"),
    *("--policies", "global only,exact", "--seeds", "2"),
)
BEGIN, END = "<!-- written by benchmarks/bench_route.py -->", "<!-- until here -->"
POLICIES = ("random", "global only", "boundary projection", "exact", "oracle")
PROMISING = POLICIES[1:4]


def measure(options: Sequence[str]) -> dict[str, Any]:
    command = ["accuracy", "route", *options, "--json"]
    done = subprocess.run([sys.executable, "-m", "vswa_plugin", *command], check=True, stdout=subprocess.PIPE)
    return {
        "date": date.today().isoformat(),
        "command": "vswa " + " ".join(f"'{word}'" if " " in word else word for word in command),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("vswa-plugin", "ai-dynamo-runtime")},
        },
        **json.loads(done.stdout),
    }


def encoded(result: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """A line for each row."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda found: " ".join(found.group().split()), text) + "\n"


# -- the page ----------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """In percent: promises that were true, computed tokens, and exact against global only."""
    rows = ["| | blocks |" + "".join(f" true: {name} |" for name in PROMISING)]
    rows[0] += "".join(f" computed: {name} |" for name in POLICIES) + " tokens | TTFT p90 | |"
    rows.append("|---" * (5 + len(PROMISING) + len(POLICIES)) + "|")
    rows += [row for report in result["reports"] for row in _rows(report)]
    return "\n".join([_conditions(result), "", *rows, "", _counts(result)])


def _conditions(result: Mapping[str, Any]) -> str:
    plan = result["reports"][0]["plan"]
    cost, seeds = plan["cost"], len(result["reports"][0]["seeds"])
    costs = (
        f"{1e3 * cost['fixed_s']:g} ms a prompt, {1e6 * cost['per_token_s']:g} us a token, "
        f"{1e9 * cost['per_pair_s']:g} ns a pair, {1e3 * cost['per_output_token_s']:g} ms an output token"
    )
    return (
        f"{plan['ranks']} ranks, {plan['requests']} requests, mean of {seeds} seeds; memory per rank "
        f"as blocks of {plan['block_size'] or 32} tokens; {costs} ({result['date']})."
    )


def _rows(report: Mapping[str, Any]) -> Iterator[str]:
    workload = Path(report["plan"]["workload"]).name
    rows = {(row["preset"], row["blocks"], row["policy"]): row for row in report["rows"]}
    for each in _comparisons(report):
        cell = {name: rows.get((each.preset, each.blocks, name)) for name in POLICIES}
        true = [_percent(cell[name], "true_promises") for name in PROMISING]
        computed = [_percent(cell[name], "computed") for name in POLICIES]
        changes = [f"{100 * fmean(values):+.1f}" for values in (each.computed, each.ttft_p90)]
        cells = [f"{workload}, {each.preset}", f"{each.blocks:,}", *true, *computed, *changes, _found(each)]
        yield "| " + " | ".join(cells) + " |"


def _comparisons(report: Mapping[str, Any]) -> list[Comparison]:
    return [msgspec.convert(each, Comparison) for each in report["exact_against_global_only"]]


def _percent(row: Mapping[str, Any] | None, name: str) -> str:
    return "-" if row is None or row[name] is None else f"{100 * row[name]:.1f}"


def _found(each: Comparison) -> str:
    return "**better**" if each.helps else "**worse**" if each.hurts else "even" if each.even else "chance"


def _counts(result: Mapping[str, Any]) -> str:
    found = [_found(each) for report in result["reports"] for each in _comparisons(report)]
    counts = {name: found.count(name) for name in ("**better**", "even", "chance", "**worse**")}
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"Of {len(found)} cells: {told}."


def rewrite(page: Path, text: str, begins: str = BEGIN, ends: str = END) -> None:
    """Put ``text`` between the marks of ``page``."""
    before, begin, rest = page.read_text("utf-8").partition(begins)
    _, end, after = rest.partition(ends)
    if not (begin and end):
        raise SystemExit(f"{page}: expected the marks {begins} and {ends}")
    page.write_text(f"{before}{begins}\n{text}\n{ends}{after}", "utf-8")


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--short", action="store_true", help="2 cells, 150 requests, 2 seeds")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="of the 36 cells, each (10)")
    parser.add_argument("--from", dest="made", metavar="FILE", help="measure nothing, take this result")
    parser.add_argument("--json", metavar="FILE", help="write the result; - for standard output")
    parser.add_argument("--page", metavar="FILE", help="put the table into this page")
    args = parser.parse_args()
    result = json.loads(Path(args.made).read_text("utf-8")) if args.made else None
    result = result or measure(SHORT if args.short else (*FULL, "--seeds", str(args.seeds)))
    if args.json == "-":
        print(encoded(result), end="")
    elif args.json:
        Path(args.json).write_text(encoded(result), "utf-8")
    if args.page:
        rewrite(Path(args.page), table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
