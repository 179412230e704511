"""The KV cache of the embedded engine: one block pool per window, one token tree, TensorRT-LLM's events."""

from .manager import CacheManager
from .sequence import CacheSequence
from .spec import GroupSpec

__all__ = ["CacheManager", "CacheSequence", "GroupSpec"]
