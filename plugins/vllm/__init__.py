"""A live vLLM behind ``--engine vllm``, imported when it starts; its events, and the losses among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from vswa_plugin.blocks import CacheLayout
    from vswa_plugin.engine import Engine, EngineSettings, EventAdapter, EventSource, SourceSettings


@hookimpl
def vswa_engine_names() -> list[str]:
    from .package import ENGINE

    return [ENGINE]


@hookimpl
def vswa_engine(settings: EngineSettings) -> Engine | None:
    from .package import ENGINE

    if settings.engine != ENGINE:
        return None
    from .engine import VllmEngine

    return VllmEngine(settings)


@hookimpl
def vswa_event_source(settings: SourceSettings) -> EventSource | None:
    from .package import ENGINE

    if settings.engine != ENGINE:
        return None
    from .source import VllmSource

    return VllmSource(settings)


# First: it reads what `vllm_events` reads, and the losses that the receiver of the batches reports besides.
@hookimpl(tryfirst=True)
def vswa_event_adapter(event_format: str, layout: CacheLayout) -> EventAdapter | None:
    from .adapter import FORMAT, LiveEventAdapter

    return LiveEventAdapter(layout) if event_format == FORMAT else None
