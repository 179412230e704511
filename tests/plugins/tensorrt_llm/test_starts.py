"""The shipped option files, and Dynamo's own, start with every release that they are for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm.engine import TensorRtLlmEngine

from tests import tensorrt_llm_package
from tests.tensorrt_llm_helpers import Installer, settings_for
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_models import GEMMA3, gemma3_config
from tests.tensorrt_llm_package import LLM
from vswa_plugin.engine.contract import MODES
from vswa_plugin.errors import ConfigError
from vswa_plugin.worker.engine_args import load_engine_args

CONFIGS = Path(__file__).parents[3] / "engine_configs" / "gemma3"
RELEASES = ("1.2.1", "1.3.0rc5", "1.3.0rc20", "1.3.0rc26", "1.3.0rc29", "1.4.0rc1", "1.4.0")


@pytest.fixture
def starts(install_standin: Installer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts an engine for a Gemma 3 of a size, whose caches are not made."""
    monkeypatch.setattr(tensorrt_llm_package, "_manager", lambda kwargs, rank: Idle())
    monkeypatch.setattr(LLM, "get_kv_cache_capacity", lambda llm: {"maxNumBlocks": 5000})
    engines: list[TensorRtLlmEngine] = []

    def start(release: str, size: str, mode: str, options: dict[str, Any]) -> LLM:
        model = tmp_path / f"gemma-{size}"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(gemma3_config(size)))
        for name in ("tokenizer.json", "model.safetensors"):
            (model / name).write_text("{}")
        install_standin(release)
        engines.append(TensorRtLlmEngine(settings_for(model, options, mode)))
        engines[-1].start(lambda rank, events: None)
        return LLM.made[-1]

    yield start
    for engine in engines:
        engine.stop()


class Idle:
    """A cache manager in which nothing happens."""

    def flush_events(self) -> list[Any]:
        return []


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("size", GEMMA3)
@pytest.mark.parametrize("mode", MODES)
def test_a_shipped_file_starts(starts: Any, mode: str, size: str, release: str) -> None:
    file = CONFIGS / f"vswa_{mode}{'' if size == '1b' else f'_{size}'}.yaml"
    llm = starts(release, size, mode, load_engine_args(str(file), None)[0])

    assert "max_attention_window" in llm.kwargs["kv_cache_config"]
    assert llm.kwargs["kv_cache_config"]["event_buffer_max_size"] > 0
    assert ("cache_transceiver_config" in llm.kwargs) == (mode != "agg")
    assert llm.kwargs.get("disable_overlap_scheduler", False) == (mode == "prefill")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_dynamos_own_file_starts(starts: Any, mode: str, release: str) -> None:
    """UCX and no runtime, as in Dynamo's repository; what is asked of the tokenizer is undone."""
    options = {
        "tensor_parallel_size": 1,
        "backend": "pytorch",
        "skip_tokenizer_init": True,
        "kv_cache_config": {"max_attention_window": [512, 512, 512, 512, 512, 32768]},
        "cache_transceiver_config": {"backend": "UCX", "max_tokens_in_buffer": 16384},
    }
    llm = starts(release, "1b", mode, options)

    assert llm.tokenizer is not None
    assert llm.kwargs["cache_transceiver_config"]["backend"] == "UCX"


@pytest.mark.parametrize(
    ("release", "options", "words"),
    [
        (
            "1.2.1",
            {"kv_cache_config": {"pool_ratio": [0.5, 0.5]}},
            "kv_cache_config.pool_ratio: Extra inputs",
        ),
        (
            "1.3.0rc29",
            {"cache_transceiver_config": {"agent_bounce_params": {}}},
            "agent_bounce_params: Extra",
        ),
    ],
)
def test_an_option_of_another_release_is_refused_in_the_engines_words(
    starts: Any, release: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"TensorRT-LLM does not take these options: .*{words}"):
        starts(release, "1b", "agg", options)


def test_the_standin_does_not_start_where_the_release_does_not(starts: Any, tmp_path: Path) -> None:
    """Else the tests above could not fail."""
    starts("1.3.0rc29", "1b", "agg", {})
    for arguments, words in (
        ({"cache_transceiver_config": {"backend": "UCX"}}, "only supports the NIXL backend"),
        ({"kv_cache_configs": {}}, "Extra inputs are not permitted"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=words):
            LLM(tmp_path / "gemma-1b", **arguments)
