"""Time to first token of the embedded engine, and what sliding windows save in bytes held and moved.

    python benchmarks/bench_ttft.py [--short] [--json FILE] [--plot FILE.png]

For each prompt length a prefix of 0, 50 or 95 % is made resident, then the whole prompt is sent and the time
to its first token taken; `reused` is what the engine says. The same prompts then go from a prefill engine to
a decode engine over TCP, once with a cache per window and once with one full cache for all layers
(`max_attention_window` as long as the context): bytes that one running request holds, and bytes moved for it.
All engines are in this process and run the small random model of `vswa make-model`. Medians of `--repeats`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import IO, Any

from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

from vswa_plugin.engine.contract import EngineSettings

LENGTHS = (512, 1024, 2048, 4096, 7168)
REUSE = (0.0, 0.5, 0.95)
VOCABULARY = range(10, 250)
#: Enough that the blocks of a running request can be read while it runs.
OUTPUT_TOKENS = 64


class Engines:
    """Starts engines on one model and stops them all."""

    def __init__(self, model: Path, context: int) -> None:
        self._model = model
        self._context = context

    @contextmanager
    def start(self, mode: str, *, full: bool = False) -> Iterator[Gemma3CpuEngine]:
        options: dict[str, Any] = {"max_seq_len": self._context, "max_num_tokens": 512, "max_batch_size": 2}
        if full:
            options["kv_cache_config"] = {"max_attention_window": [self._context]}
        engine = Gemma3CpuEngine(EngineSettings("gemma3_cpu", mode, str(self._model), "bench", options))
        engine.start(lambda rank, events: None)
        try:
            yield engine
        finally:
            engine.stop()


def prompt(rng: random.Random, length: int) -> list[int]:
    return rng.choices(VOCABULARY, k=length)


def request(tokens: Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    stop = {"max_tokens": max_tokens, "ignore_eos": True}
    return {"token_ids": list(tokens), "stop_conditions": stop, **more}


async def first_token(engine: Gemma3CpuEngine, tokens: Sequence[int]) -> tuple[float, int]:
    """Seconds to the first token of a one-token answer, and the prompt tokens that were reused."""
    began = time.perf_counter()
    async for chunk in engine.generate(request(tokens, 1)):
        took = time.perf_counter() - began
        return took, chunk["completion_usage"]["prompt_tokens_details"]["cached_tokens"]
    raise RuntimeError("expected a token, got none")


async def time_lengths(engine: Gemma3CpuEngine, lengths: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    await first_token(engine, prompt(rng, 600))
    rows = []
    for length in lengths:
        for share in REUSE:
            times, reused = [], []
            for _ in range(repeats):
                tokens = prompt(rng, length)
                if share:
                    await first_token(engine, tokens[: int(length * share)])
                took, cached = await first_token(engine, tokens)
                times.append(took)
                reused.append(cached)
            row = {
                "prompt_tokens": length,
                "wanted_reuse": share,
                "reused_tokens": int(statistics.median(reused)),
                "first_token_ms": round(statistics.median(times) * 1e3, 2),
            }
            rows.append(row)
            say(f"{length:6d} tokens, {row['reused_tokens']:5d} reused: {row['first_token_ms']:8.1f} ms")
    return rows


def block_bytes(engine: Gemma3CpuEngine) -> dict[str, int]:
    """Bytes of one block by window label."""
    config, plan = engine._config, engine._plan
    token = 2 * 4 * config.num_key_value_heads * config.head_dim
    windows = config.windows()
    return {
        pool.group.label: token * pool.group.block_size * sum(windows.count(w) for w in pool.model_windows)
        for pool in plan.pools
    }


async def hand_over(prefill: Gemma3CpuEngine, decode: Gemma3CpuEngine, tokens: Sequence[int]) -> int:
    """One request over both engines; bytes that the decode engine holds for it while it runs."""
    handed = None
    async for chunk in prefill.generate(request(tokens, 1)):
        handed = chunk.get("disaggregated_params", handed)
    held = 0
    sizes = block_bytes(decode)
    asked = request(tokens, OUTPUT_TOKENS, prefill_result={"disaggregated_params": handed})
    async for chunk in decode.generate(asked):
        stats = decode.stats()
        if "finish_reason" not in chunk:
            held = max(held, sum(int(stats[f"blocks_used_{name}"]) * size for name, size in sizes.items()))
    return held


async def measure_bytes(engines: Engines, lengths: Sequence[int]) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {length: {"prompt_tokens": length} for length in lengths}
    for kind, full in (("per_window", False), ("full", True)):
        with engines.start("prefill", full=full) as prefill, engines.start("decode", full=full) as decode:
            rng = random.Random(2)
            for length in lengths:
                before = moved(decode)
                held = await hand_over(prefill, decode, prompt(rng, length))
                rows[length] |= {f"held_{kind}": held, f"moved_{kind}": moved(decode) - before}
                if decode.stats().get("transfer_failures"):
                    raise RuntimeError("a transfer failed: the bytes would not be those of one prompt")
    for row in rows.values():
        say(
            f"{row['prompt_tokens']:6d} tokens: held {row['held_per_window'] / row['held_full']:.2f} "
            f"and moved {row['moved_per_window'] / row['moved_full']:.2f} of what a full cache needs "
            f"({row['held_full'] / 2**20:.1f} MiB held, {row['moved_full'] / 2**20:.1f} MiB moved)"
        )
    return list(rows.values())


def moved(engine: Gemma3CpuEngine) -> int:
    return int(sum(n for name, n in engine.stats().items() if name.startswith("transfer_bytes_")))


def plot(result: Mapping[str, Any], file: str | IO[bytes]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for share in REUSE:
        rows = [row for row in result["first_token"] if row["wanted_reuse"] == share]
        x, y = [row["prompt_tokens"] for row in rows], [row["first_token_ms"] for row in rows]
        left.plot(x, y, marker="o", label=f"{share:.0%} reused")
    left.set(xlabel="prompt tokens", ylabel="time to first token, ms", title="Prefix reuse", yscale="log")
    styles = (("held_full", "full cache, held", "C3", "-"), ("moved_full", "full cache, moved", "C3", "--"))
    styles += (
        ("held_per_window", "per window, held", "C0", "-"),
        ("moved_per_window", "per window, moved", "C0", "--"),
    )
    for key, label, color, line in styles:
        x = [row["prompt_tokens"] for row in result["bytes"]]
        y = [row[key] / 2**20 for row in result["bytes"]]
        right.plot(x, y, line, color=color, marker="o", label=label)
    right.set(xlabel="prompt tokens", ylabel="MiB of one request", title="Window of 512 on 5 of 6 layers")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    lengths = LENGTHS[:3] if args.short else LENGTHS
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_checkpoint(model)
        engines = Engines(model, 8192)
        with engines.start("agg") as engine:
            timed = await time_lengths(engine, lengths, 3 if args.short else args.repeats)
        held = await measure_bytes(engines, lengths)
    return {
        "date": date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": os.getloadavg()[0],
        "first_token": timed,
        "bytes": held,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="three lengths, three repeats")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each point (7)")
    parser.add_argument("--json", metavar="FILE", help="write the result; - for standard output")
    parser.add_argument("--plot", metavar="FILE", help="draw both figures (extra: plot)")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    if args.json == "-":
        print(json.dumps(result, indent=1))
    elif args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
