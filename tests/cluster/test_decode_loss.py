"""Decode workers are killed behind our router: their requests, and the prompts that nobody will fetch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.conftest import Brokers, Run
from tests.e2e_helpers import cluster_on, engine_metric, eventually, get, own_namespace, post, running
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.processes import Child
from vswa_plugin.launch.topologies import Routing, WorkerGroup

#: Only the router can free a prompt of this prefill worker before a test is over.
PATIENT = {"gemma3_cpu": {"transfer_patience_s": 1000, "transfer_timeout_s": 1000}}


def two_decode_workers(folder: Path, model_dir: Path, brokers: Brokers) -> Cluster:
    settings = ClusterSettings(
        str(model_dir),
        "gemma",
        groups=(WorkerGroup("prefill", override=PATIENT), WorkerGroup("decode", 2)),
        namespace=own_namespace("loss"),
        routing=Routing("exact"),
        worker_options=("--status-port", "0"),
    )
    return cluster_on(brokers, folder, settings)


async def statuses(cluster: Cluster, name: str, count: int) -> list[int]:
    """Of so many requests, one after the other."""
    bodies = [{"model": "gemma", "prompt": f"{name} {number}", "max_tokens": 4} for number in range(count)]
    return [(await post(cluster, "/v1/completions", body))[0] for body in bodies]


async def count(cluster: Cluster, name: str) -> float:
    """A count of the router's: of a family, or of requests with an outcome."""
    _, page = await get(f"{cluster.router_urls[0]}/metrics")
    sample = rf'requests_total{{model="gemma",outcome="{name}"}}'
    if name in ("decode_retries", "released_prompts"):
        sample = rf'{name}_total{{model="gemma"}}'
    found = re.search(rf"^vswa_router_{sample} (\S+)$", page, re.M)
    assert found is not None, page
    return float(found[1])


async def killed(worker: Child) -> None:
    worker.kill()
    await worker.wait()


def test_killed_decode_workers_cost_no_request_while_one_is_left_and_no_prompt_stays_held(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    async def body() -> None:
        async with running(two_decode_workers(tmp_path, model_dir, brokers)) as cluster:
            prefill, *decode = cluster.workers
            await killed(decode[0])
            # Both are listed still: some of these go to the dead one first.
            assert [200] * 6 == await statuses(cluster, "one is left", 6)
            assert await count(cluster, "decode_retries") >= 1
            assert 0 == await count(cluster, "unavailable"), "no prompt was computed twice"

            await killed(decode[1])
            assert [503] * 3 == await statuses(cluster, "none is left", 3)

            async def all_are_free() -> bool:
                freed = await engine_metric(prefill, "transfers_released")
                assert freed <= await count(cluster, "unavailable")
                return freed == await count(cluster, "released_prompts") and not await engine_metric(
                    prefill, "transfers_held"
                )

            await eventually(all_are_free, "no prompt is held")
            assert await count(cluster, "released_prompts") >= 3

            await cluster.add_worker(WorkerGroup("decode"))
            await eventually(lambda: served(cluster), "a new decode worker serves")

    async def served(cluster: Cluster) -> bool:
        return [200] == await statuses(cluster, "back", 1)

    run(body())
