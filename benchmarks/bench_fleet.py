"""What does an idle fleet cost a router? CPU of following ranks that only beat; and how soon silence is seen.

    python benchmarks/bench_fleet.py [--json benchmarks/results/bench_fleet.json] [--short]

One nats-server. One process publishes the heartbeats of all ranks, each once a second and evenly spread,
after a layout and a few blocks of each. A second process follows them as a router does: a subscriber with a
window index, on uvloop. A third one takes the same messages at the same time with the NATS client alone and
only counts them: what any router in Python pays. Shares are CPU time of a process by the clock, so that
other work on the machine counts little. At the end all ranks stop at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.dynamo.names import LOOPBACK_ENV
from vswa_plugin.following.subscriber import Subscriber
from vswa_plugin.index import WindowIndex
from vswa_plugin.launch.brokers import start_nats
from vswa_plugin.wire.events import VERSION, Batch, Event, Source, Stored, encode, layout_event
from vswa_plugin.wire.subjects import events_of, subject
from vswa_plugin.wire.transport import Transport

RANKS, SHORT_RANKS = (64, 1024, 2000), (64, 1024)
SECONDS, SHORT_SECONDS = 15.0, 5.0
#: Of one core, for the last of RANKS.
GOAL_PERCENT = 5.0
NAMESPACE = "bench"
LAYOUT = CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 32)), "trtllm_v2", "m")
BLOCKS = 16
#: Heartbeats are published in steps: together, those of the ranks whose moment has come.
STEPS = 100
#: Longer than a heartbeat, after the last rank is known: what began with the ranks has ended.
SETTLE_S = 2.0
#: How often the follower looks whether ranks are silent by now, once they have stopped.
LOOK_S = 0.01
PATIENCE_S = 60.0


# -- the processes ---------------------------------------------------------------------------------


async def publish(nats_server: str, ranks: int, seconds: float) -> dict[str, float]:
    """Heartbeats until a line comes on standard input; when they stopped."""
    transport = Transport(nats_server, echo=False)
    await transport.connect()
    subjects = [subject(Source(NAMESPACE, "backend", number), "events") for number in range(ranks)]
    for number, to_subject in enumerate(subjects):
        hashes = tuple(range(number * BLOCKS, (number + 1) * BLOCKS))
        stored = [Stored(group.group_id, 0, None, hashes) for group in LAYOUT.groups]
        await transport.publish(to_subject, _batch(0, layout_event(LAYOUT, 1.0), *stored))
    await transport.flush()
    print("announced", flush=True)
    stop = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    began, step = time.monotonic(), 0
    while not stop.done():
        for to_subject in subjects[ranks * (step % STEPS) // STEPS : ranks * (step % STEPS + 1) // STEPS]:
            await transport.publish(to_subject, _batch(3))
        step += 1
        await asyncio.sleep(began + step / STEPS - time.monotonic())
    stopped = time.monotonic()
    await transport.close()
    return {"stopped": stopped}


def _batch(first_event_id: int, *events: Event) -> bytes:
    return encode(Batch(VERSION, 1, first_event_id, time.time_ns(), events))


async def follow(nats_server: str, ranks: int, seconds: float) -> dict[str, float]:
    """CPU share as a router; then when the first and the last rank were not scored any more."""
    transport, index = Transport(nats_server), WindowIndex()
    await transport.connect()
    subscriber = Subscriber(transport, index, namespace=NAMESPACE)
    await subscriber.start()
    print("ready", flush=True)
    await _until(lambda: index.stats().scored == ranks, "every rank is known")
    measured = await _cpu(lambda: subscriber.stats.messages, seconds)
    if index.stats().scored != ranks or subscriber.stats.requests:
        raise SystemExit(f"expected {ranks} idle ranks, got {index.stats()} and {subscriber.stats}")
    print("measured", flush=True)
    await _until(lambda: index.stats().scored < ranks, "a rank is silent")
    first = time.monotonic()
    await _until(lambda: index.stats().scored == 0, "every rank is silent")
    last = time.monotonic()
    await subscriber.stop()
    await transport.close()
    return {**measured, "first_silent": first, "last_silent": last}


async def count(nats_server: str, ranks: int, seconds: float) -> dict[str, float]:
    """CPU share of the NATS client alone."""
    messages = 0

    async def counted(_: str, __: bytes) -> None:
        nonlocal messages
        messages += 1

    transport = Transport(nats_server)
    await transport.connect()
    await transport.subscribe(events_of(NAMESPACE), counted)
    await transport.flush()
    print("ready", flush=True)
    await _until(lambda: messages >= ranks, "every rank was heard of")
    measured = await _cpu(lambda: messages, seconds)
    print("measured", flush=True)
    await transport.close()
    return measured


async def _cpu(messages: Callable[[], int], seconds: float) -> dict[str, float]:
    """Of this process over so many seconds in which it only runs its event loop."""
    await asyncio.sleep(SETTLE_S)
    at, cpu, before = time.monotonic(), time.process_time(), messages()
    await asyncio.sleep(seconds)
    took, used, came = time.monotonic() - at, time.process_time() - cpu, messages() - before
    return {"share": used / took, "rate": came / took, "us": used / came * 1e6}


async def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"expected within {PATIENCE_S:g} s that {what}")
        await asyncio.sleep(LOOK_S)


# -- the run ---------------------------------------------------------------------------------------

ROLES: dict[str, Callable[[str, int, float], Awaitable[dict[str, float]]]] = {
    "publish": publish,
    "follow": follow,
    "count": count,
}


def run_role(args: argparse.Namespace) -> None:
    """A child: says how far it is, a word a line, then what it measured as JSON."""
    import uvloop

    print(json.dumps(uvloop.run(ROLES[args.role](args.nats, args.ranks[0], args.seconds))), flush=True)


class Child:
    """One of the roles in a process of its own."""

    def __init__(self, role: str, nats_server: str, ranks: int, seconds: float) -> None:
        self.role = role
        command = [sys.executable, __file__, "--role", role, "--nats", nats_server]
        command += ["--ranks", str(ranks), "--seconds", str(seconds)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **LOOPBACK_ENV},
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        text = self.process.stdout.readline().strip()
        if not text:
            raise SystemExit(f"the process that should {self.role} ended; its error is above")
        return text

    def stop_beating(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("stop\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, float]:
        measured: dict[str, float] = json.loads(self.line())
        self.process.wait()
        return measured


def measure(nats_server: str, ranks: int, seconds: float) -> dict[str, float]:
    """One fleet from its first message until the router calls every rank silent."""
    print(f"{ranks} ranks, {seconds:g} s", file=sys.stderr, flush=True)
    children: list[Child] = []
    try:
        for role in ("follow", "count", "publish"):
            children.append(Child(role, nats_server, ranks, seconds))
            children[-1].line()
        follower, counter, publisher = children
        follower.line(), counter.line()
        publisher.stop_beating()
        return figures(ranks, follower.result(), counter.result(), publisher.result()["stopped"])
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()


def figures(
    ranks: int, ours: Mapping[str, float], bare: Mapping[str, float], stopped: float
) -> dict[str, float]:
    return {
        "ranks": ranks,
        "messages_a_second": round(ours["rate"]),
        "router_percent_of_a_core": round(100 * ours["share"], 2),
        "bare_client_percent_of_a_core": round(100 * bare["share"], 2),
        "ratio": round(ours["share"] / bare["share"], 2),
        "router_us_a_message": round(ours["us"], 1),
        "bare_client_us_a_message": round(bare["us"], 1),
        "first_rank_silent_after_s": round(ours["first_silent"] - stopped, 2),
        "all_ranks_silent_after_s": round(ours["last_silent"] - stopped, 2),
    }


async def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="vswa-bench-") as folder:
        nats, nats_server = await start_nats(Path(folder))
        load_before = os.getloadavg()[0]
        try:
            fleets = [
                await asyncio.to_thread(measure, nats_server, ranks, args.seconds) for ranks in args.ranks
            ]
        finally:
            await nats.stop()
    most = fleets[-1]
    return {
        "question": "What does an idle fleet cost a router?",
        "command": shlex.join(["python", "benchmarks/bench_fleet.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("vswa-plugin", "nats-py", "msgspec", "uvloop")},
        },
        "seconds": args.seconds,
        "goal": {
            "ranks": most["ranks"],
            "percent_at_most": GOAL_PERCENT,
            "percent": most["router_percent_of_a_core"],
            "met": most["router_percent_of_a_core"] < GOAL_PERCENT,
        },
        "fleets": fleets,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", help=f"fleets, one after another {RANKS}")
    parser.add_argument("--seconds", type=float, help=f"measured, of each fleet ({SECONDS:g})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--short", action="store_true", help=f"{SHORT_RANKS}, {SHORT_SECONDS:g} s each")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--nats", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.ranks = args.ranks or (SHORT_RANKS if args.short else RANKS)
    args.seconds = args.seconds or (SHORT_SECONDS if args.short else SECONDS)
    if args.role:
        run_role(args)
        return
    text = json.dumps(asyncio.run(run(args)), indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
