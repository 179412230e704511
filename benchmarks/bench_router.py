"""What our routers cost a request: against Dynamo's own KV router and round robin, over the same workers.

    python benchmarks/bench_router.py [--short] [--json FILE]

Two echo workers behind six data paths:

    round_robin     client - Dynamo's frontend - worker
    dynamo_kv       the same, and Dynamo's KV router in the frontend chooses
    envoy           client - Envoy - frontend - worker
    picker          the same, and our picker chooses beside it
    relay           client - frontend - our router without a choice - worker
    exact           client - frontend - our router - worker

The frontend behind both Envoys is the same one. In each round all paths are measured, in changing order;
given are medians over the rounds, and of what compares two paths those of each round. The CPU of a path is
that of all its processes (workers, frontend, Envoy, router, picker), per token; the client's is not in it.

a) full speed: time to first token of one stream at a time, and tokens a second of 8 streams at once;
b) 64 streams at 50 tokens a second each: the rate that arrives, and how much of our router's CPU is scoring.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

from vswa_plugin.dynamo.names import LOOPBACK_ENV
from vswa_plugin.launch.brokers import start_etcd, start_nats
from vswa_plugin.launch.cluster import PEEK_ENV
from vswa_plugin.launch.envoy import Address, EnvoySettings, envoy_config, find_envoy
from vswa_plugin.launch.processes import Child, free_port, python_module

MODEL, WORKERS, FRONT, RELAYED = "echo", "bench-workers", "bench-front", "bench-relay"
KINDS = ("round_robin", "dynamo_kv", "envoy", "picker", "relay", "exact")
#: (path, what it is compared with)
PAIRS = (
    ("exact", "round_robin"),
    ("exact", "dynamo_kv"),
    ("exact", "relay"),
    ("picker", "envoy"),
    ("picker", "round_robin"),
    ("picker", "dynamo_kv"),
    ("picker", "exact"),
)
STREAMS, PACE = 64, 50


class Prompts:
    """Families that share most of their tokens; each prompt is new at its end."""

    def __init__(self) -> None:
        rng = random.Random(7)
        words = ["alpha", "river", "stone", "cloud", "seven", "light", "table", "green"]
        self._families = [" ".join(rng.choices(words, k=300)) for _ in range(16)]
        self._number = 0

    def next(self) -> str:
        self._number += 1
        family = self._families[self._number % len(self._families)]
        return f"{family} {' '.join(str(self._number * 7_919 + n) for n in range(12))}"


class Fleet:
    """All processes; ``urls`` by kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.urls: dict[str, str] = {}
        self.children: list[Child] = []
        self.brokers: list[Child] = []
        self.router: Child
        #: By path: the processes that a request passes or that choose for it.
        self.passes: dict[str, list[Child]] = {}
        self._env: dict[str, str] = {}

    async def start(self) -> None:
        model = self.folder / "model"
        make_checkpoint(model)
        nats, nats_server = await start_nats(self.folder)
        etcd, endpoints = await start_etcd(self.folder, self.folder / "data")
        self.brokers = [nats, etcd]
        self._env = {
            **LOOPBACK_ENV,
            "NATS_SERVER": nats_server,
            "ETCD_ENDPOINTS": endpoints,
            "DYN_LOG": "error",
        }
        workers = [
            await self._child(f"worker-{number}", *side("worker", model_path=str(model)))
            for number in range(2)
        ]
        arguments = ["--endpoint", f"dyn://{RELAYED}.router.generate", "--namespace", WORKERS]
        relay = await self._child("relay", *side("relay", arguments=arguments))
        arguments[1] = f"dyn://{FRONT}.router.generate"
        meters = str(self.folder / "meters")
        self.router = await self._child("router", *side("router", arguments=arguments, meters=meters))
        for kind, mode, space in (
            ("round_robin", "round-robin", WORKERS),
            ("dynamo_kv", "kv", WORKERS),
            ("relay", "round-robin", RELAYED),
            ("exact", "round-robin", FRONT),
        ):
            port = free_port()
            self.urls[kind] = f"http://127.0.0.1:{port}"
            where = ("--http-port", str(port), "--router-mode", mode, "--namespace", space)
            child = await self._child(f"frontend-{kind}", *python_module("vswa_plugin.frontend", *where))
            await child.until(partial(_serves, self.urls[kind]), "serving", 40)
            chooses = {"relay": [relay], "exact": [self.router]}.get(kind, [])
            self.passes[kind] = [*workers, child, *chooses]
        await self._start_gateways(workers)

    async def _start_gateways(self, workers: list[Child]) -> None:
        """Two Envoys before one frontend, one of them with a picker."""
        behind, grpc = Address("127.0.0.1", free_port()), Address("127.0.0.1", free_port())
        where = ("--http-port", str(behind.port), "--namespace", WORKERS)
        frontend = await self._child(
            "frontend-gateway", *python_module("vswa_plugin.frontend", *where), env=PEEK_ENV
        )
        options = ("--namespace", WORKERS, "--grpc-port", str(grpc.port))
        picker = await self._child("picker", *python_module("vswa_plugin", "picker", *options))
        for kind, pickers in (("envoy", ()), ("picker", (grpc,))):
            listen = Address("127.0.0.1", free_port())
            config = self.folder / f"{kind}.json"
            # Closed: where the picker does not answer, this shall not be measured as if it did.
            config.write_text(
                json.dumps(envoy_config(EnvoySettings(listen, (behind,), pickers, closed=True)))
            )
            command = [find_envoy(), "-c", str(config), "--disable-hot-restart", "--log-level", "error"]
            child = await self._child(f"envoy-{kind}", *command)
            self.urls[kind] = f"http://127.0.0.1:{listen.port}"
            await child.until(partial(_serves, self.urls[kind]), "serving", 40)
            self.passes[kind] = [*workers, frontend, child, *([picker] if pickers else [])]

    def cpu_s(self, kind: str) -> float:
        """Spent by all processes of a path until now."""
        times = [psutil.Process(child.pid).cpu_times() for child in self.passes[kind]]
        return sum(each.user + each.system for each in times)

    async def _child(self, name: str, *command: str, env: Mapping[str, str] | None = None) -> Child:
        child = await Child.start(name, command, self.folder, {**self._env, **(env or {})})
        self.children.append(child)
        return child

    async def meters(self) -> dict[str, float]:
        """Of the router's process, now."""
        path = self.folder / "meters"
        path.unlink(missing_ok=True)
        os.kill(self.router.pid, signal.SIGUSR1)
        await self.router.until(lambda: asyncio.to_thread(path.exists), "telling its meters", 10)
        found: dict[str, float] = json.loads(path.read_text())
        return found

    async def stop(self) -> None:
        await asyncio.gather(*(child.stop() for child in self.children))
        for broker in reversed(self.brokers):
            await broker.stop()


