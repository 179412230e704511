"""The short forms of all benchmarks on one page, and against the committed ones.

    python benchmarks/bench_all.py run [--out build/bench] [--only NAME ...]
    python benchmarks/bench_all.py compare [--out build/bench]

`run` writes one JSON file per benchmark and `index.html` with tables and, with the extra `plot`, figures.
`compare` shows each number of `--out` as a ratio to the one in `benchmarks/results/short`, which were made by
`run --out benchmarks/results/short` on the machine that they name. Numbers of a busy machine mean little: the
page gives the load average.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMITTED = HERE / "results" / "short"
#: Name -> what it answers, script and its short form.
BENCHES: dict[str, tuple[str, list[str]]] = {
    "index": ("How long do apply and score take, against Dynamo's index?", ["bench_index.py", "--short"]),
    "stream": (
        "How long until a published event is visible, against Dynamo's plane?",
        ["bench_stream.py", "--events", "200", "--pauses", "0.002"],
    ),
    "fleet": ("What does an idle fleet cost a router?", ["bench_fleet.py", "--short"]),
    "projection": ("What does the projection for stock Dynamo cost?", ["bench_projection.py", "--short"]),
    "router": ("What does the exact router add, against Dynamo's own?", ["bench_router.py", "--short"]),
    "route": ("What is exactness worth, in simulations?", ["bench_route.py", "--short"]),
    "ttft": ("What do reuse and sliding windows save?", ["bench_ttft.py", "--short"]),
}
#: Facts about a run, not results.
_ABOUT = ("command", "date", "load", "machine", "versions", "question")
#: Beyond this factor either way a number is marked.
_NOTABLE = 1.5


def run(out: Path, only: list[str]) -> int:
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, (question, command) in BENCHES.items():
        if only and name not in only:
            continue
        say(f"{name}: {question}")
        target = out / f"{name}.json"
        code = subprocess.run(
            [sys.executable, f"benchmarks/{command[0]}", *command[1:], "--json", str(target.absolute())],
            check=False,
            cwd=HERE.parent,  # what was run is in the results, without this machine's folders
            stdout=subprocess.DEVNULL,
        ).returncode
        if code:
            failed.append(name)
            say(f"{name}: FAILED with exit code {code}")
    page = out / "index.html"
    page.write_text(render(out), "utf-8")
    say(f"wrote {page}")
    return 1 if failed else 0


def compare(out: Path) -> int:
    """Each number of both sides; 1 where there is nothing to compare."""
    rows = 0
    for name in BENCHES:
        ours, theirs = out / f"{name}.json", COMMITTED / f"{name}.json"
        if not (ours.exists() and theirs.exists()):
            say(f"{name}: expected {ours} and {theirs}; make them with `run`")
            continue
        now, before = dict(numbers(load(ours))), dict(numbers(load(theirs)))
        print(f"\n{name}: now / committed, of {load(theirs).get('date', 'no date')}")
        for path in (path for path in now if before.get(path)):
            ratio = now[path] / before[path]
            mark = "  <<" if not 1 / _NOTABLE <= ratio <= _NOTABLE else ""
            print(f"  {path:72} {now[path]:14.3f} {before[path]:14.3f} {ratio:7.2f}{mark}")
            rows += 1
    return 0 if rows else 1


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a result with their places, facts about the run left out."""
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        yield path, float(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if path or not str(key).startswith(_ABOUT):
                yield from numbers(inner, f"{path} / {key}" if path else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{path} [{i}]")


def render(out: Path) -> str:
    parts = [
        "<!doctype html><meta charset=utf-8><title>vswa-plugin benchmarks</title>",
        "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}td{padding:1px 1em 1px 0}"
        "td+td{text-align:right}img{max-width:100%}</style>",
        f"<h1>vswa-plugin benchmarks, short forms</h1><p>{date.today()}, {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.2f}. What they mean: benchmarks/README.md.</p>",
    ]
    for name, (question, _) in BENCHES.items():
        if not (out / f"{name}.json").exists():
            continue
        result = load(out / f"{name}.json")
        found = list(numbers(result))
        rows = "".join(f"<tr><td>{html.escape(path)}</td><td>{value:,.6g}</td></tr>" for path, value in found)
        parts.append(f"<h2>{html.escape(question)}</h2>{figure(name, result, found)}")
        parts.append(f"<details><summary>{len(found)} numbers</summary><table>{rows}</table></details>")
    return "\n".join(parts)


def figure(name: str, result: Mapping[str, Any], found: list[tuple[str, float]]) -> str:
    """The benchmark's own figure, else its ratios as bars; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return "<p>(figures need matplotlib: pip install 'vswa-plugin[plot]')</p>"
    matplotlib.use("Agg")
    buffer = io.BytesIO()
    if name == "ttft":
        from bench_ttft import plot

        plot(result, buffer)
    elif not _draw_ratios([(p, v) for p, v in found if "ratio" in p or "multiple" in p], buffer):
        return ""
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _draw_ratios(ratios: list[tuple[str, float]], buffer: io.BytesIO) -> bool:
    from matplotlib import pyplot

    if not ratios:
        return False
    drawn, axes = pyplot.subplots(figsize=(9, 0.8 + 0.24 * len(ratios)))
    axes.barh([path for path, _ in ratios], [value for _, value in ratios])
    axes.axvline(1, color="C3", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    drawn.tight_layout()
    drawn.savefig(buffer, format="png", dpi=110)
    pyplot.close(drawn)
    return True


def load(file: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("run", "compare"))
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder (build/bench)")
    parser.add_argument("--only", nargs="*", default=[], choices=list(BENCHES), help="these alone")
    args = parser.parse_args()
    return run(args.out, args.only) if args.what == "run" else compare(args.out)


if __name__ == "__main__":
    sys.exit(main())
