"""What do routers get wrong on hybrid models? Simulated caches, and each request predicted from their events.

    python benchmarks/bench_hybrid.py --json benchmarks/results/hybrid.json --page docs/models-hybrid.md
    python benchmarks/bench_hybrid.py --from benchmarks/results/hybrid.json --page docs/models-hybrid.md

Per model and seed: `vswa simulate --model M --blocks N --prompt-len L --requests R --seed S --out TRACE`,
then `vswa accuracy replay TRACE --json`. Models and memory are in `MODELS`; all take some minutes on two
cores. `--page` rewrites the table between the two marks of a Markdown page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vswa_plugin.engine.presets import described, preset_named

#: Model -> blocks of 32 tokens of global attention, so few that part of what comes again is evicted; and the
#: mean length of prompts, which for large blocks must be longer to reuse any.
MODELS = {
    "gpt-oss-20b": (512, 1000),
    "gpt-oss-120b": (512, 1000),
    "gemma-4-e4b": (512, 1000),
    "gemma-4-31b": (512, 1000),
    "llama-4-scout": (512, 1000),
    "llama-4-scout-hybrid": (512, 1000),
    "qwen3.5-9b": (1024, 2000),
    "qwen3-next-80b": (1024, 2000),
    "kimi-linear-48b": (4096, 6000),
    "deepseek-v4-flash": (192, 1000),
    "nemotron-h-8b": (1024, 2000),
}
REQUESTS, SEEDS = 300, 3
#: Of the scorers of `vswa accuracy replay`, those in the table.
SCORERS = ("exact", "global only", "mixed groups", "min of last boundaries")
#: Of each scorer: requests, and tokens that were promised and not reused.
COUNTS = ("exact_blocks", "over", "under", "over_tokens")
BEGIN, END = "<!-- written by benchmarks/bench_hybrid.py -->", "<!-- until here -->"


def measured(model: str, requests: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Sums over the seeds: requests, tokens, and per scorer what it got wrong."""
    blocks, prompt_len = MODELS[model]
    sums: dict[str, Any] = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "scores": {}}
    for seed in seeds:
        report = one_report(model, requests, seed)
        for name in ("requests", "prompt_tokens", "cached_tokens"):
            sums[name] += report[name]
        for score in report["scores"]:
            of_scorer = sums["scores"].setdefault(score["scorer"], dict.fromkeys(COUNTS, 0))
            for name in COUNTS:
                of_scorer[name] += score[name]
    return {"model": model, "blocks": blocks, "prompt_len": prompt_len, **sums}


def one_report(model: str, requests: int, seed: int) -> dict[str, Any]:
    """What `vswa accuracy replay` says of one simulated trace."""
    with tempfile.TemporaryDirectory() as folder:
        trace = str(Path(folder, "trace.jsonl.gz"))
        blocks, prompt_len = MODELS[model]
        run(
            "simulate",
            "--model",
            model,
            "--blocks",
            f"{blocks}",
            "--prompt-len",
            f"{prompt_len}",
            "--requests",
            f"{requests}",
            "--seed",
            f"{seed}",
            "--out",
            trace,
            "--json",
        )
        report: dict[str, Any] = json.loads(run("accuracy", "replay", trace, "--json"))["reports"][0]
        return report


def run(*words: str) -> str:
    command = [sys.executable, "-m", "vswa_plugin", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def result_of(models: Sequence[str], requests: int, seeds: int) -> dict[str, Any]:
    rows = []
    for model in models:
        rows.append(measured(model, requests, range(seeds)))
        print(f"{model}: done", file=sys.stderr)
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "vswa-plugin": version("vswa-plugin")},
        "requests": requests,
        "seeds": list(range(seeds)),
        "rows": rows,
    }


def table(result: Mapping[str, Any]) -> str:
    """The rows in Markdown."""
    seeds = ", ".join(map(str, result["seeds"]))
    heads = "".join(f" {name} |" for name in SCORERS)
    lines = [
        f"{result['requests']} requests per seed, seeds {seeds} ({result['date']}).",
        "",
        f"| model | cache groups | alignment | blocks | prompts | reused |{heads} too much | too little "
        "| broken |",
        "|---" * (9 + len(SCORERS)) + "|",
    ]
    return "\n".join([*lines, *map(line_of, result["rows"])])


def line_of(row: Mapping[str, Any]) -> str:
    model, requests = row["model"], row["requests"]
    layout = preset_named(model).layout(model)
    scores = row["scores"]
    shares = [f"{scores[name]['exact_blocks'] / requests:.1%}" for name in SCORERS]
    wrong = scores["global only"]
    cells = [
        f"`{model}`",
        described(model),
        str(layout.block_size),
        f"{row['blocks']:,}",
        f"{row['prompt_len']:,}",
        f"{row['cached_tokens'] / row['prompt_tokens']:.1%}",
        *shares,
        f"{wrong['over'] / requests:.1%}",
        f"{wrong['under'] / requests:.1%}",
        f"{wrong['over_tokens'] / row['prompt_tokens']:.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


def rewritten(page: str, text: str) -> str:
    """``page`` with ``text`` between the two marks."""
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", re.DOTALL)
    changed, count = pattern.subn(lambda marks: marks[1] + text + "\n" + marks[2], page)
    if count != 1:
        raise SystemExit(f"expected the lines {BEGIN} and {END} once, got {count} pairs")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", help="of those in MODELS, comma-separated (default: all)")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--json", metavar="FILE", help="write the result")
    parser.add_argument("--from", dest="source", metavar="FILE", help="show a result in place of measuring")
    parser.add_argument("--page", metavar="FILE", help="rewrite the table of this page")
    args = parser.parse_args()
    if args.source:
        result = json.loads(Path(args.source).read_text())
    else:
        chosen = args.models.split(",") if args.models else list(MODELS)
        result = result_of(chosen, args.requests, args.seeds)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if args.page:
        page = Path(args.page)
        page.write_text(rewritten(page.read_text(), table(result)))


if __name__ == "__main__":
    main()