def side(name: str, **options: Any) -> list[str]:
    """The command of a process of router_sides.py."""
    return [sys.executable, str(Path(__file__).with_name("router_sides.py")), name, json.dumps(options)]


async def _serves(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as session:
            await stream(session, url, "hello", 1)
    except (aiohttp.ClientError, OSError, RuntimeError):
        return False
    return True


async def stream(
    session: aiohttp.ClientSession, url: str, prompt: str, tokens: int, pace: int = 0
) -> tuple[float, float]:
    """Seconds to the first and to the last token of one answer."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    headers = {"x-dynamo-meta-pace": str(pace)} if pace else {}
    began, first, tail = time.perf_counter(), 0.0, b""
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url}: {answer.status} {await answer.text()}")
        async for data in answer.content.iter_any():
            if b'data: {"error"' in data:
                raise RuntimeError(f"{url}: {data.decode()}")
            first = first or time.perf_counter() - began
            tail = (tail + data)[-2_000:]
    # Tokens, not chunks: a router may pass several on at once.
    if b'"completion_tokens":%d,' % tokens not in tail:
        raise RuntimeError(f"{url}: expected {tokens} tokens, got {tail!r}")
    return first, time.perf_counter() - began


Measure = Callable[[aiohttp.ClientSession, str, Prompts], Any]


async def time_to_first_token(session: aiohttp.ClientSession, url: str, prompts: Prompts) -> float:
    """Milliseconds, the median of 40 requests one after the other."""
    times = [(await stream(session, url, prompts.next(), 2))[0] for _ in range(40)]
    return statistics.median(times) * 1e3


async def full_speed(session: aiohttp.ClientSession, url: str, prompts: Prompts) -> float:
    """Tokens a second of 8 streams of 500."""
    began = time.perf_counter()
    await asyncio.gather(*(stream(session, url, prompts.next(), 500) for _ in range(8)))
    return 8 * 500 / (time.perf_counter() - began)


async def paced(session: aiohttp.ClientSession, url: str, prompts: Prompts) -> float:
    """Tokens a second per stream, waiting for the first one included; median of 64 streams of 4 s."""
    tokens = 4 * PACE

    async def one(number: int) -> float:
        await asyncio.sleep(number / STREAMS)
        _, last = await stream(session, url, prompts.next(), tokens, PACE)
        return (tokens - 1) / last

    return statistics.median(await asyncio.gather(*map(one, range(STREAMS))))


#: Tokens of one run of a measure.
TOKENS = {
    "first_token_ms": 40 * 2,
    "full_speed_tokens_per_s": 8 * 500,
    "paced_tokens_per_s": STREAMS * 4 * PACE,
}
MEASURES: Mapping[str, Measure] = {
    "first_token_ms": time_to_first_token,
    "full_speed_tokens_per_s": full_speed,
    "paced_tokens_per_s": paced,
}


async def measure(fleet: Fleet, rounds: int) -> dict[str, Any]:
    prompts = Prompts()
    found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in MEASURES}
    cpu: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in MEASURES}
    meters: list[dict[str, float]] = []
    # A connection a request: on one that is kept, a first token of so few bytes can wait 40 ms for the
    # acknowledgement of the headers before it.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        for kind in KINDS:
            await full_speed(session, fleet.urls[kind], prompts)
        for number in range(rounds):
            for name, take in MEASURES.items():
                first = number % len(KINDS)
                for kind in (*KINDS[first:], *KINDS[:first]):
                    before, cpu_before = await fleet.meters(), fleet.cpu_s(kind)
                    found[name][kind].append(await take(session, fleet.urls[kind], prompts))
                    cpu[name][kind].append((fleet.cpu_s(kind) - cpu_before) / TOKENS[name] * 1e6)
                    if kind == "exact" and name == "paced_tokens_per_s":
                        after = await fleet.meters()
                        meters.append({each: after[each] - before[each] for each in after})
                say(name, {kind: values[-1] for kind, values in found[name].items()})
    spent = {
        name: {kind: round(statistics.median(values), 1) for kind, values in sides.items()}
        for name, sides in cpu.items()
    }
    return {**summary(found), "cpu_us_per_token": spent, "paced_router": scoring(meters)}


def summary(found: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """Medians of all rounds, and what is compared."""
    medians = {
        name: {kind: round(statistics.median(values), 3) for kind, values in sides.items()}
        for name, sides in found.items()
    }

    def pairs(name: str, pair: tuple[str, str], compare: Callable[[float, float], float]) -> float:
        ours, theirs = (found[name][kind] for kind in pair)
        return round(statistics.median(map(compare, ours, theirs)), 3)

    compared = {
        f"{pair[0]}_against_{pair[1]}": {
            "added_first_token_ms": pairs("first_token_ms", pair, lambda ours, theirs: ours - theirs),
            "full_speed": pairs("full_speed_tokens_per_s", pair, lambda ours, theirs: ours / theirs),
            "paced": pairs("paced_tokens_per_s", pair, lambda ours, theirs: ours / theirs),
        }
        for pair in PAIRS
    }
    rounded = {
        name: {kind: [round(value, 3) for value in values] for kind, values in sides.items()}
        for name, sides in found.items()
    }
    return {"medians": medians, **compared, "rounds": rounded}


def scoring(meters: list[dict[str, float]]) -> dict[str, float]:
    """What our router spent in (b)."""
    total = {name: sum(each[name] for each in meters) for name in meters[0]}
    return {
        "decisions": total["decisions"],
        "decision_us": round(total["decision_s"] / total["decisions"] * 1e6, 1),
        "scoring_share_of_cpu": round(total["decision_s"] / total["cpu_s"], 4),
        "cpu_us_per_token": round(total["cpu_s"] / (len(meters) * STREAMS * 4 * PACE) * 1e6, 1),
        "predictions_exact": total["exact"],
        "predictions_wrong": total["wrong"],
    }


def say(name: str, values: Mapping[str, float]) -> None:
    shown = "   ".join(f"{kind} {value:10.2f}" for kind, value in values.items())
    print(f"{name:24s} {shown}", file=sys.stderr, flush=True)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder))
        try:
            await fleet.start()
            found = await measure(fleet, 3 if args.short else args.rounds)
        finally:
            await fleet.stop()
    return {
        "date": date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": os.getloadavg()[0],
        **found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="three rounds")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds (9)")
    parser.add_argument("--json", metavar="FILE", help="write the result; - for standard output")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    text = json.dumps(result, indent=1)
    if args.json and args.json != "-":
        Path(args.json).write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
