"""The production engine: TensorRT-LLM behind ``--engine tensorrt_llm``, imported when it starts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from vswa_plugin.engine import Engine, EngineSettings


@hookimpl
def vswa_engine_names() -> list[str]:
    from .package import ENGINE

    return [ENGINE]


# First, so that it goes before the embedded engine where none is named.
@hookimpl(tryfirst=True)
def vswa_engine(settings: EngineSettings) -> Engine | None:
    from .package import ENGINE, default_reason

    if settings.engine not in (ENGINE, "") or (not settings.engine and default_reason(os.environ) is None):
        return None
    from .engine import TensorRtLlmEngine

    return TensorRtLlmEngine(settings)
