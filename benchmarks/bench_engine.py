"""Tokens per second of the Gemma 3 CPU engine's model against Hugging Face transformers.

    python benchmarks/bench_engine.py [--json benchmarks/results/bench_engine.json]
        [--transformers-python /path/to/other/venv/bin/python]

Both compute the same random checkpoints in float32 with the same number of threads, each in its own process,
in turns; the best of all turns counts. Prefill is one pass over the prompt with the last token's logits;
decode is one token for each sequence of the batch. transformers runs as it comes: SDPA attention, its
DynamicCache. A ratio above 1 means that ours is faster. The machine should be idle: the result holds its
load average at the start.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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


class Step(NamedTuple):
    """One measurement: tokens that a run computes; what it starts from, made anew and not timed."""

    tokens: int
    setup: Callable[[], Any]
    run: Callable[[Any], Any]


class Contender(Protocol):
    """One way to compute a checkpoint."""

    def prefill(self, length: int, batch: int) -> Any:
        """Compute one prompt of ``length`` tokens, kept ``batch`` times: what decode goes on from."""

    def copied(self, state: Any) -> Any:
        """A copy that :meth:`decode` may change."""

    def decode(self, state: Any, length: int, batch: int) -> None:
        """One token for each sequence, DECODE_STEPS times."""


class Ours:
    """Gemma3Model, driven through page tables as the engine drives it."""

    def __init__(self, directory: str) -> None:
        from vswa_plugins.gemma3_cpu.model.model import PagedKV, group_layers
        from vswa_plugins.gemma3_cpu.weights.source import load_model

        self._model = load_model(directory)
        layers = group_layers(self._model.config)
        blocks = -(-(max(LENGTHS) + DECODE_STEPS) // BLOCK_SIZE)
        self._kv = PagedKV(self._model.config, layers, [max(BATCHES) * blocks] * len(layers), BLOCK_SIZE)
        self._tables = [
            [list(range(i * blocks, (i + 1) * blocks))] * len(layers) for i in range(max(BATCHES))
        ]

    def prefill(self, length: int, batch: int) -> Any:
        from vswa_plugins.gemma3_cpu.model.model import Chunk

        prompt = np.arange(length) % 3000 + 300
        self._model.forward([Chunk(prompt, 0, self._tables[0])], self._kv)
        for store in (*self._kv.k, *self._kv.v) if batch > 1 else ():
            copies = store.reshape(*store.shape[:2], max(BATCHES), -1, store.shape[-1])
            copies[:, :, 1:batch] = copies[:, :, :1]

    def copied(self, state: Any) -> Any:
        # Decoding again from the same position writes the same pages again.
        return state

    def decode(self, state: Any, length: int, batch: int) -> None:
        from vswa_plugins.gemma3_cpu.model.model import Chunk

        token = np.array([777])
        for step in range(DECODE_STEPS):
            self._model.forward(
                [Chunk(token, length + step, self._tables[i]) for i in range(batch)], self._kv
            )


class Transformers:
    """transformers as it comes: SDPA attention and DynamicCache, in float32."""

    def __init__(self, directory: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def prefill(self, length: int, batch: int) -> Any:
        prompt = (self._torch.arange(length) % 3000 + 300)[None]
        cache = self._model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        return cache

    def copied(self, state: Any) -> Any:
        return copy.deepcopy(state)

    def decode(self, state: Any, length: int, batch: int) -> None:
        token = self._torch.full((batch, 1), 777)
        for _ in range(DECODE_STEPS):
            self._model(token, past_key_values=state, use_cache=True, logits_to_keep=1)


def steps(contender: Contender) -> Iterator[tuple[str, Step]]:
    """All measurements by name; each is prepared only when it is asked for."""
    for length in LENGTHS:
        yield f"prefill {length}", Step(length, lambda: None, lambda _, n=length: contender.prefill(n, 1))
    for length in LENGTHS:
        for batch in BATCHES:
            state = contender.prefill(length, batch)
            yield (
                f"decode at {length}, batch {batch}",
                Step(
                    batch * DECODE_STEPS,
                    lambda state=state: contender.copied(state),
                    lambda state, n=length, b=batch: contender.decode(state, n, b),
                ),
            )


def best_seconds(step: Step, budget: float, at_least: int) -> float:
    """Shortest of as many runs as fit into the budget of seconds, after one to warm up."""
    step.run(step.setup())
    best, spent, runs = float("inf"), 0.0, 0
    while runs < at_least or spent < budget:
        state = step.setup()
        gc.collect()
        started = time.perf_counter()
        step.run(state)
        seconds = time.perf_counter() - started
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return best


def run_contender(contender: str, directory: str, budget: float) -> None:
    """In the subprocess: measure and print tokens/s as JSON."""
    subject: Contender = Ours(directory) if contender == "ours" else Transformers(directory)
    rates = {name: step.tokens / best_seconds(step, budget, at_least=2) for name, step in steps(subject)}
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
    from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

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
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "versions": versions(args),
        "checkpoints": {},
    }
    for name in [args.only] if args.only else CHECKPOINTS:
        result["checkpoints"][name] = compare(name, args)
        for what, rates in result["checkpoints"][name]["tokens_per_second"].items():
            ratio = result["checkpoints"][name]["ratio"].get(what)
            print(f"{name:11} {what:25} {rates}  ratio {ratio}", flush=True)
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
