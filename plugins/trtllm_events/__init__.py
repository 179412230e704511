"""TensorRT-LLM's KV events, from any source: TensorRT-LLM itself, the embedded engine, traces."""

from __future__ import annotations

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import EventAdapter
from vswa_plugin.hookspecs import hookimpl

from .adapter import LORA_SERVED, TrtllmEventAdapter
from .elsewhere import indented, misplaced
from .hashing import HASH_ALGO, block_key, chain_keys, salt_id
from .names import option_names

__all__ = [
    "HASH_ALGO",
    "LORA_SERVED",
    "TrtllmEventAdapter",
    "block_key",
    "chain_keys",
    "indented",
    "misplaced",
    "option_names",
    "salt_id",
]


@hookimpl
def vswa_event_adapter(event_format: str, layout: CacheLayout) -> EventAdapter | None:
    """Answer for the format ``trtllm``."""
    return TrtllmEventAdapter(layout) if event_format == "trtllm" else None
