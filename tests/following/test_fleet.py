"""A running deployment seen from outside: index and explain agree with the workers and with the engine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from tests.conftest import Run
from tests.e2e_helpers import apart, eventually, get, long_prompt, metric, post
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.metrics import fleet_families
from vswa_plugin.launch.cluster import Cluster
from vswa_plugin.launch.topologies import WorkerGroup
from vswa_plugin.program.metrics import About, Page
from vswa_plugin.registry.etcd import EtcdRegistry
from vswa_plugin.wire.events import Rank
from vswa_plugin.wire.transport import Transport

GREEDY = {"model": "gemma", "temperature": 0, "ignore_eos": True}


def vswa(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vswa_plugin", *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, **cluster.env},
        check=False,
    )


def page_of(fleet: Fleet) -> Page:
    return Page(lambda: About("index"), lambda: fleet_families(fleet))


def fleet_of(cluster: Cluster) -> Fleet:
    """Not started."""
    registry = EtcdRegistry(cluster.etcd_endpoints)
    return Fleet(Transport(cluster.nats_server), registry, namespace=cluster.settings.namespace)


def test_the_index_of_a_late_joiner_holds_what_the_workers_say_they_hold(
    run: Run[Any], cluster: Cluster
) -> None:
    async def told() -> list[float]:
        for number in range(4):
            await post(
                cluster,
                "/v1/completions",
                {**GREEDY, "prompt": long_prompt(f"late {number}"), "max_tokens": 2},
            )
        return sorted(
            [
                await metric(worker, "vswa_resident_blocks", window=window)
                for worker in cluster.workers
                for window in ("512", "global")
            ]
        )

    expected = run(told())
    shown = vswa(cluster, "index", "--once", "--json", "--check", "--namespace", "e2e")
    assert shown.returncode == 0, shown.stderr
    index = json.loads(shown.stdout)

    held = [sum(tiers.values()) for rank in index["ranks"] for tiers in rank["blocks"].values()]
    assert index["exact"] is True
    assert [rank["state"] for rank in index["ranks"]] == ["live", "live"]
    assert sorted(map(float, held)) == expected


def test_the_table_names_worker_window_blocks_and_state(run: Run[Any], cluster: Cluster) -> None:
    run(post(cluster, "/v1/completions", {**GREEDY, "prompt": long_prompt("table"), "max_tokens": 2}))
    shown = vswa(cluster, "index", "--once", "--namespace", "e2e")

    assert shown.returncode == 0, shown.stderr
    for word in ("rank", "window", "512", "global", "live", "gemma", "2 ranks"):
        assert word in shown.stdout
    listed = vswa(cluster, "index", "--once", "--json", "--namespace", "e2e")
    for rank in json.loads(listed.stdout)["ranks"]:
        assert rank["source"]["worker_id"] in shown.stdout, "ids are whole: they differ in their last digits"


def test_explain_predicts_what_the_engine_then_reuses(run: Run[Any], cluster: Cluster) -> None:
    prompt = long_prompt("explained", 50)

    def ask() -> int:
        _, answer = run(post(cluster, "/v1/completions", {**GREEDY, "prompt": prompt, "max_tokens": 2}))
        cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    # A reader that came shortly before leaves a snapshot that is shared with the next one.
    assert vswa(cluster, "index", "--once", "--namespace", "e2e").returncode == 0
    assert [ask(), ask()] == [0, 0], "each worker computes it once"
    shown = vswa(cluster, "explain", prompt, "--model", "gemma", "--namespace", "e2e", "--json")
    assert shown.returncode == 0, shown.stderr
    predicted = [each["cached_tokens"] // 32 for each in json.loads(shown.stdout)]

    assert predicted == [ask() // 32, ask() // 32], shown.stdout + shown.stderr
    assert predicted[0] > 20


def test_explain_says_in_words_what_is_missing(run: Run[Any], cluster: Cluster) -> None:
    shown = vswa(cluster, "explain", long_prompt("never sent", 5), "--model", "gemma", "--namespace", "e2e")

    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("holds blocks none; block 0 is missing for the next boundary") == 4
    assert "rule trtllm_v2" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token-ids", "1,x"], "--token-ids: expected numbers from 0 to 2**32 - 1 with commas between"),
        (["hello", "--model", "gema"], "--model: unknown model 'gema'. Known: gemma"),
    ],
)
def test_explain_refuses_what_it_cannot_use(cluster: Cluster, arguments: list[str], message: str) -> None:
    shown = vswa(cluster, "explain", *arguments, "--namespace", "e2e")

    assert shown.returncode == 2
    assert message in shown.stderr


def test_a_killed_worker_scores_0_within_three_heartbeats_and_leaves_with_its_registration(
    run: Run[Any], cluster: Cluster
) -> None:
    async def body() -> tuple[float, dict[Rank, int], str]:
        alone = apart(cluster, "fleet-killed", WorkerGroup())
        await alone.start()
        fleet = fleet_of(alone)
        try:
            await fleet.start()
            prompt = long_prompt("fleet-killed")
            await post(alone, "/v1/completions", {**GREEDY, "prompt": prompt, "max_tokens": 2})
            assert await fleet.settled(10)
            (status,) = fleet.statuses(0)
            rank = status.source.rank
            await eventually(lambda: fleet.index.blocks(rank)[1]["device"] > 20, "its blocks are known")
            hashes = list(fleet.index.contents(rank)[1])
            scores = fleet.index.score(hashes, 32 * len(hashes) + 1)
            text = await page_of(fleet).render()

            loop = asyncio.get_running_loop()
            alone.workers[0]._process.send_signal(signal.SIGKILL)
            began = loop.time()
            view = fleet.subscriber.view(rank)
            assert view is not None
            await eventually(lambda: not view.scored(loop.time()), "it scores 0")
            took = loop.time() - began
            assert fleet.index.score(hashes, 32 * len(hashes) + 1) == {}
            await eventually(lambda: fleet.subscriber.view(rank) is None, "it left", 25)
            assert not fleet.entries
            return took, scores, text
        finally:
            await fleet.stop()
            await alone.stop()

    took, scores, text = run(body())

    assert took < 3.5, "three heartbeats of one second and a tick"
    assert all(cached > 0 for cached in scores.values())
    for name in ("vswa_reader_snapshots_total", "vswa_index_blocks", "vswa_rank_state", "vswa_index_kernel"):
        assert name in text


def test_a_fleet_serves_its_metrics_over_http(run: Run[Any], cluster: Cluster) -> None:
    from vswa_plugin.program.status import Status, StatusServer

    async def body() -> str:
        fleet = fleet_of(cluster)
        await fleet.start()
        server = StatusServer(
            Status(ready=True), Page(lambda: About("index"), lambda: fleet_families(fleet)).render
        )
        port = await server.start("127.0.0.1", 0)
        try:
            await fleet.settled(10)
            return (await get(f"http://127.0.0.1:{port}/metrics"))[1]
        finally:
            await server.stop()
            await fleet.stop()

    text = run(body())

    assert re.search(r'^vswa_index_scored_ranks\{model=".*"\} 2.0$', text, re.MULTILINE)
    assert 'window="global"' in text


def test_statuses_can_be_told_as_json(run: Run[Any], cluster: Cluster) -> None:
    async def body() -> bytes:
        fleet = fleet_of(cluster)
        await fleet.start()
        try:
            await fleet.settled(10)
            return msgspec.json.encode(fleet.statuses(0))
        finally:
            await fleet.stop()

    assert len(json.loads(run(body()))) == 2
