"""vLLM's KV cache events, with their cache groups, from any source: a subscriber, or a trace."""

from __future__ import annotations

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import EventAdapter
from vswa_plugin.hookspecs import hookimpl

from .adapter import VllmEventAdapter

__all__ = ["VllmEventAdapter"]


@hookimpl
def vswa_event_adapter(event_format: str, layout: CacheLayout) -> EventAdapter | None:
    """Answer for the format ``vllm``."""
    return VllmEventAdapter(layout) if event_format == "vllm" else None
