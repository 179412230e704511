"""The option files for Gemma 3 that come with us."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from vswa_plugins.gemma3_cpu.serving.options import parse_options as parse_for_gemma3_cpu
from vswa_plugins.tensorrt_llm.model_shape import parse_shape
from vswa_plugins.tensorrt_llm.options import parse_options
from vswa_plugins.tensorrt_llm.plan import make_plan
from vswa_plugins.tensorrt_llm.rules import decide

from tests.tensorrt_llm_models import GEMMA, GEMMA3, RC29, UCX, gemma3_config, options_of
from vswa_plugin.engine.contract import MODES
from vswa_plugin.worker.engine_args import load_engine_args

CONFIGS = Path(__file__).parents[3] / "engine_configs" / "gemma3"


def config_files() -> list[Path]:
    return sorted(CONFIGS.glob("*.yaml"))


def test_there_is_a_file_for_each_size_and_mode() -> None:
    sizes = {"": "1b", "_4b": "4b", "_12b": "12b", "_27b": "27b"}

    assert sorted(f"vswa_{mode}{size}.yaml" for mode in MODES for size in sizes) == [
        path.name for path in config_files()
    ]


@pytest.mark.parametrize("path", config_files(), ids=lambda path: path.stem)
def test_a_file_says_source_and_date_and_agrees_with_the_models_windows(path: Path) -> None:
    head = [line for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    _, mode, *rest = path.stem.split("_")
    size = rest[0] if rest else "1b"
    layers, window, _, context = GEMMA3[size]
    loaded, source = load_engine_args(str(path), None)
    options = parse_options(loaded, source, mode)
    shape = parse_shape(gemma3_config(size), "config.json")
    decision = decide(options, RC29, shape.architecture, {})
    plan = make_plan(options, shape, decision)

    assert f"gemma-3-{size}-it" in head[0]
    assert any(line.startswith("# Engine: tensorrt_llm, ") for line in head)
    assert {"Source", "date 2026-11-23"} <= {
        word for word in ("Source", "date 2026-11-23") if word in " ".join(head)
    }
    assert (window, None) == tuple(group.window_size for group in plan.groups)
    assert context == plan.context_length
    assert "trtllm_v2" == decision.rule
    # Layer by layer, not only as a set.
    pattern = options.max_attention_window or ()
    assert tuple(w or context for w in shape.windows) == tuple(
        pattern[i % len(pattern)] for i in range(layers)
    )
    # The embedded engine reads the same file.
    assert pattern == parse_for_gemma3_cpu(loaded, source).max_attention_window
    if mode != "agg":
        assert context <= loaded["cache_transceiver_config"]["max_tokens_in_buffer"]


def test_prefill_and_decode_files_of_one_size_have_the_same_cache() -> None:
    for size in ("", "_4b", "_12b", "_27b"):
        prefill, decode = (
            yaml.safe_load((CONFIGS / f"vswa_{mode}{size}.yaml").read_text())
            for mode in ("prefill", "decode")
        )
        for key in ("kv_cache_config", "cache_transceiver_config", "max_seq_len"):
            assert prefill.get(key) == decode.get(key)


def test_nvidias_own_transceiver_choice_means_manager_v1() -> None:
    """Dynamo's files for this guide say UCX; ours differ from them in nothing else that matters here."""
    loaded = yaml.safe_load((CONFIGS / "vswa_decode.yaml").read_text()) | UCX

    assert "trtllm_v1" == decide(options_of(loaded, "decode"), RC29, GEMMA, {}).rule
