"""A child process of the tests: scripts of KV events through Dynamo's publisher into its router.

    python -m tests.dynamo_events_router MODEL_DIR < scripts.json

Reads {name: steps}; writes {name: one number a step: prompts that the router scored otherwise than the
definition of the projection says}. Discovery is by file and the event plane by ZeroMQ: no broker.
"""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import count
from typing import Any

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
from vswa_plugins.dynamo_events.feed import RankFeed
from vswa_plugins.dynamo_events.projection import Projection

from tests.dynamo_events_helpers import SIZE, Held, layout_of, tokens_of
from tests.dynamo_events_hybrid import MIXED, HybridWorker
from vswa_plugin.wire.events import VERSION, Batch, Event, Source

SOURCE = Source("lab", "backend", 1)


class Dynamo:
    """A worker that serves nothing, its publisher, and a router that listens to it."""

    _numbers = count()

    def __init__(self, endpoint: Any, publisher: KvEventPublisher) -> None:
        self.publisher, self._endpoint = publisher, endpoint
        self._router = KvRouter(endpoint, SIZE, KvRouterConfig())

    @classmethod
    async def start(cls, runtime: Any, model_dir: str) -> Dynamo:
        endpoint = runtime.endpoint("lab.backend.generate")
        publisher = KvEventPublisher(
            endpoint=endpoint, kv_block_size=SIZE, dp_rank=0, enable_local_indexer=True
        )
        config = ModelRuntimeConfig()
        config.enable_local_indexer = True
        config.total_kv_blocks = 1_000
        await register_model(
            ModelInput.Tokens,
            ModelType.Chat,
            endpoint,
            model_dir,
            "m",
            worker_type=WorkerType.Aggregated,
            kv_cache_block_size=SIZE,
            runtime_config=config,
            ignore_weights=True,
        )
        client = await endpoint.client()
        await client.wait_for_instances()
        dynamo = cls(endpoint, publisher)
        async with asyncio.timeout(40):
            # What it is not subscribed to yet is lost.
            while not await dynamo.match(dynamo.mark()):
                await asyncio.sleep(0.05)
        return dynamo

    def with_another_router(self) -> Dynamo:
        """The same worker, and a router that has seen nothing of it."""
        return Dynamo(self._endpoint, self.publisher)

    async def match(self, token_ids: list[int]) -> int:
        found = await self._router.get_overlap_scores(token_ids)
        return max((worker["device_blocks"] for worker in found["workers"]), default=0)

    async def settled(self) -> None:
        """Return when the router has seen what was published until now: a last block of our own shows it.

        What was published before the router's subscription stood is lost. The router notices by the
        number of the next event, and then asks for what it missed; so there is a next one after a while.
        """
        async with asyncio.timeout(40):
            while not await self._seen(self.mark(), 1.0):
                pass

    def mark(self) -> list[int]:
        """Publish a block of our own; its tokens."""
        number = 1_000_000 + next(self._numbers)
        token_ids = [number] * SIZE
        event = {
            "type": "stored",
            "token_ids": token_ids,
            "num_block_tokens": [SIZE],
            "block_hashes": [number],
        }
        self.publisher.publish_batch([event])
        return token_ids

    async def _seen(self, token_ids: list[int], within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                while not await self.match(token_ids):
                    await asyncio.sleep(0.001)
        except TimeoutError:
            return False
        return True


async def play(dynamo: Dynamo, mode: str, steps: list[list[Any]], clean_up: bool = True) -> list[int]:
    """How many prompts are scored wrongly after each step, the last of which removes everything."""
    layout = layout_of(2, None)
    held, feed = Held(layout, mode), RankFeed(Projection(mode, layout), dynamo.publisher)
    wrong: list[int] = []
    for step in [*steps, *[["epoch"]] * clean_up]:
        match step:
            case "store", groups, path, first:
                shown = [event for group in groups for event in held.store(group, path, first)]
            case "remove", group, *paths:
                shown = held.remove(group, *paths)
            case _:
                shown = held.begin()
        for event in shown:
            if isinstance(event, tuple):
                feed.projection.learn(*event)
        feed.batch(SOURCE, Batch(VERSION, 1, 0, 0, tuple(e for e in shown if not isinstance(e, tuple))))
        await dynamo.settled()
        prompts = {path + more for path in held.known for more in ("", "~")}
        wrong.append(sum([held.match(each) != await dynamo.match(tokens_of(each)) for each in prompts]))
    return wrong


async def hybrid(dynamo: Dynamo, seed: int) -> list[int]:
    """How many sequences are scored wrongly after each request to a worker with blocks of several sizes."""
    worker = HybridWorker(MIXED, seed)
    feed, wrong = RankFeed(worker.projection, dynamo.publisher), []
    for _ in range(10):
        shown: list[Event] = []
        worker.serve(shown.append)
        feed.batch(SOURCE, Batch(VERSION, 1, 0, 0, tuple(shown)))
        await dynamo.settled()
        published = worker.published()
        wrong.append(
            sum([worker.match(each, published) != await dynamo.match(each) for each in worker.served])
        )
    return [*wrong, worker.projection.published]


async def doubled_store(dynamo: Dynamo) -> int:
    """Without the projection: blocks promised of eight, the last of which is gone."""

    def stored(first: int, last: int) -> dict[str, Any]:
        blocks = list(range(first, last + 1))
        token_ids = [500_000 + block for block in blocks for _ in range(SIZE)]
        parent = None if first == 1 else first - 1
        sizes = [SIZE] * len(blocks)
        return {
            "type": "stored",
            "token_ids": token_ids,
            "num_block_tokens": sizes,
            "block_hashes": blocks,
            "parent_hash": parent,
        }

    def removed(*blocks: int) -> dict[str, Any]:
        return {"type": "removed", "block_hashes": list(blocks)}

    for event in (
        stored(1, 8),
        removed(4),
        stored(4, 8),
        removed(8, 7, 6, 5, 4),
        stored(4, 8),
        removed(8),
    ):
        dynamo.publisher.publish_batch([event])
    await dynamo.settled()
    return await dynamo.match(stored(1, 8)["token_ids"])


async def main(model_dir: str) -> None:
    scripts = json.load(sys.stdin)
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    endpoint = runtime.endpoint("lab.backend.generate")

    async def generate(request: Any, context: Any) -> Any:
        yield {}

    async def serving() -> None:
        await endpoint.serve_endpoint(generate)

    task = asyncio.create_task(serving())
    dynamo = await Dynamo.start(runtime, model_dir)
    await play(dynamo, "boundary", [["store", [0, 1], "Z" * 3, 0]], clean_up=False)
    found: dict[str, Any] = {
        name: await play(dynamo, script["mode"], script["steps"]) for name, script in scripts.items()
    }
    found["several sizes"] = await hybrid(dynamo, 8)
    found["doubled store"] = await doubled_store(dynamo)
    await (later := dynamo.with_another_router()).settled()
    found["a later router"] = await later.match(tokens_of("Z" * 3))
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    runtime.shutdown()
    await asyncio.wait({task}, timeout=5)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
