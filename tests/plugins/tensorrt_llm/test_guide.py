"""NVIDIA's guide "Gemma3 Sliding Window" and Dynamo's own scripts, with the stand-in of TensorRT-LLM.

The guide's exports go to our launcher as they are. A script of Dynamo's runs with the name of the module
changed and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, own_namespace, post, recording
from tests.tensorrt_llm_package import install
from vswa_plugin.launch.__main__ import settings_from
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.topologies import WorkerGroup

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "engine_configs" / "gemma3"
MODEL, COMMIT = "google/gemma-3-1b-it", "0123456789abcdef0123456789abcdef01234567"
PROMPT = "hello world " * 150


@pytest.fixture
def exported(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The guide's exports, on a machine with the stand-in, two GPUs, and the model in the Hub's cache."""
    install(tmp_path / "site", "1.3.0rc29")
    cached = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / COMMIT).symlink_to(model_dir)
    machine = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    guide = {
        "MODEL_PATH": MODEL,
        "SERVED_MODEL_NAME": MODEL,
        "AGG_ENGINE_ARGS": str(CONFIGS / "vswa_agg.yaml"),
        "PREFILL_ENGINE_ARGS": str(CONFIGS / "vswa_prefill.yaml"),
        "DECODE_ENGINE_ARGS": str(CONFIGS / "vswa_decode.yaml"),
        "PREFILL_CUDA_VISIBLE_DEVICES": "0",
        "DECODE_CUDA_VISIBLE_DEVICES": "1",
    }
    for name, value in {**machine, **guide}.items():
        monkeypatch.setenv(name, value)
    for name in ("VSWA_ENGINE", "ROUTER"):
        monkeypatch.delenv(name, raising=False)
    # huggingface_hub reads its variables once, as it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", machine["HF_HUB_CACHE"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return {**os.environ}


def gpus_of(cluster: Cluster) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of each worker that runs."""
    return {
        worker.name: psutil.Process(worker.pid).environ()["CUDA_VISIBLE_DEVICES"]
        for worker in cluster.workers
    }


async def ask(cluster: Cluster, prompt: str = PROMPT) -> Any:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 6}
    status, answer = await post(cluster, "/v1/completions", body)
    assert status == 200, answer
    return answer["usage"]


@pytest.mark.parametrize(
    ("topology", "more", "expected"),
    [
        ("disagg", {}, {"prefill-0": "0", "decode-0": "1"}),
        ("disagg_router", {}, {"prefill-0": "0", "decode-0": "1"}),
        (
            "disagg_router",
            {"PREFILL_CUDA_VISIBLE_DEVICES": "0,2"},
            {"prefill-0": "0", "prefill-1": "2", "decode-0": "1"},
        ),
    ],
)
def test_the_guides_exports_start_what_the_guide_starts(
    run: Run[Any],
    brokers: Brokers,
    exported: dict[str, str],
    tmp_path: Path,
    topology: str,
    more: dict[str, str],
    expected: dict[str, str],
) -> None:
    said: list[str] = []
    prefill = sum(name.startswith("prefill") for name in expected)
    argv = [topology, "--http-port", "0", "--namespace", own_namespace("guide")]
    argv += ["--prefill-workers", str(prefill)]
    settings, _ = settings_from(argv, {**exported, **more}, say=said.append)

    async def served() -> tuple[dict[str, str], list[Any]]:
        cluster = Cluster(settings, tmp_path, said.append)
        cluster.nats_server, cluster.etcd_endpoints = brokers.nats_server, brokers.etcd_endpoints
        try:
            await cluster.start()
            return gpus_of(cluster), [await ask(cluster) for _ in range(3)]
        finally:
            codes = await cluster.stop()
            assert not any(codes.values()), codes

    gpus, usages = run(served())

    assert expected == gpus
    assert all(any(line.startswith(f"starting {name}: ") and line.endswith(f"on GPU {gpu}") for line in said)
               for name, gpu in expected.items())  # fmt: skip
    why = "tensorrt_llm 1.3.0rc29: no engine was named, tensorrt_llm is installed and one GPU is visible"
    assert all(any(line.startswith(f"{name} runs {why}") for line in said) for name in expected)
    assert 6 == usages[-1]["completion_tokens"]
    # The exact router sends a prompt where it is cached; without one there is one prefill worker.
    assert usages[-1]["prompt_tokens"] - 1 == usages[-1]["prompt_tokens_details"]["cached_tokens"]


# -- scripts of Dynamo's ---------------------------------------------------------------------------


def script_line(*options: str, gpu: str) -> tuple[dict[str, str], list[str]]:
    """A worker's line of a script: variables in front, and the command."""
    model = ["--model-path", MODEL, "--served-model-name", MODEL]
    return {"CUDA_VISIBLE_DEVICES": gpu}, [sys.executable, "-m", "vswa_plugin.worker", *model, *options]


