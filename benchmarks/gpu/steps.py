"""What run.py measures: each step starts what it needs, and is stopped by run.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import workload
from client import texts
from stack import USUAL, Stack

if TYPE_CHECKING:
    from run import Bench

HERE = Path(__file__).resolve().parent
NAMESPACE = "gpu-bench"


async def policies(bench: Bench) -> None:
    """Two workers, three policies, several rates: the engines and all front ends run from begin to end."""
    given = bench.options_of("policies")
    stack = bench.stack("policies")
    await stack.start_brokers()
    for number in range(given["workers"]):
        await stack.start_worker(f"worker-{number}", NAMESPACE, bench.given.dynamo_events)
    for policy in bench.given.policy or USUAL:
        await stack.start_front(policy, NAMESPACE)
    bench.say("policies: all processes are started")
    await stack.ready(min(given["start_s"], bench.left()))
    order = list(bench.given.policy or USUAL)
    for policy in order:
        await bench.run(stack, "warm-up", policy, given["warm_up"], 0)
    for repeat in range(bench.given.repeats):
        for name in bench.given.workload or given["workloads"]:
            for policy in order:
                await bench.run(stack, "policies", policy, name, repeat,
                                dynamo_events=bench.given.dynamo_events)  # fmt: skip
            # So that none always comes first, after another workload.
            order.append(order.pop(0))


async def events(bench: Bench) -> None:
    """Two workers apart, one with KV events and one without; the same loads on both in turn."""
    given = bench.options_of("events")
    stack = bench.stack("events")
    kinds = {"on": (), "off": ("--plugin", str(HERE / "no_events.py"))}
    await stack.start_brokers()
    for kind, options in kinds.items():
        await stack.start_worker(f"worker-{kind}", f"{NAMESPACE}-{kind}", "off", *options)
        await stack.start_front("round_robin", f"{NAMESPACE}-{kind}", kind)
    bench.say("events: all processes are started")
    await stack.ready(min(given["start_s"], bench.left()))
    for kind in kinds:
        await bench.run(stack, "warm-up", kind, given["warm_up"], 0)
    for repeat in range(given["repeats"]):
        for name in given["workloads"]:
            for kind in kinds if repeat % 2 == 0 else reversed(kinds):
                await bench.run(stack, "events", kind, name, repeat)


async def record(bench: Bench) -> None:
    """One worker whose cache is recorded, for ``vswa accuracy replay``."""
    given = bench.options_of("record")
    stack = bench.stack("record")
    recorded = {"VSWA_RECORD": str(bench.given.out / "traces"), "VSWA_RECORD_TOKENS": "plain"}
    await stack.start_brokers()
    await stack.start_worker("worker-0", NAMESPACE, "off", env=recorded)
    await stack.start_front("exact", NAMESPACE)
    bench.say("record: all processes are started")
    await stack.ready(min(given["start_s"], bench.left()))
    for name in given["workloads"]:
        await bench.run(stack, "record", "exact", name, 0)


async def disaggregated(bench: Bench) -> None:
    """Prefill and decode workers over NIXL, each policy before them; one more worker does both phases alone.

    First the same prompts go to each front end one at a time, and the answers are compared with those of the
    worker that does both: a block that was moved wrong changes the text. Then each front end gets the loads.
    """
    given = bench.options_of("disaggregated")
    stack = bench.stack("disaggregated")
    alone = f"{NAMESPACE}-alone"
    await stack.start_brokers()
    for phase in ("prefill", "decode"):
        for number in range(given[phase]):
            await stack.start_worker(f"{phase}-{number}", NAMESPACE, bench.given.dynamo_events, mode=phase)
    await stack.start_worker("alone", alone, "off")
    order = list(bench.given.policy or USUAL)
    for policy in order:
        await stack.start_front(policy, NAMESPACE)
    await stack.start_front("round_robin", alone, "alone")
    bench.say("disaggregated: all processes are started")
    await stack.ready(min(given["start_s"], bench.left()))
    bench.steps.setdefault("disaggregated", {})["answers"] = await compared(bench, stack, order)
    for repeat in range(bench.given.repeats):
        for name in given["workloads"]:
            for front in (*order, "alone"):
                await bench.run(
                    stack, "disaggregated", front, name, repeat, dynamo_events=bench.given.dynamo_events
                )
            order.append(order.pop(0))


async def compared(bench: Bench, stack: Stack, fronts: Sequence[str]) -> Mapping[str, Any]:
    """How many answers of each front end are those of the worker that does both phases, one at a time."""
    given = workload.load(HERE / "workloads" / f"{bench.options_of('disaggregated')['answers']}.json")
    requests = workload.make(given)
    sent = workload.bodies(requests, "bench", bench.next_number())
    answers = {front: await texts(stack.url(front), sent) for front in ("alone", *fronts)}
    made: dict[str, Any] = {"prompts": len(requests)}
    for front in fronts:
        same = sum(map(str.__eq__, answers[front], answers["alone"]))
        made[front] = same
        bench.say(
            f"disaggregated: {front}: {same} of {len(requests)} answers as of one worker for both phases"
        )
    return made


STEPS: Mapping[str, Callable[[Bench], Awaitable[None]]] = {
    "policies": policies,
    "events": events,
    "record": record,
    "disaggregated": disaggregated,
}
