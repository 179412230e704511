"""Gemma 3 in all sizes as TensorRT-LLM's worker sees it: config.json, options, plan."""

from __future__ import annotations

from typing import Any

from vswa_plugins.tensorrt_llm.model_shape import parse_shape
from vswa_plugins.tensorrt_llm.options import TrtllmOptions, parse_options
from vswa_plugins.tensorrt_llm.package import Version
from vswa_plugins.tensorrt_llm.plan import make_plan
from vswa_plugins.tensorrt_llm.rules import decide

GEMMA = "Gemma3ForCausalLM"
UCX = {"cache_transceiver_config": {"backend": "UCX"}}
NEW, RC29, STABLE = Version(1, 4, 0), Version(1, 3, 0, 29), Version(1, 2, 1)
#: Arithmetic on the published config.json of each size: layers, window, sliding layers, context.
GEMMA3 = {
    "1b": (26, 512, 22, 32768),
    "4b": (34, 1024, 29, 131072),
    "12b": (48, 1024, 40, 131072),
    "27b": (62, 1024, 52, 131072),
}


def gemma3_config(size: str) -> dict[str, Any]:
    """As published: the bigger ones are multimodal and leave out what is Gemma 3's default."""
    layers, window, _, context = GEMMA3[size]
    text = {"model_type": "gemma3_text", "num_hidden_layers": layers, "sliding_window": window}
    if size == "1b":
        return {
            **text,
            "architectures": [GEMMA],
            "max_position_embeddings": context,
            "sliding_window_pattern": 6,
        }
    return {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}


def options_of(data: dict[str, Any], mode: str = "agg") -> TrtllmOptions:
    return parse_options(data, "args.yaml", mode)


def planned(data: dict[str, Any], version: Version = RC29, size: str = "1b") -> Any:
    options, shape = options_of(data), parse_shape(gemma3_config(size), "config.json")
    return make_plan(options, shape, decide(options, version, shape.architecture, {}))


def windows_of(data: dict[str, Any], version: Version = RC29) -> list[int | None]:
    return [group.window_size for group in planned(data, version).groups]


def kv(**options: Any) -> dict[str, Any]:
    return {"kv_cache_config": options}
