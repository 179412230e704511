"""How long a deployment with prefill and decode apart is without service when decode workers are killed.

    python benchmarks/bench_recovery.py [--router exact|stock] [--runs N] [--json FILE]

One prefill worker and two decode workers run the small random model of `vswa make-model`; the prefill
worker's pools hold some ten prompts. Clients send new prompts without pause, then decode workers are killed
with SIGKILL:

* `one`: one of them. `gap_s` is the longest time after that in which no client got an answer.
* `both`: both, and two new ones are started at once. `back_s` is the time from the moment at which the first
  new one is in the registry to the first answer with status 200, `gap_s` the longest time without an answer
  from then on.

All times are measured at the clients. `statuses` counts the answers after the kill.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

from vswa_plugin.engine import ROUTERS
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.topologies import Routing, WorkerGroup

MODEL = "bench"
CLIENTS = 12
#: Some 450 tokens each; the pools hold ten of them.
PROMPT_LINES = 14
PREFILL = {"gemma3_cpu": {"kv_blocks": {"512": 150, "global": 150}}}
LOAD_S, OBSERVED_S = 4.0, 35.0


class Clients:
    """Clients that send one new prompt after the other.

    :ivar answers: (seconds of the event loop, HTTP status; 0: no answer) of each request that ended.
    """

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/completions"
        self._number = 0
        self.answers: list[tuple[float, int]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks = [asyncio.create_task(self._client(session)) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while True:
            self._number += 1
            lines = [f"{self._number} {i}: entry {i * 37 % 101} follows {i}." for i in range(PROMPT_LINES)]
            body = {"model": MODEL, "prompt": "\n".join(lines), "max_tokens": 6}
            try:
                async with session.post(self._url, json=body) as answer:
                    await answer.read()
                    status = answer.status
            except (aiohttp.ClientError, TimeoutError):
                status = 0
            self.answers.append((now(), status))
            if status != 200:
                await asyncio.sleep(0.1)  # as a client that tries again

    def served(self, since: float) -> list[float]:
        """Seconds after ``since`` at which a client got its answer."""
        return [at - since for at, status in self.answers if status == 200 and at > since]

    def statuses(self, since: float) -> dict[str, int]:
        return dict(Counter(str(status) for at, status in self.answers if at > since))


def now() -> float:
    return asyncio.get_running_loop().time()


def longest_gap(times: Sequence[float], end: float) -> float:
    """Between two neighbours of 0, ``times`` and ``end``."""
    edges = [0.0, *sorted(times), end]
    return max(later - earlier for earlier, later in itertools.pairwise(edges))


async def measure(model: Path, router: str, killed: str) -> dict[str, Any]:
    """One run; see the module."""
    with tempfile.TemporaryDirectory() as folder:
        prefill, decode = WorkerGroup("prefill", 1, override=PREFILL), WorkerGroup("decode", 2)
        settings = ClusterSettings(
            str(model), MODEL, groups=(prefill, decode), routing=Routing(router), engine="gemma3_cpu"
        )
        cluster = Cluster(settings, Path(folder))
        try:
            await cluster.start()
            clients = Clients(cluster.url)
            async with clients.running():
                await asyncio.sleep(LOAD_S)
                return await _kill(cluster, clients, decode, killed)
        finally:
            await cluster.stop()


async def _kill(cluster: Cluster, clients: Clients, decode: WorkerGroup, killed: str) -> dict[str, Any]:
    victims = [worker for worker in cluster.workers if worker.name.startswith("decode")]
    at, before = now(), len(clients.served(now() - LOAD_S))
    for worker in victims[: 1 if killed == "one" else 2]:
        worker.kill()
        await worker.wait()
        cluster.workers.remove(worker)
    since, result = at, {"killed": killed, "served_per_s_before": round(before / LOAD_S, 1)}
    if killed == "both":
        starting = [asyncio.create_task(cluster.add_worker(decode)) for _ in range(2)]
        await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)
        since = now()
        await asyncio.gather(*starting)
        result["started_s"] = round(since - at, 2)
    await asyncio.sleep(OBSERVED_S - (now() - since))
    served = clients.served(since)
    if killed == "both":
        result["back_s"] = round(min(served, default=OBSERVED_S), 2)
    return {
        **result,
        "gap_s": round(longest_gap(served, OBSERVED_S), 2),
        "served_per_s": round(len(served) / OBSERVED_S, 1),
        "statuses": clients.statuses(at),
    }


async def run(routers: Sequence[str], runs: int) -> dict[str, Any]:
    """All runs, by router."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_checkpoint(model)
        for router in routers:
            results[router] = []
            for killed in ("one", "both"):
                for _ in range(runs):
                    results[router].append(await measure(model, router, killed))
                    print(router, json.dumps(results[router][-1]), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--router", choices=ROUTERS, help="one kind of router only")
    parser.add_argument("--runs", type=int, default=3, help="of each kind (3)")
    parser.add_argument("--json", type=Path, help="write the results there")
    given = parser.parse_args()
    results = asyncio.run(run([given.router] if given.router else ROUTERS, given.runs))
    if given.json is not None:
        about = {
            "command": " ".join(sys.argv),
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load": [round(load, 1) for load in os.getloadavg()],
        }
        given.json.write_text(json.dumps({**about, **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
