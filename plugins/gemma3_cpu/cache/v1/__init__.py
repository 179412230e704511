"""TensorRT-LLM's KV cache manager V1, both its reuse rules. Compared with a transcription."""

from .manager import CacheManagerV1

__all__ = ["CacheManagerV1"]
