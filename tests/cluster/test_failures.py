"""What a client sees when an engine fails, through Dynamo's frontend alone and through our router."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import cluster_on, own_namespace, post, running, stream
from tests.failing_engine import FAILURES
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.probe import Probe
from vswa_plugin.launch.processes import Child
from vswa_plugin.launch.topologies import Routing, WorkerGroup
from vswa_plugin.worker import liveness
from vswa_plugin.worker.liveness import Stall

PLUGIN = str(Path(__file__).parents[1] / "failing_engine.py")


def failing(
    folder: Path, model_dir: Path, brokers: Brokers, router: str | None, *options: str
) -> AbstractAsyncContextManager[Cluster]:
    settings = ClusterSettings(
        str(model_dir),
        "gemma",
        groups=(WorkerGroup("agg", 2),),
        engine="failing",
        namespace=own_namespace("failing"),
        routing=Routing(router),
        worker_options=("--plugin", PLUGIN, *options),
    )
    return running(cluster_on(brokers, folder, settings))


def request(failure: str, before: int = 0) -> dict[str, Any]:
    """One that fails after ``before`` tokens."""
    seed = list(FAILURES).index(failure)
    return {"model": "gemma", "prompt": "Hello there you", "max_tokens": before + 1, "seed": seed}


async def unary(cluster: Cluster, failure: str, before: int) -> tuple[int, str]:
    status, answer = await post(cluster, "/v1/completions", request(failure, before))
    return status, answer["message"] if status != 200 else answer["choices"][0]["text"]


async def streamed(cluster: Cluster, failure: str, before: int) -> tuple[int, str]:
    """The code of the error that ends the stream, 200 for none; and the text."""
    code, text = 200, ""
    async for chunk in stream(cluster, "/v1/completions", request(failure, before)):
        code = chunk["error"]["code"] if "error" in chunk else code
        text += "".join(choice["text"] for choice in chunk.get("choices", ()))
    return code, text


@pytest.mark.parametrize("router", [None, "exact"])
def test_each_failure_has_its_status_and_only_a_stopping_worker_sends_requests_elsewhere(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers, router: str | None
) -> None:
    kinds = [kind for kind, failure in FAILURES.items() if failure is not None]

    async def body() -> tuple[dict[str, Any], ...]:
        async with failing(tmp_path, model_dir, brokers, router) as cluster:
            at_once = {kind: await unary(cluster, kind, 0) for kind in kinds if kind != "stops"}
            later = {kind: (await unary(cluster, kind, 3))[0] for kind in kinds if kind != "stops"}
            in_stream = {kind: await streamed(cluster, kind, 3) for kind in kinds}
            return at_once, later, in_stream

    at_once, later, in_stream = run(body())
    codes = {"invalid": 400, "full": 503, "failed": 500, "value error": 500, "key error": 500}

    assert {kind: status for kind, (status, _) in at_once.items()} == codes
    assert at_once["invalid"][1] == "expected a shorter prompt", "what the client can correct is said"
    assert later == codes
    assert {kind: code for kind, (code, _) in in_stream.items()} == codes | {"stops": 200}
    assert in_stream["stops"][1] == " you" * 4, "one unbroken stream"


def test_a_worker_whose_engine_hangs_gives_its_requests_to_others_and_exits(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    async def body() -> tuple[tuple[int, str], list[int], list[Child], int]:
        async with failing(tmp_path, model_dir, brokers, None, "--stall-timeout", "1") as cluster:
            answer = await streamed(cluster, "hangs", 3)
            async with Probe(cluster.settings, cluster.url) as probe:
                assert (await probe.instances())["backend"] == 1
            cluster.check()  # both live: its engine is being stopped
            ended = [asyncio.create_task(worker.wait()) for worker in cluster.workers]
            done, rest = await asyncio.wait(ended, timeout=10, return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            dead = [worker for worker in cluster.workers if worker._process.returncode is not None]
            left = len([e for e in await cluster.entries() if e.namespace == cluster.settings.namespace])
            return answer, [task.result() for task in done], dead, left

    answer, codes, dead, left = run(body())

    assert answer == (200, " you" * 4)
    assert (codes, left) == ([1], 1)
    assert (
        dead[0].last_words()
        == "the engine hangs: no chunk and no event for 1 s, with 1 requests under way (--stall-timeout)"
    )


def test_only_silence_with_requests_under_way_is_a_stall() -> None:
    stall = Stall(3 * liveness.WATCH_INTERVAL_S)
    looks = [(0, 0), (1, 0), (1, 0), (1, 1), (1, 1), (0, 1), (2, 1), (2, 1), (2, 1), (2, 2)]

    assert [stall.seen(*look) for look in looks] == [False] * 8 + [True, False]
    assert not any(Stall(0).seen(1, 0) for _ in range(1000))


def test_a_failed_worker_ends_even_where_its_engine_does_not(tmp_path: Path, run: Run[Any]) -> None:
    code = """
import threading
from vswa_plugin.program import life
life.END_TIMEOUT_S = 0.2
life.end_at_any_rate("vswa worker", "the engine hangs")
threading.Thread(target=threading.Event().wait).start()  # keeps a process from ending
"""

    async def body() -> tuple[int, str]:
        child = await Child.start("stuck", [sys.executable, "-c", code], tmp_path)
        return await asyncio.wait_for(child.wait(), 10), child.last_words()

    assert run(body()) == (1, "the engine hangs; its end took longer than 0.2 s")
