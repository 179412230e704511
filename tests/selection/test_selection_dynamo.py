"""Costs, load and choice against Dynamo's real KvRouter, fed with the same workers, blocks and requests.

Dynamo's router says its costs only in its log, so it runs in a process of its own: this file as a program.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.dynamo.names import LOOPBACK_ENV
from vswa_plugin.selection import Candidate, LoadBook, Weights, booked_prefill, overridden, scored
from vswa_plugin.wire.events import Rank

SIZE = 16
SETTINGS: dict[str, float] = {
    "overlap_score_credit_decay": 0.5,
    "decode_active_request_weight": 0.25,
    "prefill_load_scale": 1.5,
}
#: Not the numbers (overlap_score_credit and the like): Dynamo 1.6.1 takes them and does not apply them here.
OVERRIDES: list[dict[str, Any] | None] = [
    None,
    None,
    None,
    {"assume_kv_reuse": False},
    {"track_prefill_tokens": False},
]


def prompts() -> list[list[int]]:
    """Prompts that share prefixes of several lengths."""
    rng = random.Random(3)
    stem = [rng.randrange(30_000) for _ in range(400)]
    return [
        [*stem[: rng.randrange(0, 400)], *(rng.randrange(30_000) for _ in range(rng.randrange(1, 200)))]
        for _ in range(12)
    ]


def test_costs_loads_and_choices_equal_those_of_dynamos_router(model_dir: Path, tmp_path: Path) -> None:
    env = {
        **os.environ,
        **LOOPBACK_ENV,
        "DYN_LOG": "info",
        "DYN_FILE_KV": str(tmp_path),
        "DYN_EVENT_PLANE": "zmq",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "tests.selection.test_selection_dynamo", str(model_dir)],
        env=env,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert ran.returncode == 0, ran.stderr[-2_000:]
    log = re.sub(r"\x1b\[[0-9;]*m", "", ran.stdout + ran.stderr)
    logits = {
        found[1]: float(found[2]) for found in re.finditer(r'request_id="(r\d+)".* logit=([\d.]+)', log)
    }
    steps = [json.loads(line[5:]) for line in ran.stdout.splitlines() if line.startswith("STEP ")]
    assert len(steps) == 60
    assert len(logits) == sum(step["kind"] == "request" for step in steps) > 25

    book = LoadBook(SIZE)
    for step in steps:
        key = step["request_id"]
        if step["kind"] == "request":
            check_request(book, step, logits[key])
        elif step["kind"] == "first token":
            book.first_token(key)
        else:
            book.free(key)


def check_request(book: LoadBook, step: dict[str, Any], logit: float) -> None:
    tokens = prompts()[step["prompt"]]
    hashes = sequence_hashes_of_tokens(tokens, SIZE)
    weights = overridden(Weights(**SETTINGS), step["override"])
    cached = {each["worker_id"]: each["device_blocks"] * SIZE for each in step["overlap"]}
    candidates = []
    for worker_id, cached_tokens in cached.items():
        on_rank = book.projected(Rank(worker_id), hashes, shared=weights.assume_kv_reuse)
        load, new_blocks = on_rank.load, on_rank.new_blocks
        candidates.append(Candidate(Rank(worker_id), cached_tokens, load=load, new_blocks=new_blocks))
    for shown in step["loads"]:
        (mine,) = (each for each in candidates if each.rank.worker_id == shown["worker_id"])
        to_compute = len(tokens) - mine.cached_tokens + mine.load.prefill_tokens
        assert shown["potential_prefill_tokens"] == to_compute
        assert shown["potential_decode_blocks"] == mine.load.blocks + new_blocks_of(book, mine, hashes)
        assert shown["active_requests"] == mine.load.requests

    found = scored(candidates, len(tokens), SIZE, weights)
    best = min(each.cost for each in found)
    (chosen,) = (each for each in found if each.rank.worker_id == step["chosen"])
    assert abs(best - logit) < 1e-9, step
    assert abs(chosen.cost - best) < 1e-9
    prefill = booked_prefill(chosen.candidate, len(tokens), SIZE, weights)
    shared = weights.assume_kv_reuse
    book.add(step["request_id"], chosen.rank, hashes, len(tokens), prefill, shared=shared)


def new_blocks_of(book: LoadBook, candidate: Candidate, hashes: Sequence[int]) -> int:
    """Without the request's own wish to share nothing."""
    return book.projected(candidate.rank, hashes).new_blocks


