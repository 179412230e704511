"""Tokens per second of the Gemma 3 CPU engine's model against Hugging Face transformers.

    python benchmarks/bench_engine.py [--json benchmarks/results/bench_engine.json]
        [--transformers-python /path/to/other/venv/bin/python]

Both compute the same random checkpoints in float32 with the same number of threads, each in its own process,
in turns; the best of all turns counts. Prefill is one pass over the prompt with the last token's logits;
decode is one token for each sequence of the batch. transformers runs as it comes: SDPA attention, its
DynamicCache. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "make-model": {},
    "mid": {
        "head_dim": 64,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 12,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 64,
        "vocab_size": 32_000,
    },
}
CONTENDERS = ("ours", "transformers")
LENGTHS = (256, 2048)
BATCHES = (1, 8)
DECODE_STEPS = 24
BLOCK_SIZE = 32
INSTALL = "pip install torch transformers (a CPU build of torch is enough), or --transformers-python"

Step = Callable[[], None]
#: name of the measurement -> (tokens that one call computes, call)
Steps = dict[str, tuple[int, Step]]


def best_seconds(call: Step, budget: float, at_least: int) -> float:
    """Shortest of as many calls as fit into the budget of seconds."""
    call()
    best, end, calls = float("inf"), time.perf_counter() + budget, 0
    while calls < at_least or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        best, calls = min(best, time.perf_counter() - started), calls + 1
    return best


def our_steps(directory: str) -> Steps:
    """Steps of Gemma3Model, driven through page tables as the engine drives it."""
    from vswa_plugins.gemma3_cpu.model import Chunk, PagedKV, group_layers, load_model

    model = load_model(directory)
    layers = group_layers(model.config)
    blocks = -(-(max(LENGTHS) + 64 * DECODE_STEPS) // BLOCK_SIZE)
    kv = PagedKV(model.config, layers, [max(BATCHES) * blocks] * len(layers), BLOCK_SIZE)
    tables = [[list(range(i * blocks, (i + 1) * blocks))] * len(layers) for i in range(max(BATCHES))]

    def prefill(length: int, batch: int) -> None:
        prompt = np.arange(length) % 3000 + 300
        for i in range(batch):
            model.forward([Chunk(prompt, 0, tables[i])], kv)

    def decode(length: int, batch: int) -> Step:
        prefill(length, batch)

        def run() -> None:
            token = np.array([777])
            for step in range(DECODE_STEPS):
                model.forward([Chunk(token, length + step, tables[i]) for i in range(batch)], kv)

        return run

    steps: Steps = {f"prefill {n}": (n, lambda n=n: prefill(n, 1)) for n in LENGTHS}  # type: ignore[misc]
    for length in LENGTHS:
        for batch in BATCHES:
            steps[f"decode at {length}, batch {batch}"] = (
                batch * DECODE_STEPS,
                _later(decode, length, batch),
            )
    return steps


def transformers_steps(directory: str) -> Steps:
    """The same steps by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def prefill(length: int, batch: int) -> Any:
        prompt = (torch.arange(length) % 3000 + 300).expand(batch, length)
        return model(prompt, use_cache=True, logits_to_keep=1).past_key_values

    def decode(length: int, batch: int) -> Step:
        cache = prefill(length, batch)

        def run() -> None:
            # The cache grows by a few dozen tokens from call to call, which shortens none of them.
            token = torch.full((batch, 1), 777)
            for _ in range(DECODE_STEPS):
                model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return run

    steps: Steps = {f"prefill {n}": (n, lambda n=n: prefill(n, 1)) for n in LENGTHS}  # type: ignore[misc]
    for length in LENGTHS:
        for batch in BATCHES:
            steps[f"decode at {length}, batch {batch}"] = (
                batch * DECODE_STEPS,
                _later(decode, length, batch),
            )
    return steps


