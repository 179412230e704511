"""TensorRT-LLM's KV cache manager V1, both its reuse rules. Read in its sources, not run."""

from .manager import CacheManagerV1

__all__ = ["CacheManagerV1"]
