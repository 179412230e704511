"""Real vLLM workers that compute prompts and answers apart, behind Dynamo's frontend and the exact router."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import cluster_on, engine_metric, eventually, long_prompt, stream
from tests.plugins.vllm.live.conftest import OPTIONS
from tests.plugins.vllm.live.test_live_stack import GREEDY, _long, ask, cached_of
from tests.plugins.vllm.live.test_live_stack import patience as patience
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.topologies import Routing, WorkerGroup

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs the package nixl"),
]

PHASES = (WorkerGroup("prefill", override=OPTIONS), WorkerGroup("decode", override=OPTIONS))
#: Shorter than a window, longer, and one that comes again with another end.
PROMPTS = ("What is a harbour?", long_prompt("one", 60), long_prompt("one", 60) + " And then?")
ANSWER = 12


def settings_of(
    model_dir: Path, namespace: str, groups: Sequence[WorkerGroup], **more: Any
) -> ClusterSettings:
    options = ("--status-port", "0")
    return ClusterSettings(
        str(model_dir), "gemma", tuple(groups), "vllm", namespace, worker_options=options, **more
    )


async def answers_of(cluster: Cluster) -> list[dict[str, Any]]:
    return [await ask(cluster, prompt, ANSWER) for prompt in PROMPTS]


def texts(answers: Sequence[dict[str, Any]]) -> list[str]:
    return [answer["choices"][0]["text"] for answer in answers]


def worker(cluster: Cluster, phase: str) -> Any:
    return cluster.workers[("prefill", "decode").index(phase)]


@pytest.fixture(scope="module")
def alone(
    run: Run[Any],
    brokers: Brokers,
    model_dir: Path,
    patience: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    """What one worker answers that does both."""
    settings = settings_of(model_dir, "vllm-alone", (WorkerGroup("agg", override=OPTIONS),))
    cluster = cluster_on(brokers, tmp_path_factory.mktemp("alone"), settings)
    try:
        _long(run, cluster.start())
        return texts(_long(run, answers_of(cluster)))
    finally:
        _long(run, cluster.stop())


@pytest.fixture(scope="module", params=["dynamo", "exact"])
def disagg(
    run: Run[Any],
    brokers: Brokers,
    model_dir: Path,
    patience: None,
    alone: list[str],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    """The topologies disagg, with Dynamo's PrefillRouter, and disagg_router, with ours."""
    more: dict[str, Any] = {}
    if request.param == "exact":
        more = {"routing": Routing("exact"), "router_options": ("--log-level", "debug")}
    settings = settings_of(model_dir, f"vllm-{request.param}", PHASES, **more)
    cluster = cluster_on(brokers, tmp_path_factory.mktemp(request.param), settings)
    try:
        _long(run, cluster.start())
        yield cluster
    finally:
        codes = _long(run, cluster.stop())
    assert set(codes.values()) == {0}, codes


def test_two_phases_answer_as_one_worker_does_and_blocks_are_moved(
    run: Run[Any], disagg: Cluster, alone: list[str]
) -> None:
    before = run(engine_metric(worker(disagg, "decode"), "transfer_bytes"))
    answers = _long(run, answers_of(disagg))
    moved = run(engine_metric(worker(disagg, "decode"), "transfer_bytes")) - before
    cached = [cached_of(answer) for answer in answers]

    assert alone == texts(answers)
    assert moved > 0
    assert 0 == cached[0] and 0 < cached[2] < answers[2]["usage"]["prompt_tokens"]
    if disagg.routers:
        promised = [int(each) for each in re.findall(r"promises (\d+) of", disagg.routers[0].log())]
        assert cached[2] in promised


def test_a_client_that_goes_away_leaves_nothing_held(run: Run[Any], disagg: Cluster) -> None:
    async def leave() -> None:
        body = {**GREEDY, "model": "gemma", "prompt": long_prompt("away", 40), "max_tokens": 1_200}
        chunks = stream(disagg, "/v1/completions", body)
        async for _ in chunks:
            break
        await chunks.aclose()
        for phase in ("prefill", "decode"):

            async def idle(phase: str = phase) -> bool:
                names = ("running", "blocks_used")
                return [0, 0] == [await engine_metric(worker(disagg, phase), name) for name in names]

            await eventually(idle, f"{phase} holds nothing", 60)

    _long(run, leave())
