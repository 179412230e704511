"""Processes of bench_router.py: an echo worker for all alike, our router with its meters, and a relay.

python benchmarks/router_sides.py worker|router|relay JSON
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.dynamo.client import Call
from vswa_plugin.dynamo.names import EndpointName, default_endpoint
from vswa_plugin.dynamo.runtime import connect, run_on_uvloop
from vswa_plugin.engine.contract import BlocksStored, EngineBlock, EngineEvent
from vswa_plugin.host.loading import load_host
from vswa_plugin.program.life import Life
from vswa_plugin.publishing.publisher import Publisher
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.registry import Entry
from vswa_plugin.registry.opening import registry_from_env
from vswa_plugin.router.app import Router
from vswa_plugin.router.args import parse
from vswa_plugin.wire.events import ReuseReport, Source
from vswa_plugin.wire.subjects import subject
from vswa_plugin.wire.transport import Transport

BLOCK, MODEL, WORKERS = 32, "echo", "bench-workers"


class Direct:
    """The adapter of events that are ours already."""

    def feed(self, raw: Any) -> list[EngineEvent]:
        return [raw["event"]]


class EchoWorker:
    """Repeats the prompt, as fast as it can or at ``x-dynamo-meta-pace`` tokens a second.

    What it "holds" it tells both Dynamo's event plane and ours, and keeps for ever.
    """

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path
        self._layout = CacheLayout(
            (CacheGroup(0, 512, BLOCK), CacheGroup(1, None, BLOCK)), "trtllm_v2", MODEL
        )
        self._held: set[int] = set()
        self._stop = asyncio.Event()

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        transport, registry = Transport(os.environ["NATS_SERVER"]), registry_from_env()
        await transport.connect()
        runtime = connect()
        name = default_endpoint("agg", WORKERS)
        endpoint = runtime.endpoint(str(name))
        worker_id = int(endpoint.connection_id())
        await self._publish(transport, endpoint, Source(name.namespace, name.component, worker_id, 0))

        async def serve() -> None:
            await endpoint.serve_endpoint(self.generate, graceful_shutdown=True)

        serving = asyncio.create_task(serve())
        await self._register(endpoint)
        await registry.join(self._entry(name, worker_id))
        await self._stop.wait()
        await registry.close()
        runtime.shutdown()
        await asyncio.wait({serving}, timeout=10)
        self._ours.close()
        await self._publishing
        await transport.close()
        return 0

    async def _publish(self, transport: Transport, endpoint: Any, source: Source) -> None:
        from dynamo.llm import KvEventPublisher

        async def send(payload: bytes) -> None:
            await transport.publish(subject(source, "events"), payload)

        self._ours = Publisher(source, Direct(), Residency(self._layout), send, lambda *_: None)
        self._dynamos = KvEventPublisher(
            endpoint=endpoint, kv_block_size=BLOCK, dp_rank=0, enable_local_indexer=True
        )
        await transport.serve(subject(source, "control"), self._ours.answer)
        self._publishing = asyncio.create_task(self._ours.run())

    async def _register(self, endpoint: Any) -> None:
        from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model

        config = ModelRuntimeConfig()
        config.total_kv_blocks = 100_000
        config.enable_local_indexer = True
        await register_model(
            ModelInput.Tokens,
            ModelType.Chat | ModelType.Completions,
            endpoint,
            self._model_path,
            MODEL,
            worker_type=WorkerType.Aggregated,
            kv_cache_block_size=BLOCK,
            runtime_config=config,
            ignore_weights=True,
        )

    def _entry(self, name: EndpointName, worker_id: int) -> Entry:
        return Entry(
            namespace=name.namespace,
            component=name.component,
            worker_id=worker_id,
            mode="agg",
            engine="echo",
            served_model_name=MODEL,
            model_path=self._model_path,
            context_length=8_192,
            block_size=BLOCK,
            rule=self._layout.rule,
            hash_scheme=self._layout.hash_scheme,
            groups=self._layout.groups,
            epochs={0: self._ours.ledger.epoch},
            total_kv_blocks=100_000,
            pid=os.getpid(),
        )

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        prompt = request["token_ids"]
        cached = self._take(prompt)
        pace = float(context.metadata.get("pace", "0"))
        count = request["stop_conditions"]["max_tokens"]
        began = time.monotonic()
        for done in range(count):
            if pace and (wait := began + done / pace - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            chunk: dict[str, Any] = {"token_ids": [prompt[done % len(prompt)]], "index": 0}
            if done == count - 1:
                usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
                usage |= {"total_tokens": len(prompt) + count}
                details = {"prompt_tokens_details": {"cached_tokens": cached}}
                chunk |= {"finish_reason": "length", "completion_usage": usage | details}
            yield chunk
        self._ours.report(ReuseReport(context.id(), len(prompt), cached))

    def _take(self, prompt: list[int]) -> int:
        hashes = sequence_hashes_of_tokens(prompt, BLOCK)
        known = next((at for at, name in enumerate(hashes) if name not in self._held), len(hashes))
        if new := list(hashes[known:]):
            self._held.update(new)
            parent = hashes[known - 1] if known else None
            tokens = prompt[known * BLOCK : len(hashes) * BLOCK]
            blocks = tuple(
                EngineBlock(name, tuple(tokens[n * BLOCK : (n + 1) * BLOCK])) for n, name in enumerate(new)
            )
            self._ours.offer([{"event": BlocksStored(group, parent, blocks)} for group in (0, 1)])
            signed = [name - (1 << 64) if name >> 63 else name for name in new]
            above = parent - (1 << 64) if parent is not None and parent >> 63 else parent
            self._dynamos.publish_stored(tokens, [BLOCK] * len(new), signed, parent_hash=above)
        return min(known * BLOCK, len(prompt) - 1)


async def router(options: dict[str, Any]) -> int:
    """Our router; at each SIGUSR1 it writes its meters to ``options["meters"]``."""
    args = parse([*options["arguments"]])
    with load_host() as host:
        life = Life("vswa router")
        made = Router(args, host, registry_from_env(), life)

        def write() -> None:
            durations, used = made.decider.durations.values(), resource.getrusage(resource.RUSAGE_SELF)
            found = {
                "decisions": sum(each.count for each in durations),
                "decision_s": sum(each.sum for each in durations),
                "cpu_s": used.ru_utime + used.ru_stime,
                "main_thread_cpu_s": time.thread_time(),
                "exact": sum(rank.exact for rank in made.promises.ranks.values()),
                "wrong": sum(rank.over + rank.under for rank in made.promises.ranks.values()),
            }
            path = Path(options["meters"])
            path.with_suffix(".new").write_text(json.dumps(found))
            path.with_suffix(".new").rename(path)

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, write)
        return await life.run(made)


async def relay(arguments: list[str]) -> int:
    """Our router without a choice (a family of prompts has its worker): what a second hop in Python costs."""
    args = parse(arguments)
    with load_host() as host:
        life = Life("vswa router")
        made = Router(args, host, registry_from_env(), life)

        async def passed_on(
            request: dict[str, Any], call: Call, shown: str | None = None
        ) -> AsyncIterator[dict[str, Any]]:
            client = next(iter(made.forwarder.models[request["model"]].clients.values()))
            workers = sorted(client.instance_ids())
            worker_id = workers[hash(tuple(request["token_ids"][:64])) % len(workers)]
            async for chunk in client.generate(request, worker_id, call):
                yield chunk

        made.forwarder.forward = passed_on
        return await life.run(made)


def main() -> int:
    side, options = sys.argv[1], json.loads(sys.argv[2])
    if side == "worker":
        return run_on_uvloop(EchoWorker(options["model_path"]).run())
    if side == "relay":
        return run_on_uvloop(relay(options["arguments"]))
    if profile := os.environ.get("BENCH_PROFILE"):
        import cProfile

        with cProfile.Profile() as taken:
            code = run_on_uvloop(router(options))
        taken.dump_stats(profile)
        return code
    return run_on_uvloop(router(options))


if __name__ == "__main__":
    sys.exit(main())
