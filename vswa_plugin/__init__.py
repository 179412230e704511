"""Exact KV-cache-aware routing for sliding-window models behind NVIDIA Dynamo."""

from __future__ import annotations

__version__ = "0.1.0"
