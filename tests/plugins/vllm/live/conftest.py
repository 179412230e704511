"""A real vLLM on the processor, for the tests of this folder. Without the package they are skipped."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

#: How vLLM runs on a processor that it shares with others.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # NIXL between engines of this machine alone.
    "UCX_NET_DEVICES": "lo",
}
#: Options that all engines of these tests share: a pool that is soon full.
OPTIONS: dict[str, Any] = {
    "block_size": 32,
    "max_model_len": 2048,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 600,
    "enforce_eager": True,
    "dtype": "float32",
    "gpu_memory_utilization": 0.3,
}

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _processor() -> None:
    """For this process and all that it starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