def _later(prepare: Callable[[int, int], Step], length: int, batch: int) -> Step:
    """A step that prepares itself on its first call, which is the warm-up, so that caches do not pile up."""
    ready: list[Step] = []

    def run() -> None:
        if not ready:
            ready.append(prepare(length, batch))
        ready[0]()

    return run


def run_contender(contender: str, directory: str, budget: float) -> None:
    """In the subprocess: measure and print tokens/s as JSON."""
    steps = our_steps(directory) if contender == "ours" else transformers_steps(directory)
    rates = {}
    while steps:
        name, (tokens, call) = next(iter(steps.items()))
        rates[name] = tokens / best_seconds(call, budget, at_least=3)
        del steps[name], call
    print(json.dumps(rates))


def measure(contender: str, directory: Path, args: argparse.Namespace) -> dict[str, float] | None:
    python = args.transformers_python if contender == "transformers" else sys.executable
    threads = str(args.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    command = [
        python,
        __file__,
        "--contender",
        contender,
        "--checkpoint",
        str(directory),
        "--budget",
        str(args.budget),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        hint = f"; {INSTALL}" if "No module named" in lines[-1] else ""
        print(f"{contender}: not measured: {lines[-1]}{hint}", file=sys.stderr)
        return None
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Best tokens/s of each contender on one checkpoint, and ours / theirs."""
    from vswa_plugins.gemma3_cpu.checkpoint import make_checkpoint

    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / name
        make_checkpoint(directory, overrides=CHECKPOINTS[name])
        for _ in range(args.rounds):
            for contender in CONTENDERS:
                for what, rate in (measure(contender, directory, args) or {}).items():
                    rates = best.setdefault(contender, {})
                    rates[what] = max(rate, rates.get(what, 0.0))
    ours, theirs = (best.get(contender, {}) for contender in CONTENDERS)
    result: dict[str, Any] = {"config": CHECKPOINTS[name], "tokens_per_second": {}, "ratio": {}}
    for what, rate in ours.items():
        result["tokens_per_second"][what] = {c: round(rates[what], 1) for c, rates in best.items()}
        if what in theirs:
            result["ratio"][what] = round(rate / theirs[what], 2)
    return result


def versions(args: argparse.Namespace) -> dict[str, str]:
    """Versions of what is compared."""
    code = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    done = subprocess.run([args.transformers_python, "-c", code], capture_output=True, text=True, check=False)
    torch, transformers = done.stdout.split() if done.returncode == 0 else ("missing", "missing")
    return {
        "numpy": np.__version__,
        "python": platform.python_version(),
        "torch": torch,
        "transformers": transformers,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file as well")
    parser.add_argument("--versions", action="store_true", help="print versions and stop")
    parser.add_argument(
        "--transformers-python", default=sys.executable, help="interpreter that has transformers"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="for both (default: all cores)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each measurement (default: 1)")
    parser.add_argument("--only", choices=sorted(CHECKPOINTS), help="one checkpoint")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    if args.contender:
        run_contender(args.contender, args.checkpoint, args.budget)
        return
    if args.versions:
        print(json.dumps(versions(args)))
        return
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/bench_engine.py", *_shown(sys.argv[1:])]),
        "date": date.today().isoformat(),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {args.threads} threads each",
        "versions": versions(args),
        "checkpoints": {},
    }
    for name in [args.only] if args.only else CHECKPOINTS:
        result["checkpoints"][name] = compare(name, args)
        for what, rates in result["checkpoints"][name]["tokens_per_second"].items():
            ratio = result["checkpoints"][name]["ratio"].get(what)
            print(f"{name:11} {what:25} {rates}  ratio {ratio}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _shown(arguments: list[str]) -> list[str]:
    """The command without paths of this machine."""
    return [
        "PYTHON" if before == "--transformers-python" else a
        for before, a in zip(["", *arguments], arguments, strict=False)
    ]


if __name__ == "__main__":
    main()