AGG = ("--extra-engine-args", str(CONFIGS / "vswa_agg.yaml"))
PREFILL = ("--extra-engine-args", str(CONFIGS / "vswa_prefill.yaml"), "--disaggregation-mode", "prefill")
DECODE = ("--extra-engine-args", str(CONFIGS / "vswa_decode.yaml"), "--disaggregation-mode", "decode")
OTEL = (
    "--override-engine-args",
    '{"return_perf_metrics": true, "otlp_traces_endpoint": "http://localhost:4317" }',
)
EVENTS = "--publish-events-and-metrics"
#: Script -> the frontend's --router-mode, and the workers' modes and lines.
SCRIPTS = {
    "agg": ("round-robin", [("agg", script_line(*AGG, "--modality", "text", gpu="0"))]),
    "agg_router": ("kv", [("agg", script_line(*AGG, EVENTS, gpu=gpu)) for gpu in "01"]),
    "disagg": (
        "round-robin",
        [
            ("prefill", script_line(*PREFILL, "--modality", "text", *OTEL, gpu="0")),
            ("decode", script_line(*DECODE, "--modality", "text", *OTEL, gpu="1")),
        ],
    ),
    "disagg_router": (
        "kv",
        [("prefill", script_line(*PREFILL, EVENTS, gpu="0")), ("decode", script_line(*DECODE, gpu="1"))],
    ),
}


@asynccontextmanager
async def as_in_the_script(
    script: str, brokers: Brokers, folder: Path, model_dir: Path
) -> AsyncIterator[Cluster]:
    mode, lines = SCRIPTS[script]
    namespace = own_namespace("script")
    groups: Sequence[WorkerGroup] = [WorkerGroup(each) for each, _ in lines]
    settings = ClusterSettings(str(model_dir), MODEL, tuple(groups), namespace=namespace, router_mode=mode)
    cluster = Cluster(settings, folder)
    cluster.nats_server, cluster.etcd_endpoints = brokers.nats_server, brokers.etcd_endpoints
    try:
        await cluster._start_frontend()
        for number, (each, (variables, command)) in enumerate(lines):
            environ = {**variables, "DYN_NAMESPACE": namespace, "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT": "20"}
            cluster.workers.append(await cluster._start_child(f"{each}-{number}", command, environ))
        for worker in cluster.workers:
            await cluster._registered(worker)
        await cluster.wait_for_model()
        yield cluster
    finally:
        codes = await cluster.stop()
    assert not any(codes.values()), codes


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_dynamos_runs_with_the_modules_name_changed(
    run: Run[Any], brokers: Brokers, exported: dict[str, str], model_dir: Path, tmp_path: Path, script: str
) -> None:
    async def twice() -> tuple[list[Any], list[Any], int, list[str]]:
        async with (
            as_in_the_script(script, brokers, tmp_path, model_dir) as cluster,
            recording(cluster) as recorded,
        ):
            # Short, so that the stand-in has room for two at once, and for all of them afterwards.
            words = ("one", "two", "three", "four", "five", "six")
            prompts = [f"{word} {PROMPT[:240]}" for word in words]
            routed = script == "agg_router"
            if routed:
                await eventually(lambda: len({s for _, s, _ in recorded.batches}) == 2, "heartbeats of both")
            first, second = [], []
            # Two at once, so that Dynamo's router gives them to both workers, where there are two.
            for pair in zip(prompts[::2], prompts[1::2], strict=True):
                first += await asyncio.gather(*(ask(cluster, prompt) for prompt in pair))
            for prompt in prompts:
                if routed:  # by then Dynamo's router has the projection of what was stored, and no load
                    await recorded.settled()
                second.append(await ask(cluster, prompt))
            storing = {source for _, source, batch in recorded.batches if batch.events}
            entries = [
                entry for entry in await cluster.entries() if entry.pid in {w.pid for w in cluster.workers}
            ]
            return first, second, len(storing), sorted(entry.engine for entry in entries)

    first, second, storing, engines = run(twice())

    assert engines == ["tensorrt_llm"] * len(SCRIPTS[script][1])
    assert {6} == {usage["completion_tokens"] for usage in [*first, *second]}
    # Each prompt comes again once. A router that is shown no blocks sends some of six to the other worker.
    for usage in second:
        assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] // 2, second
    if script == "agg_router":
        assert 2 == storing, "both workers hold some of the prompts"
