"""How long until a router sees a block that an engine has stored: publish -> visible, ours and Dynamo's own.

One run, one nats-server; publisher and router are processes of their own on both sides. Ours: the engine's
thread hands an event over, until the window index of another process has applied it. Dynamo's:
``KvEventPublisher.publish_stored`` until ``KvRouter.get_overlap_scores`` of another process shows it (polled,
which costs it about 0.05 ms).

    python benchmarks/bench_stream.py --json benchmarks/results/bench_stream.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from vswa_plugin.dynamo.names import LOOPBACK_ENV
from vswa_plugin.launch.brokers import start_etcd, start_nats

BLOCK = 32
WARM_UP = 50


# -- ours: the two processes -----------------------------------------------------------------------


async def publish_ours(nats_server: str, events: int, pause_s: float) -> list[int]:
    from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
    from vswa_plugin.engine.contract import BlocksStored, EngineBlock, EngineEvent
    from vswa_plugin.publishing.publisher import Publisher
    from vswa_plugin.publishing.residency import Residency
    from vswa_plugin.wire.events import Source
    from vswa_plugin.wire.subjects import subject
    from vswa_plugin.wire.transport import Transport

    class Direct:
        def feed(self, raw: Mapping[str, Any]) -> list[EngineEvent]:
            return [raw["event"]]

    layout = CacheLayout((CacheGroup(0, 512, BLOCK), CacheGroup(1, None, BLOCK)), "trtllm_v2", "m")
    source = Source("bench", "backend", 1)
    transport = Transport(nats_server, echo=False)
    await transport.connect()

    async def send(payload: bytes) -> None:
        await transport.publish(subject(source, "events"), payload)

    publisher = Publisher(
        source, Direct(), Residency(layout), send, lambda *_: None, ready=lambda: transport.ready
    )
    task = asyncio.create_task(publisher.run())
    offered: list[int] = []

    def engine() -> None:
        for number in range(events):
            time.sleep(pause_s)
            stored = [
                BlocksStored(group, None, (EngineBlock(number, (number,) * BLOCK),)) for group in (0, 1)
            ]
            offered.append(time.monotonic_ns())
            publisher.offer([{"event": each} for each in stored])

    thread = threading.Thread(target=engine)
    thread.start()
    await asyncio.to_thread(thread.join)
    await asyncio.sleep(0.2)
    publisher.close()
    await task
    await transport.close()
    return offered


async def follow_ours(nats_server: str, events: int, ready: Callable[[], None]) -> list[int]:
    from vswa_plugin.following.subscriber import Subscriber
    from vswa_plugin.index import WindowIndex
    from vswa_plugin.wire.events import Event, Rank, Stored
    from vswa_plugin.wire.transport import Transport

    seen: list[int] = []
    done = asyncio.Event()

    class Noted(WindowIndex):
        def apply(self, rank: Rank, event: Event) -> None:
            super().apply(rank, event)
            if isinstance(event, Stored) and event.group_id == 1:
                seen.append(time.monotonic_ns())
                if len(seen) == events:
                    done.set()

    transport = Transport(nats_server)
    await transport.connect()
    subscriber = Subscriber(transport, Noted(), namespace="bench")
    await subscriber.start()
    ready()
    async with asyncio.timeout(60):
        await done.wait()
    await subscriber.stop()
    await transport.close()
    return seen


# -- Dynamo's --------------------------------------------------------------------------------------


def tokens_of(number: int) -> list[int]:
    return [number + 1] * BLOCK


async def publish_dynamos(_: str, events: int, pause_s: float) -> list[int]:
    from dynamo.llm import (
        KvEventPublisher,
        ModelInput,
        ModelRuntimeConfig,
        ModelType,
        WorkerType,
        register_model,
    )
    from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

    runtime, endpoint = _dynamo_endpoint()

    async def generate(request: Any, context: Any) -> Any:
        yield {}

    async def serving() -> None:
        await endpoint.serve_endpoint(generate)

    task = asyncio.create_task(serving())
    publisher = KvEventPublisher(endpoint=endpoint, kv_block_size=BLOCK, enable_local_indexer=True)
    config = ModelRuntimeConfig()
    config.enable_local_indexer = True
    config.total_kv_blocks = 100_000
    model = Path(tempfile.mkdtemp(prefix="vswa-bench-model-")) / "gemma"
    make_checkpoint(model)  # Dynamo's router indexes the events of registered models only
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat,
        endpoint,
        str(model),
        "bench",
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=BLOCK,
        runtime_config=config,
        ignore_weights=True,
    )
    await asyncio.sleep(3)  # the router has to find this worker; nothing tells when it has
    offered = []
    for number in range(events):
        await asyncio.sleep(pause_s)
        offered.append(time.monotonic_ns())
        publisher.publish_stored(tokens_of(number), [BLOCK], [number + 1])
    await asyncio.sleep(0.5)
    runtime.shutdown()
    await asyncio.wait({task}, timeout=5)
    return offered


async def follow_dynamos(_: str, events: int, ready: Callable[[], None]) -> list[int]:
    from dynamo.llm import KvRouter, KvRouterConfig

    runtime, endpoint = _dynamo_endpoint()
    ready()
    client = await endpoint.client()
    await client.wait_for_instances()
    router = KvRouter(endpoint, BLOCK, KvRouterConfig())
    seen = []
    for number in range(events):
        deadline = time.monotonic() + 30
        while not _overlap(await router.get_overlap_scores(tokens_of(number))):
            if time.monotonic() > deadline:
                raise SystemExit(f"Dynamo's router never saw event {number}")
        seen.append(time.monotonic_ns())
    runtime.shutdown()
    return seen


def _dynamo_endpoint() -> tuple[Any, Any]:
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", "tcp")
    return runtime, runtime.endpoint("benchdyn.backend.generate")


def _overlap(scores: Any) -> bool:
    """Whether any worker holds the block, in whatever shape this version answers."""
    return any(str(value) not in ("0", "0.0") for value in _numbers(scores))


def _numbers(found: Any) -> list[Any]:
    text = json.loads(found) if isinstance(found, str) else found
    workers = text.get("workers", text.get("scores", [])) if isinstance(text, dict) else text
    if isinstance(workers, dict):
        return list(workers.values())
    return [each.get("device_blocks", each.get("score", 0)) for each in workers]


# -- the run ---------------------------------------------------------------------------------------

ROLES: dict[str, Callable[..., Awaitable[list[int]]]] = {
    "publish-ours": publish_ours,
    "publish-dynamos": publish_dynamos,
    "follow-ours": follow_ours,
    "follow-dynamos": follow_dynamos,
}


def run_role(role: str, nats_server: str, events: int, pause_s: float) -> None:
    """A child: prints ``ready`` where it is a follower, then its times as JSON."""
    import uvloop

    argument: Any = (lambda: print("ready", flush=True)) if role.startswith("follow") else pause_s
    print(json.dumps(uvloop.run(ROLES[role](nats_server, events, argument))), flush=True)


def measure(side: str, nats_server: str, env: dict[str, str], events: int, pause_s: float) -> list[float]:
    """Milliseconds from publish to visible, without the warm-up."""

    def child(role: str) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "--role", role, "--nats", nats_server]
        command += ["--events", str(events), "--pause", str(pause_s)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)

    with child(f"follow-{side}") as follower:
        assert follower.stdout is not None
        if follower.stdout.readline().strip() != "ready":
            raise SystemExit(f"{side}: the follower did not start")
        with child(f"publish-{side}") as publisher:
            assert publisher.stdout is not None
            offered = json.loads(publisher.stdout.readline())
        seen = json.loads(follower.stdout.readline())
    return [(then - at) / 1e6 for at, then in zip(offered, seen, strict=True)][WARM_UP:]


def figures(latencies: list[float]) -> dict[str, float]:
    ordered = sorted(latencies)
    return {
        "p50_ms": round(statistics.median(ordered), 3),
        "p90_ms": round(ordered[len(ordered) * 9 // 10], 3),
        "p99_ms": round(ordered[len(ordered) * 99 // 100], 3),
    }


async def main(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="vswa-bench-") as folder:
        nats, nats_server = await start_nats(Path(folder))
        etcd, etcd_endpoints = await start_etcd(Path(folder), Path(folder) / "etcd")
        env = {**os.environ, **LOOPBACK_ENV, "NATS_SERVER": nats_server, "ETCD_ENDPOINTS": etcd_endpoints}
        env["DYN_LOG"] = "error"
        try:
            paces = {}
            for pause in args.pauses:
                found: dict[str, Any] = {}
                for side in ("ours", "dynamos"):
                    print(
                        f"{side}: {args.events} events, {pause * 1000:g} ms apart",
                        file=sys.stderr,
                        flush=True,
                    )
                    latencies = await asyncio.to_thread(
                        measure, side, nats_server, env, args.events + WARM_UP, pause
                    )
                    found[side] = figures(latencies)
                ratio = round(found["ours"]["p50_ms"] / found["dynamos"]["p50_ms"], 2)
                paces[f"{pause * 1000:g} ms apart"] = {**found, "ratio_p50": ratio}
        finally:
            await etcd.stop()
            await nats.stop()
    return {
        "question": "publish -> visible, one block at a time over NATS",
        "command": shlex.join(["python", "benchmarks/bench_stream.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "events": args.events,
        "load_average_at_end": round(os.getloadavg()[0], 2),
        **paces,
    }


def _seconds(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=500, help="events measured (500)")
    parser.add_argument(
        "--pauses", type=_seconds, default="0.001,0.002,0.005", help="seconds between events, each a run"
    )
    parser.add_argument("--pause", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--nats", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        run_role(given.role, given.nats, given.events, given.pause)
    else:
        result = asyncio.run(main(given))
        print(json.dumps(result, indent=2))
        if given.json:
            Path(given.json).write_text(json.dumps(result, indent=2) + "\n")
