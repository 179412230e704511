"""What is placement worth? Simulated ranks behind routers that choose in different ways.

    python benchmarks/bench_placement.py --json benchmarks/results/placement.json --page docs/placement.md
    python benchmarks/bench_placement.py --from benchmarks/results/placement.json --page docs/placement.md
    python benchmarks/bench_placement.py ... --workload trace.jsonl   a file in Mooncake's format

Each cell is one run of `vswa accuracy route`: a workload, a size of memory, 10 seeds. All policies get
the same requests at the same times. Cells that the result file has already are not run again.
All differences are seed by seed, against the greedy oracle: the router's cost over what caches really hold.
`--page` rewrites the table between the two marks of a Markdown page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench_route import encoded, measure, rewrite

from vswa_plugin.simulation.report import interval

BEGIN, END = "<!-- written by benchmarks/bench_placement.py -->", "<!-- until here -->"
OURS, OTHERS = ("oracle", "one cache", "placement"), ("sglang", "preble", "lbgr")
SIZES = (1024, 2048, 4096)
WORKLOADS = ("documents", "agents", "forks", "chat")
#: Name -> workload, blocks, further options of `vswa accuracy route`.
SCENARIOS: Mapping[str, tuple[str, int, tuple[str, ...]]] = {
    "one rank is three times as slow": ("documents", 2048, ("--slow-rank", "3")),
    "one rank has half of the blocks": ("documents", 2048, ("--small-rank", "0.5")),
    "one rank restarts empty": ("documents", 2048, ("--restart-after", "250")),
    "bursts of one document": ("burst", 2048, ()),
    "two tenants": ("tenants", 2048, ()),
}


def measured(
    name: str, workload: str, blocks: int, seeds: int, requests: int, *more: str, others: bool = True
) -> dict[str, Any]:
    """One cell."""
    options = [workload, "--model", "gemma-3-1b", "--blocks", str(blocks), "--requests", str(requests)]
    options += ["--seeds", str(seeds), "--jobs", "1", *more]
    options += ["--policies", ",".join((*OURS, *(OTHERS if others else ())))]
    result = measure(options)
    (report,) = result.pop("reports")
    result["command"] = result["command"].replace(workload, Path(workload).name)
    report["plan"]["workload"] = Path(workload).name
    return {
        "cell": name,
        **result,
        "plan": report["plan"],
        "refused": report["refused"],
        "runs": report["runs"],
    }


def cells(workloads: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, str, int, tuple[str, ...]]]:
    """Name, workload, blocks and further options of all cells."""
    found = [(f"{Path(each).name} {size}", each, size, ()) for size in sizes for each in workloads]
    return [*found, *((name, *scenario) for name, scenario in SCENARIOS.items())]


# -- the page ----------------------------------------------------------------------------------------

_Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def of_policies(cell: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Policy -> its runs, by seed."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for run in sorted(cell["runs"], key=lambda run: run["seed"]):
        runs.setdefault(run["policy"], []).append(run)
    return runs


def ratios(runs: _Runs, policy: str, name: str) -> list[float]:
    """Of a measure, seed by seed, the policy's over the greedy oracle's; without seeds in which that is 0."""
    pairs = zip(runs[policy], runs["oracle"], strict=True)
    return [ours[name] / theirs[name] for ours, theirs in pairs if theirs[name]]


def closed(runs: _Runs, policy: str) -> float | None:
    """The share of what one cache would save that the policy saves; None: it would save next to nothing."""
    means = {each: fmean(run["recomputed"] for run in runs[each]) for each in (policy, "oracle", "one cache")}
    gap = means["oracle"] - means["one cache"]
    return (means["oracle"] - means[policy]) / gap if gap > 0.005 else None


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each cell: what is computed again, how much of the gap is closed, and ratios."""
    others = [each for each in OTHERS if any(each in of_policies(result) for result in results)]
    heads = ["cell", *(f"recomputed: {each}" for each in OURS), "gap closed", "computed tokens"]
    heads += ["TTFT p50", "TTFT p90", *(f"gap closed: {each}" for each in others)]
    lines = [_conditions(results[0]), "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(_row(each, others) for each in results)])


def _row(cell: Mapping[str, Any], others: Sequence[str]) -> str:
    runs = of_policies(cell)
    shares = [f"{100 * fmean(run['recomputed'] for run in runs[each]):.1f}" for each in OURS]
    measures = ("computed", "ttft_p50_s", "ttft_p90_s")
    changes = [_span(ratios(runs, "placement", name)) for name in measures]
    closures = [_closed(runs, each) for each in ("placement", *others)]
    return "| " + " | ".join([cell["cell"], *shares, closures[0], *changes, *closures[1:]]) + " |"


def _closed(runs: _Runs, policy: str) -> str:
    if policy not in runs:
        return "-"
    share = closed(runs, policy)
    return "-" if share is None else f"{share:.0%}"


def _span(values: Sequence[float]) -> str:
    least, most = interval(values)
    if len(values) < 2:
        return f"{fmean(values):.2f}"
    return f"{fmean(values):.2f} ({least:.2f} to {most:.2f})"


def _conditions(cell: Mapping[str, Any]) -> str:
    plan, seeds = cell["plan"], len({run["seed"] for run in cell["runs"]})
    return (
        f"{plan['ranks']} ranks, {plan['requests']} requests, {seeds} seeds, gemma-3-1b; recomputed tokens "
        f"in percent of prompt tokens; ratios to the greedy oracle with 95 % intervals ({cell['date']})."
    )


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--short", action="store_true", help="one cell, 120 requests, 2 seeds")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="of each cell (10)")
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="of each run (500)")
    parser.add_argument("--workload", default=",".join(WORKLOADS), metavar="W,...", help="which, or files")
    parser.add_argument(
        "--blocks", default=",".join(map(str, SIZES)), metavar="N,...", help="sizes of memory"
    )
    parser.add_argument("--ours", action="store_true", help="leave out the policies of others")
    parser.add_argument("--from", dest="made", metavar="FILE", help="measure nothing, take this result")
    parser.add_argument("--json", metavar="FILE", help="write the result, and go on with what it has already")
    parser.add_argument("--page", metavar="FILE", help="put the table into this page")
    args = parser.parse_args()
    kept = args.made or args.json
    results = json.loads(Path(kept).read_text("utf-8")) if kept and Path(kept).is_file() else []
    if args.short:
        results = [measured("documents 1024", "documents", 1024, 2, 120)]
    elif not args.made:
        known = {each["cell"] for each in results}
        for name, workload, blocks, more in cells(args.workload.split(","), _numbers(args.blocks)):
            if name not in known:
                results.append(
                    measured(name, workload, blocks, args.seeds, args.requests, *more, others=not args.ours)
                )
                _write(results, args.json)
    if args.short:
        _write(results, args.json)
    if args.page:
        rewrite(Path(args.page), table(results), BEGIN, END)
    elif not args.json:
        print(table(results))
    return 0


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _write(results: Sequence[Mapping[str, Any]], file: str | None) -> None:
    if file:
        Path(file).write_text(encoded(results), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
