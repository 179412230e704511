"""Real vLLM workers behind Dynamo's own frontend: aggregated, and behind the exact router."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.accuracy_helpers import replayed
from tests.conftest import Brokers, Run
from tests.e2e_helpers import cluster_on, engine_metric, eventually, long_prompt, post, stream
from tests.plugins.vllm.live.conftest import OPTIONS
from vswa_plugin.launch import cluster as cluster_module
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.topologies import Routing, WorkerGroup

pytestmark = pytest.mark.timeout(900)

GREEDY = {"temperature": 0, "ignore_eos": True}
#: How long a worker may take to start on a machine that is busy with others.
START_S = 600.0


def settings_of(model_dir: Path, namespace: str, workers: int, **more: Any) -> ClusterSettings:
    groups = (WorkerGroup("agg", workers, override=OPTIONS),)
    options = ("--status-port", "0")
    return ClusterSettings(str(model_dir), "gemma", groups, "vllm", namespace, worker_options=options, **more)


@pytest.fixture(scope="module")
def patience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_module, "WORKER_TIMEOUT_S", START_S)
        yield


async def ask(cluster: Cluster, prompt: Any, max_tokens: int = 4, **more: Any) -> dict[str, Any]:
    body = {**GREEDY, "model": "gemma", "prompt": prompt, "max_tokens": max_tokens, **more}
    status, answer = await post(cluster, "/v1/completions", body)
    assert status == 200, answer
    return dict(answer)


def cached_of(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


# -- aggregated ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the launcher says of its processes."""
    return []


