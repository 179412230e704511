"""TensorRT-LLM itself on a GPU: predicted against what the engine reused, and the four deployments.

Never run by the authors, who have no GPU. On a machine with an H100 or a GB200 and Gemma 3 1B at hand:

    pip install 'vswa-plugin[trtllm,test]' --extra-index-url https://pypi.nvidia.com
    export GEMMA3_MODEL_PATH=/models/gemma-3-1b-it
    python -m pytest tests/plugins/tensorrt_llm/test_gpu.py -m gpu -v --timeout 1800

A file of options other than engine_configs/gemma3/vswa_agg.yaml: GEMMA3_ENGINE_ARGS. The deployments with
phases apart need two GPUs, or one that both workers fit on: GEMMA3_DISAGG=1 runs them.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm.engine import TensorRtLlmEngine

from tests.tensorrt_llm_helpers import Router, asked, cached_of, workload
from vswa_plugin.engine.contract import ChunkDict, EngineSettings, RawEvent
from vswa_plugin.worker.engine_args import load_engine_args

CONFIGS = Path(__file__).parents[3] / "engine_configs" / "gemma3"
MODEL = os.environ.get("GEMMA3_MODEL_PATH")
ENGINE_ARGS = os.environ.get("GEMMA3_ENGINE_ARGS", str(CONFIGS / "vswa_agg.yaml"))
PORT = 18321
#: Longer than any pause of the polling thread, also on a busy machine.
QUIET_S = 0.5

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        MODEL is None or importlib.util.find_spec("tensorrt_llm") is None,
        reason="needs a GPU, tensorrt_llm and GEMMA3_MODEL_PATH; this file's docstring says how to run it",
    ),
]


class Gpu:
    """The real engine, and what it told."""

    def __init__(self, override: dict[str, Any]) -> None:
        options, source = load_engine_args(ENGINE_ARGS, json.dumps(override))
        self.engine = TensorRtLlmEngine(
            EngineSettings("tensorrt_llm", "agg", str(MODEL), "gemma", options, source)
        )
        self.events: dict[int, list[RawEvent]] = {}
        self.loop = asyncio.new_event_loop()
        self.engine.start(self._take)

    def _take(self, rank: int, events: Sequence[RawEvent]) -> None:
        self.events.setdefault(rank, []).extend(events)

    def settled(self) -> dict[int, list[RawEvent]]:
        """All events, once none has come for a while: nobody says how many there will be."""
        seen = -1
        while seen != (seen := sum(map(len, self.events.values()))):
            time.sleep(QUIET_S)
        return self.events

    def ask(self, request: dict[str, Any]) -> list[ChunkDict]:
        async def read() -> list[ChunkDict]:
            return [chunk async for chunk in self.engine.generate(request)]

        return self.loop.run_until_complete(read())


@pytest.fixture(params=["plenty", "scarce"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """``scarce``: so few blocks that most of what was stored is evicted again, sliding ones first."""
    override = (
        {} if request.param == "plenty" else {"kv_cache_config": {"max_tokens": 65_536, "host_cache_size": 0}}
    )
    started = Gpu(override)
    yield started
    started.engine.stop()
    started.loop.close()


def test_predicted_is_what_the_engine_reuses(gpu: Gpu) -> None:
    router = Router(gpu.engine.info)
    size = gpu.engine.info.layout.block_size
    off: Counter[int] = Counter()
    reused = 0
    for prompt, new in workload(1, 200, unit=60):
        router.listen(gpu.settled())
        predicted = router.predicted(prompt)
        actual = cached_of(gpu.ask(asked(prompt, new)))
        # A part of some other block that ends one token before its edge cannot be seen in hashes.
        if predicted // size != actual // size and actual % size != size - 1:
            off[predicted // size - actual // size] += 1
        reused += actual // size

    assert {} == dict(off)
    assert reused > 100


def test_the_engine_created_the_groups_that_were_declared(gpu: Gpu) -> None:
    gpu.ask(asked([2, 3, 4]))
    created = [event for event in gpu.settled()[0] if event["data"]["type"] == "created"]
    declared = [
        group.window_size or gpu.engine.info.context_length for group in gpu.engine.info.layout.groups
    ]

    assert sorted(declared) == sorted(event["window_size"] for event in created)


def completion(text: str) -> dict[str, Any]:
    body = {"model": "gemma", "prompt": text, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        read: dict[str, Any] = json.load(answer)
    return read


def await_model(process: subprocess.Popen[bytes], seconds: float = 1200) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the deployment has ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models", timeout=5) as answer:
                if json.load(answer)["data"]:
                    return
        except OSError:
            pass
        time.sleep(2)
    raise AssertionError("the model did not come up")


@pytest.mark.parametrize("router", ["exact", "stock"])
@pytest.mark.parametrize("topology", ["agg", "agg_router", "disagg", "disagg_router"])
def test_each_deployment_answers_and_reuses_a_repeated_prompt(
    topology: str, router: str, tmp_path: Path
) -> None:
    if topology.startswith("disagg") and os.environ.get("GEMMA3_DISAGG") != "1":
        pytest.skip("GEMMA3_DISAGG=1 runs it: two workers with a model each")
    if router == "stock" and not topology.endswith("router"):
        pytest.skip("the same without KV routing")
    environment = os.environ | {
        "VSWA_ENGINE": "tensorrt_llm",
        "ROUTER": router,
        "MODEL_PATH": str(MODEL),
        "SERVED_MODEL_NAME": "gemma",
        "AGG_ENGINE_ARGS": ENGINE_ARGS,
        "PREFILL_ENGINE_ARGS": str(CONFIGS / "vswa_prefill.yaml"),
        "DECODE_ENGINE_ARGS": str(CONFIGS / "vswa_decode.yaml"),
    }
    command = [sys.executable, "-m", "vswa_plugin.launch", topology, "--http-port", str(PORT)]
    if not topology.endswith("router"):
        del environment["ROUTER"]
    process = subprocess.Popen([*command, "--log-dir", str(tmp_path)], env=environment)
    try:
        await_model(process)
        text = " ".join(f"Item {number} is a sentence to be remembered." for number in range(400))
        first, second = completion(text), completion(text)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)

    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    usage = second["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    assert cached >= usage["prompt_tokens"] // 32 * 32 - 32
