"""``python -m tests.faults``: faults of a real deployment on this machine, one by one, under load."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

from tests.faults.load import MODEL, Answer, Load, longest_gap, now, outcomes
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.processes import Child
from vswa_plugin.launch.topologies import Routing, WorkerGroup

#: Before each fault, and how long is watched after it.
CALM_S, WATCHED_S = 3.0, 25.0
POOLS = {"gemma3_cpu": {"kv_blocks": {"512": 200, "global": 300}}}
#: What may happen to a request without a fault of ours: a client sees it, and can try again.
ALLOWED = {"right", "status 503", "error in the stream", "connection lost", "cut"}


class Fault(NamedTuple):
    """:ivar victims: of a cluster, the processes that it hits.
    :ivar frozen_s: they are stopped for so long; 0: they are killed.
    :ivar limit_s: the longest time in which no client may get a right answer.
    :ivar spared: no request may fail at all.
    """

    name: str
    victims: Callable[[Cluster], Sequence[Child]]
    frozen_s: float
    limit_s: float
    spared: bool = False


FAULTS = (
    Fault("a worker is killed", lambda cluster: cluster.workers[:1], 0.0, 2.0),
    Fault("a worker is frozen", lambda cluster: cluster.workers[1:2], 10.0, 10.0),
    Fault("a router is killed, which has a peer", lambda cluster: cluster.routers[:1], 0.0, 2.0, True),
    Fault(
        "a worker and a router are killed",
        lambda cluster: (cluster.workers[0], cluster.routers[1]),
        0.0,
        5.0,
    ),
    Fault("NATS is away", lambda cluster: cluster._brokers[:1], 10.0, 10.0, True),
    # For less than its leases last (10 s); when it goes on after that, it ends them all.
    Fault("etcd is away", lambda cluster: cluster._brokers[1:2], 6.0, 10.0, True),
    Fault("etcd is away for as long as its leases last", lambda cluster: cluster._brokers[1:2], 10.0, 10.0),
)


async def run(names: Sequence[str]) -> list[dict[str, Any]]:
    """Each fault, and what came of it."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder) / "model")
        cluster = Cluster(
            ClusterSettings(
                str(Path(folder) / "model"), MODEL, (WorkerGroup("agg", 2, override=POOLS),),
                engine="gemma3_cpu", namespace="faults", routing=Routing("exact", 2), keep=True,
            ),
            Path(folder),
        )  # fmt: skip
        try:
            await cluster.start()
            load = Load(cluster.url)
            await load.learn()
            async with load.running():
                for fault in FAULTS:
                    if not names or fault.name in names:
                        results.append(await _hit(cluster, load, fault))
                        print(json.dumps(results[-1]), flush=True)
        finally:
            await cluster.stop()
    return results


async def _hit(cluster: Cluster, load: Load, fault: Fault) -> dict[str, Any]:
    await asyncio.sleep(CALM_S)
    victims, at = [child.pid for child in fault.victims(cluster)], now()
    for pid in victims:
        os.kill(pid, signal.SIGSTOP if fault.frozen_s else signal.SIGKILL)
    if fault.frozen_s:
        await asyncio.sleep(fault.frozen_s)
        for pid in victims:
            os.kill(pid, signal.SIGCONT)
    await asyncio.sleep(WATCHED_S)
    return judged(fault, load.since(at), at, now())


def judged(fault: Fault, answers: list[Answer], at: float, end: float) -> dict[str, Any]:
    """The figures of a fault between two moments, and whether they are within its limits."""
    gap, found = longest_gap(answers, at, end), outcomes(answers)
    wrong = [what for what in found if what not in ({"right"} if fault.spared else ALLOWED)]
    return {
        "fault": fault.name,
        "answers": found,
        "gap_s": round(gap, 2),
        "limit_s": fault.limit_s,
        "held": gap <= fault.limit_s and not wrong,
    }


def main() -> int:
    reader = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    reader.add_argument(
        "--fault", action="append", choices=[fault.name for fault in FAULTS], help="only these"
    )
    reader.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    given = reader.parse_args()
    results = asyncio.run(run(given.fault or ()))
    if given.json is not None:
        about = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load": [round(load, 1) for load in os.getloadavg()],
        }
        given.json.write_text(json.dumps({**about, "faults": results}, indent=1) + "\n")
    return 0 if all(result["held"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
