"""``python -m tests.endurance.publishers URL RANKS EVENTS_PER_S SECONDS``: publish, then say what is held."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time

from vswa_plugin.engine.contract import BlocksRemoved, EngineEvent
from vswa_plugin.testing.streams import Publishing
from vswa_plugin.wire.events import Source

NAMESPACE, COMPONENT = "soak", "backend"
#: Engine steps of one rank between two looks at the clock, each of some four events on the wire.
STEP_EVENTS = 4
TURN_S = 0.05


def digest(held: dict[int, set[int]]) -> str:
    """What a rank holds, in short."""
    names = [(group, sorted(blocks)) for group, blocks in sorted(held.items()) if blocks]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def source(number: int) -> Source:
    return Source(NAMESPACE, COMPONENT, number, 0)


async def publish(url: str, ranks: int, events_per_s: float, seconds: float) -> None:
    """Publish from all ranks at that rate together; what they hold goes to standard output at the end."""
    workers = [Publishing(url, source(number + 1), heartbeat_s=1.0) for number in range(ranks)]
    for worker in workers:
        await worker.start()
    await _say("ready", {each.source.worker_id: each.publisher.ledger.epoch for each in workers})
    began, steps = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        due = int(passed * events_per_s / STEP_EVENTS)
        for number in range(steps, due):
            worker = workers[number % ranks]
            worker.work()
            if worker._next > 400:  # a cache has an end
                worker.offer(*_oldest(worker))
        steps = due
        await asyncio.sleep(TURN_S)
    for worker in workers:
        while worker.publisher._inbox or worker.publisher._queue:  # however slow this machine is
            await asyncio.sleep(TURN_S)
    held = {
        each.source.worker_id: (each.publisher.ledger.next_event_id, digest(each.residency.resident()))
        for each in workers
    }
    await _say("done", {"steps": steps, "held": held})
    for worker in workers:
        await worker.stop()


async def _say(word: str, about: object) -> None:
    """One line to whoever started this process; return when a line comes back."""
    sys.stdout.write(f"{word} {json.dumps(about)}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)


def _oldest(worker: Publishing) -> list[EngineEvent]:
    """The removals of what was stored four hundred steps ago."""
    gone = tuple(f"{worker.source.worker_id}:{worker._next - 400}:{depth}" for depth in range(4))
    return [BlocksRemoved(group, gone) for group in (0, 1, 2)]


if __name__ == "__main__":
    asyncio.run(publish(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
