"""The rules of TensorRT-LLM's KV cache manager V2: its matching, commits, eviction, host tier and events."""

from .manager import CacheManager
from .sequence import CacheSequence

__all__ = ["CacheManager", "CacheSequence"]
