"""The KV cache of the embedded engine: block pools, a token tree and TensorRT-LLM's events.

``api`` defines what the engine needs of a manager, ``v2`` and ``v1`` are TensorRT-LLM's two.
"""

from .api import CacheManager, CacheSequence, PageMover, Slot
from .spec import GroupSpec

__all__ = ["CacheManager", "CacheSequence", "GroupSpec", "PageMover", "Slot"]
