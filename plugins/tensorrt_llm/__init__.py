"""The production engine: TensorRT-LLM behind ``--engine tensorrt_llm``, imported when it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from vswa_plugin.engine import Engine, EngineSettings

NAME = "tensorrt_llm"


@hookimpl
def vswa_engine_names() -> list[str]:
    return [NAME]


@hookimpl
def vswa_engine(settings: EngineSettings) -> Engine | None:
    if settings.engine != NAME:
        return None
    from .engine import TensorRtLlmEngine

    return TensorRtLlmEngine(settings)
