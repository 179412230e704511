"""What a placement decision costs: time, and memory for what the ranks hold.

    python benchmarks/bench_placement_cost.py --json benchmarks/results/placement_cost.json

64 ranks, of which each holds 4,096 blocks in each of two windows; a prompt of 128 blocks that a third of the
ranks hold in part. The time is that of the plugin alone, the least of many choices. The memory is that of all
that the plugin keeps, over the blocks that the ranks hold in all windows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
import tracemalloc
from collections.abc import Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vswa_plugins.placement.cost import Placer

from vswa_plugin.blocks import CacheGroup, CacheLayout
from vswa_plugin.selection import Candidate, Load, LoadBook, RoutedRequest, Scored
from vswa_plugin.wire import Rank, Removed, Stored, layout_event

BLOCK_SIZE, PROMPT_BLOCKS = 32, 128
LAYOUT = CacheLayout((CacheGroup(0, 512, BLOCK_SIZE), CacheGroup(1, None, BLOCK_SIZE)), "trtllm_v2", "m")


def filled(ranks: Sequence[Rank], blocks: int, rng: random.Random) -> Placer:
    """A placer whose ranks are full and have evicted, after some thousand requests."""
    now = 0.0
    placer = Placer(lambda: now)
    book = LoadBook(BLOCK_SIZE)
    book.watch = partial(placer.load_changed, "m")
    prompts = [[rng.getrandbits(64) for _ in range(PROMPT_BLOCKS)] for _ in range(2_000)]
    for rank in ranks:
        placer.rank_changed(rank, layout_event(LAYOUT))
    for turn in range(blocks // PROMPT_BLOCKS + 4):
        for rank in ranks:
            key, prompt = (turn, rank), rng.choice(prompts)
            book.add(key, rank, prompt, PROMPT_BLOCKS * BLOCK_SIZE + 1, PROMPT_BLOCKS * BLOCK_SIZE)
            for group in (0, 1):
                placer.rank_changed(rank, Stored(group, 0, None, tuple(prompt), "device"))
                if turn * PROMPT_BLOCKS > blocks:
                    placer.rank_changed(rank, Removed(group, (rng.getrandbits(64),)))
            now += 0.01
            book.first_token(key)
            book.free(key)
    return placer


def measured(count: int, blocks: int) -> dict[str, Any]:
    rng = random.Random(7)
    ranks = [Rank(index) for index in range(count)]
    tracemalloc.start()
    placer = filled(ranks, blocks, rng)
    nbytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    names = [rng.getrandbits(64) for _ in range(PROMPT_BLOCKS)]
    request = RoutedRequest("", "m", PROMPT_BLOCKS * BLOCK_SIZE + 3, BLOCK_SIZE, names)
    candidates = [
        Scored(
            Candidate(rank, 0 if index % 3 else 64 * BLOCK_SIZE, load=Load(200, 1_000, 3), new_blocks=100),
            50.0,
        )
        for index, rank in enumerate(ranks)
    ]
    times = []
    for _ in range(500):
        began = time.perf_counter()
        placer.score(request, candidates)
        times.append(time.perf_counter() - began)
    return {
        "ranks": count,
        "blocks": blocks,
        "choice_us": round(1e6 * min(times), 1),
        "bytes_per_block_and_rank": round(nbytes / (count * blocks * len(LAYOUT.groups)), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "vswa-plugin": version("vswa-plugin")},
        "rows": [measured(count, blocks) for count, blocks in ((4, 1_024), (16, 4_096), (64, 4_096))],
    }
    text = json.dumps(result, indent=1) + "\n"
    if args.json:
        Path(args.json).write_text(text, "utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
