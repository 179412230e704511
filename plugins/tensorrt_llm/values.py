"""Values that TensorRT-LLM certainly refuses, and late: after its imports, or with the model loaded.

Each is refused here at once. What only some releases refuse, or only some machines, is left to the engine.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vswa_plugin.engine import Section, is_number

#: Options of ``kv_cache_config`` that are shares, each with whether zero is one too. Read in KvCacheConfig of
#: tensorrt_llm/llmapi/llm_args.py at commit 0004396720: limits of the fields and a validator.
_SHARES = {"free_gpu_memory_fraction": True, "max_util_for_resume": False}
#: Options of ``kv_cache_config`` that are counted in bytes: unsigned in the C++ configuration or in
#: KvCacheConfig.
_BYTES = ("host_cache_size", "max_gpu_total_bytes", "disk_cache_size")


def check_cache(top: Section, kv: Section) -> None:
    """What ``kv_cache_config`` may not hold. A number in a string is left to the engine, which reads some.

    :param top: the outermost options.
    :raises ConfigError: names the option.
    """
    _check_block(top, kv)
    for key, with_zero in _SHARES.items():
        value: Any = kv.data.get(key)
        if is_number(value) and not (0 < value <= 1 or (with_zero and value == 0)):
            raise kv.error(key, f"a number {'from' if with_zero else 'above'} 0 to 1", value)
    for key in _BYTES:
        value = kv.data.get(key)
        if is_number(value) and value < 0:
            raise kv.error(key, "a number of bytes of at least 0", value)
    _check_disk(kv)
    _check_ratio(kv)


def check_transfer_buffer(transceiver: Section, tokens_per_block: int, advice: str = "") -> None:
    """Refuse a buffer that is no whole number of blocks.

    The C++ transceiver asserts it in each release: CacheTransBufferManager in
    cpp/tensorrt_llm/batch_manager/cacheTransBuffer.cpp, from 2025 to 1.4, and in reports of 1.2.0rc6
    (ai-dynamo/aiconfigurator #375). That of the runtime PYTHON does not read the number
    (tensorrt_llm/_torch/disaggregation/transceiver.py at commit 00620eb025).

    :raises ConfigError: names the option, its value and the block size.
    """
    tokens = transceiver.integer("max_tokens_in_buffer", None, low=0)
    if not tokens or tokens % tokens_per_block == 0:
        return
    below = tokens - tokens % tokens_per_block
    near = " or ".join(str(each) for each in (below, below + tokens_per_block) if each)
    raise transceiver.error(
        "max_tokens_in_buffer",
        f"whole blocks of {tokens_per_block} tokens (kv_cache_config.tokens_per_block), e.g. {near}",
        tokens,
        f"the engine loads the model and then does not start{advice}",
    )


def _check_block(top: Section, kv: Section) -> None:
    """KVBlockArray in cpp/tensorrt_llm/kernels/kvCacheUtils.h, which attention by TRTLLM builds."""
    size = kv.integer("tokens_per_block", 32)
    if size & (size - 1) and str(top.data.get("attn_backend") or "TRTLLM").upper() == "TRTLLM":
        raise kv.error("tokens_per_block", "a power of 2, as attn_backend TRTLLM needs", size)


def _check_disk(kv: Section) -> None:
    """KvCacheConfig.validate_disk_cache_config of the commit above."""
    if not kv.data.get("disk_cache_size"):
        return
    path = kv.text("disk_cache_path", None)
    if path is None or not Path(path).is_dir():
        raise kv.error("disk_cache_path", "a directory, as disk_cache_size is given", path)


def _check_ratio(kv: Section) -> None:
    """KvCacheConfig.validate_pool_ratio of the commit above."""
    ratio: Any = kv.data.get("pool_ratio")
    if not isinstance(ratio, list) or not all(map(is_number, ratio)):
        return
    if any(share <= 0 for share in ratio) or not math.isclose(sum(ratio), 1.0, rel_tol=0.0, abs_tol=1e-6):
        raise kv.error("pool_ratio", "numbers above 0 whose sum is 1", ratio)
