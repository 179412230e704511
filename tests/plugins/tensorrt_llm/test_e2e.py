"""A prefill and a decode worker of TensorRT-LLM behind Dynamo's own frontend; the package is the stand-in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import post
from tests.tensorrt_llm_helpers import NIXL
from tests.tensorrt_llm_package import install
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.topologies import WorkerGroup

ROOT = Path(__file__).parents[3]
OPTIONS = {"kv_cache_config": {"max_attention_window": [512] * 5 + [8192]}, **NIXL}


def plugin_options() -> tuple[str, ...]:
    """Installed from an older wheel, the plugin has no entry point yet."""
    registered = {point.name for point in entry_points(group="vswa_plugin")}
    return () if "tensorrt_llm" in registered else ("--plugin", "vswa_plugins.tensorrt_llm")


@pytest.fixture
def phases(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    install(tmp_path / "site", "1.3.0rc29")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
    settings = ClusterSettings(
        model_path=str(model_dir),
        served_model_name="gemma",
        engine="tensorrt_llm",
        namespace="trtllm",
        groups=(WorkerGroup("prefill", override=OPTIONS), WorkerGroup("decode", override=OPTIONS)),
        worker_options=plugin_options(),
    )
    made = Cluster(settings, tmp_path)
    made.nats_server, made.etcd_endpoints = brokers.nats_server, brokers.etcd_endpoints
    try:
        run(made.start())
        yield made
    finally:
        codes = run(made.stop())
    assert all(code == 0 for code in codes.values()), codes


def test_dynamos_prefill_router_takes_what_the_prefill_worker_hands_over(
    run: Run[Any], phases: Cluster
) -> None:
    async def ask(**more: Any) -> tuple[int, Any]:
        body = {"model": "gemma", "prompt": "hello world " * 150, "max_tokens": 6, **more}
        return await post(phases, "/v1/completions", body)

    answers = [run(ask()) for _ in range(2)]
    refused = run(ask(n=2))

    assert [200, 200] == [status for status, _ in answers]
    usages = [answer["usage"] for _, answer in answers]
    prompt_len = usages[0]["prompt_tokens"]
    assert [6, 6] == [usage["completion_tokens"] for usage in usages]
    assert [0, prompt_len - 1] == [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert 400 == refused[0]
    assert refused[1]["message"].startswith("n: expected 1: ")