async def drive(model_path: str) -> None:
    """Two workers that hold some prompts, and random requests; prints each step and what Dynamo says."""
    from dynamo.llm import (
        KvEventPublisher,
        KvRouter,
        KvRouterConfig,
        ModelInput,
        ModelRuntimeConfig,
        ModelType,
        WorkerType,
        register_model,
    )
    from dynamo.runtime import DistributedRuntime

    async def generate(request: Any, context: Any) -> Any:
        yield {}

    loop = asyncio.get_running_loop()
    runtimes, publishers, serving = [], [], []
    for _ in range(2):
        runtimes.append(DistributedRuntime(loop, "file", "tcp"))
        endpoint = runtimes[-1].endpoint("reference.backend.generate")

        async def serve(endpoint: Any = endpoint) -> None:
            await endpoint.serve_endpoint(generate, graceful_shutdown=True)

        serving.append(asyncio.create_task(serve()))
        # With a local indexer the router recovers what was published before it listened.
        publishers.append(
            KvEventPublisher(endpoint=endpoint, kv_block_size=SIZE, dp_rank=0, enable_local_indexer=True)
        )
        config = ModelRuntimeConfig()
        config.enable_local_indexer = True
        await register_model(
            ModelInput.Tokens,
            ModelType.Chat,
            endpoint,
            model_path,
            "m",
            worker_type=WorkerType.Aggregated,
            kv_cache_block_size=SIZE,
            runtime_config=config,
            ignore_weights=True,
        )
    runtimes.append(DistributedRuntime(loop, "file", "tcp"))
    endpoint = runtimes[-1].endpoint("reference.backend.generate")
    router = KvRouter(endpoint, SIZE, KvRouterConfig(**SETTINGS))
    given = prompts()
    for number, publisher in enumerate(publishers):
        for tokens in given[number::3]:
            whole = len(tokens) // SIZE
            names = [value & 0x7FFF_FFFF_FFFF_FFFF for value in sequence_hashes_of_tokens(tokens, SIZE)]
            publisher.publish_stored(tokens[: whole * SIZE], [SIZE] * whole, names)

    async with asyncio.timeout(15):
        for number in range(2):
            tokens = given[number::3][-1]
            while not any(
                each["device_blocks"] == len(tokens) // SIZE
                for each in (await router.get_overlap_scores(tokens))["workers"]
            ):
                await asyncio.sleep(0.02)
    await ask(router, given)
    for runtime in runtimes:
        runtime.shutdown()
    await asyncio.wait(serving, timeout=5)


async def ask(router: Any, given: list[list[int]]) -> None:
    rng = random.Random(5)
    active: list[str] = []
    for number in range(60):
        step: dict[str, Any] = {"kind": rng.choice(["request", "request", "first token", "end"])}
        if step["kind"] == "request" or not active:
            prompt = rng.randrange(len(given))
            step |= {"kind": "request", "request_id": f"r{number}", "prompt": prompt}
            step["override"] = rng.choice(OVERRIDES)
            step["loads"] = await router.get_potential_loads(given[prompt])
            step["overlap"] = (await router.get_overlap_scores(given[prompt]))["workers"]
            step["chosen"], _, _ = await router.best_worker(
                given[prompt], router_config_override=step["override"], request_id=step["request_id"]
            )
            active.append(step["request_id"])
        else:
            step["request_id"] = rng.choice(active)
            if step["kind"] == "end":
                active.remove(step["request_id"])
                await router.free(step["request_id"])
            else:
                await router.mark_prefill_complete(step["request_id"])
        sys.stdout.write(f"STEP {json.dumps(step)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(drive(sys.argv[1]))
