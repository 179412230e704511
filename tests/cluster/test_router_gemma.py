"""The router in front of real engines: what it promises is what they reuse."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, long_prompt
from tests.router_helpers import Stack


@pytest.fixture(scope="module")
def stack(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("gemma"), brokers.env, model_dir, "engines")

    async def worker(number: int) -> None:
        # Small enough to evict: what slides out of the window is gone before the global blocks are.
        small = '{"gemma3_cpu": {"kv_blocks": {"512": 60, "global": 150}}}'
        await made.engine(f"worker-{number}", "agg", "--override-engine-args", small)

    async def start() -> None:
        await asyncio.gather(worker(1), worker(2), made.start("--log-level", "debug"))
        await made.shows("gemma")
        await eventually(lambda: made.routers[0].log().count("joins") == 2, "both workers are used")

    try:
        run(start())
        yield made
    finally:
        codes = run(made.stop())
    assert set(codes.values()) == {0}, codes


def test_what_is_promised_is_what_the_engines_reuse_under_eviction(run: Run[Any], stack: Stack) -> None:
    rng = random.Random(11)
    families = [long_prompt(f"family {name}", 60) for name in "abcd"]
    reused: list[int] = []

    async def body() -> None:
        for number in range(30):
            family = rng.choice(families)
            prompt = family[: rng.randrange(200, len(family))]
            status, answer = await stack.ask(prompt, max_tokens=2, temperature=0)
            assert status == 200, (number, answer)
            reused.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    run(body())
    log = stack.routers[0].log()
    promised = [int(tokens) for tokens in re.findall(r"promises (\d+) of", log)]
    workers = Counter(re.findall(r"rank (\w+)/0 at cost", log))

    assert [tokens // 32 for tokens in promised] == [tokens // 32 for tokens in reused]
    assert sum(tokens > 0 for tokens in reused) > 8
    assert len(workers) == 2