@pytest.fixture(scope="module")
def agg(
    run: Run[Any],
    brokers: Brokers,
    model_dir: Path,
    patience: None,
    said: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    settings = settings_of(model_dir, "vllm-agg", 1, keep=True)
    made = Cluster(settings, tmp_path_factory.mktemp("agg"), said.append)
    made.nats_server, made.etcd_endpoints = brokers.nats_server, brokers.etcd_endpoints
    try:
        _long(run, made.start())
        yield made
    finally:
        codes = _long(run, made.stop())
    assert set(codes.values()) == {0}, codes


def _long(run: Run[Any], work: Any) -> Any:
    """``run`` gives up after two minutes; the start of an engine may take longer."""
    ended: dict[str, Any] = {}

    async def noted() -> None:
        try:
            ended["result"] = await work
        except BaseException as error:
            ended["error"] = error
        ended["done"] = True

    async def begin() -> None:
        ended["task"] = asyncio.create_task(noted())

    async def wait() -> None:
        await asyncio.wait([ended["task"]], timeout=60)

    run(begin())
    while "done" not in ended:
        run(wait())
    if "error" in ended:
        raise ended["error"]
    return ended["result"]


def test_chat_and_completions_are_answered(run: Run[Any], agg: Cluster) -> None:
    async def both() -> tuple[dict[str, Any], tuple[int, Any]]:
        messages = [{"role": "user", "content": "What is a harbour?"}]
        body = {"model": "gemma", "messages": messages, "max_tokens": 8, "temperature": 0}
        return await ask(agg, "What is a harbour?", 8), await post(agg, "/v1/chat/completions", body)

    completion, (status, chat) = run(both())

    assert 8 == completion["usage"]["completion_tokens"] and completion["choices"][0]["text"]
    assert 200 == status and chat["choices"][0]["message"]["content"]


def test_a_prompt_that_comes_again_is_cached_and_answered_alike(run: Run[Any], agg: Cluster) -> None:
    prompt = long_prompt("twice", 30)

    async def twice() -> list[dict[str, Any]]:
        return [await ask(agg, prompt, 12) for _ in range(2)]

    first, second = run(twice())

    assert (0, 0) != (cached_of(first), cached_of(second)) and cached_of(first) == 0
    assert cached_of(second) == (second["usage"]["prompt_tokens"] - 1) // 32 * 32
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


def test_what_can_never_be_served_is_refused_with_400(run: Run[Any], agg: Cluster) -> None:
    async def refused() -> list[int]:
        bodies = [{"prompt": "x", "n": 2}, {"prompt": "x", "echo": True}, {"prompt": [7] * 3_000}]
        return [(await post(agg, "/v1/completions", {"model": "gemma", **body}))[0] for body in bodies]

    assert [400, 400, 400] == run(refused())


def test_many_requests_at_once_are_all_answered(run: Run[Any], agg: Cluster) -> None:
    families = [long_prompt(f"family {name}", 20) for name in "ab"]

    async def many() -> list[dict[str, Any]]:
        return await asyncio.gather(*(ask(agg, f"{families[n % 2]} and {n}", 10 + n) for n in range(20)))

    answers = run(many())

    assert [10 + n for n in range(20)] == [answer["usage"]["completion_tokens"] for answer in answers]
    assert 0 < sum(map(cached_of, answers))


def test_a_client_that_goes_away_ends_its_request(run: Run[Any], agg: Cluster) -> None:
    worker = agg.workers[0]

    async def leave() -> None:
        body = {**GREEDY, "model": "gemma", "prompt": "Tell me all.", "max_tokens": 1_900}
        chunks = stream(agg, "/v1/completions", body)
        async for _ in chunks:
            break
        assert 1 == await engine_metric(worker, "running")
        await chunks.aclose()

        async def idle() -> bool:
            return await engine_metric(worker, "running") == 0

        await eventually(idle, "the request has ended", 30)

    before = run(engine_metric(worker, "requests"))
    run(leave())

    assert before == run(engine_metric(worker, "requests")), "it did not run to its end"


def test_the_death_of_the_engine_core_ends_the_worker_with_its_reason_and_it_comes_back(
    run: Run[Any], agg: Cluster, said: list[str]
) -> None:
    worker = agg.workers[0]
    before = worker.pid
    (core,) = [
        each for each in psutil.Process(before).children(True) if "EngineCore" in " ".join(each.cmdline())
    ]
    os.kill(core.pid, signal.SIGKILL)

    async def again() -> None:
        async def answered() -> bool:
            if worker.pid == before:
                return False
            body = {"model": "gemma", "prompt": "x", "max_tokens": 2}
            async with (
                aiohttp.ClientSession() as http,
                http.post(f"{agg.url}/v1/completions", json=body) as got,
            ):
                return got.status == 200

        await eventually(answered, "another worker serves", START_S)

    _long(run, again())
    reason = (
        r"worker-0 ended with .*: the engine has failed: vLLM's engine core has ended: \S+ with exit code -9"
    )

    assert [line for line in said if re.search(reason, line)], said
    assert not psutil.pid_exists(before)


# -- behind the exact router -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


def test_behind_the_router_what_is_promised_is_what_vllm_reuses_and_traces_replay_exactly(
    run: Run[Any], brokers: Brokers, model_dir: Path, patience: None, tmp_path: Path,
    traces: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With windows that slide out and a pool that is full; one request at a time, so nothing is in flight."""
    monkeypatch.setenv("VSWA_RECORD", str(traces))
    monkeypatch.setenv("VSWA_RECORD_TOKENS", "plain")
    rng = random.Random(11)
    families = [long_prompt(f"family {name}", 60) for name in "abcde"]
    settings = settings_of(
        model_dir, "vllm-router", 2, routing=Routing("exact"), router_options=("--log-level", "debug")
    )
    cluster = cluster_on(brokers, tmp_path, settings)
    reused: list[int] = []

    async def work() -> None:
        for _ in range(40):
            family = rng.choice(families)
            answer = await ask(cluster, family[: rng.randrange(200, len(family))], 3)
            reused.append(cached_of(answer))

    try:
        _long(run, cluster.start())
        before = cluster.routers[0].log().count(" promises ")
        run(work())
        log = cluster.routers[0].log()
        codes = _long(run, cluster.stop())
    except BaseException:
        _long(run, cluster.stop())
        raise
    promised = [int(tokens) for tokens in re.findall(r"promises (\d+) of", log)][before:]
    workers = Counter(re.findall(r"rank (\w+)/0 at cost", log))
    reports = [replayed(path) for path in sorted(traces.glob("*.jsonl.gz"))]

    assert reused == promised
    assert sum(tokens > 0 for tokens in reused) > 10
    assert 2 == len(workers)
    assert {0} == set(codes.values()), codes
    assert [1.0, 1.0] == [report.exact_share for report in reports]
    assert 40 <= sum(report.requests for report in reports)
