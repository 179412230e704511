"""Keys of other tools, releases and places: both engines that read TensorRT-LLM's files say what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import vswa_plugins.gemma3_cpu.serving.options as gemma3_cpu
import vswa_plugins.tensorrt_llm.options as tensorrt_llm
from vswa_plugins.trtllm_events.elsewhere import ELSEWHERE

from vswa_plugin.errors import ConfigError

PARSERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "gemma3_cpu": lambda options: gemma3_cpu.parse_options(options, "agg.yaml"),
    "tensorrt_llm": lambda options: tensorrt_llm.parse_options(options, "agg.yaml", "agg"),
}
PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "a former section": ({"build_config": {"max_batch_size": 8}}, "max_batch_size"),
    "vLLM": ({"max_model_len": 8192}, "write max_seq_len"),
    "vLLM, as on its command line": ({"max-model-len": 8192}, "write max_seq_len"),
    "SGLang": ({"page_size": 32}, "write kv_cache_config.tokens_per_block"),
    "of a section, at the top": (
        {"max_attention_window": [512]},
        "write kv_cache_config.max_attention_window",
    ),
    "of the top, in a section": ({"kv_cache_config": {"max_batch_size": 8}}, "to the top level of the file"),
    "a command line option": ({"model_path": "/m"}, "--model-path on the command line"),
    "Kubernetes": ({"kind": "ConfigMap"}, "give the file that stands under its data"),
}


@pytest.mark.parametrize("engine", PARSERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_key_of_another_place_is_refused_with_what_to_write_here(place: str, engine: str) -> None:
    options, hint = PLACES[place]
    with pytest.raises(ConfigError) as refused:
        PARSERS[engine](options)

    assert hint in str(refused.value)
    assert "did you mean" not in str(refused.value)


#: gemma3_cpu ignores it: it stands in files for trtllm-serve.
TAKEN = {("gemma3_cpu", "model")}


@pytest.mark.parametrize(("engine", "key"), sorted({(e, k) for e in PARSERS for k in ELSEWHERE} - TAKEN))
def test_no_key_is_called_misplaced_and_taken(engine: str, key: str) -> None:
    """Of a key that an engine has, the table would never be read."""
    with pytest.raises(ConfigError, match=f"unknown option '{key}' in agg.yaml"):
        PARSERS[engine]({key: 1})
