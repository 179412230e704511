"""What each release of TensorRT-LLM refuses among its options, as its strict models and its start do.

The names of 1.2 are those of its own API reference (tests/unittest/api_stability of that time), written here
once more. Of later releases the table of option names is taken apart by where each was read.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from vswa_plugins.tensorrt_llm.package import Version
from vswa_plugins.trtllm_events.names import NAMES

_SECTIONS = ("kv_cache_config", "cache_transceiver_config")
_OF_12 = {
    "": """
        tensor_parallel_size dtype revision tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init
        trust_remote_code pipeline_parallel_size context_parallel_size moe_tensor_parallel_size
        moe_expert_parallel_size moe_cluster_parallel_size enable_lora lora_config batched_logits_processor
        guided_decoding_backend speculative_config max_batch_size max_input_len max_seq_len max_beam_width
        max_num_tokens load_format enable_tqdm enable_chunked_prefill kv_cache_config stream_interval
        gpus_per_node enable_attention_dp cp_config iter_stats_max_iterations request_stats_max_iterations
        return_perf_metrics peft_cache_config scheduler_config cache_transceiver_config
        gather_generation_logits num_postprocess_workers postprocess_tokenizer_dir reasoning_parser
        fail_fast_on_attention_window_too_large garbage_collection_gen0_threshold backend cuda_graph_config
        attention_dp_config checkpoint_loader checkpoint_format mm_encoder_only disable_overlap_scheduler
        moe_config attn_backend sampler_type enable_iter_perf_stats enable_iter_req_stats
        batch_wait_timeout_ms batch_wait_timeout_iters batch_wait_max_tokens_ratio print_iter_log
        perf_metrics_max_requests torch_compile_config enable_autotuner enable_layerwise_nvtx_marker
        enable_min_latency force_dynamic_quantization allreduce_strategy decoding_config kv_connector_config
        enable_lm_head_tp_in_adp orchestrator_type sparse_attention_config ray_worker_extension_cls
    """,
    "kv_cache_config": """
        enable_block_reuse max_tokens max_attention_window sink_token_length free_gpu_memory_fraction
        host_cache_size onboard_blocks cross_kv_cache_fraction secondary_offload_min_priority
        event_buffer_max_size attention_dp_events_gather_period_ms enable_partial_reuse
        copy_on_partial_reuse use_uvm max_gpu_total_bytes dtype mamba_ssm_cache_dtype tokens_per_block
    """,
    "cache_transceiver_config": """
        backend max_tokens_in_buffer kv_transfer_timeout_ms kv_transfer_sender_future_timeout_ms
    """,
}


def installed() -> Version:
    version = Version.parse(importlib.metadata.version("tensorrt-llm"))
    assert version is not None
    return version


def check_options(version: Version, options: Mapping[str, Any], architecture: str) -> None:
    """Raise what that release raises: ValueError for a name, RuntimeError where it does not start."""
    for section in ("", *_SECTIONS):
        known = _known(version, section)
        for name in options if not section else options.get(section) or ():
            if name not in known:
                raise ValueError(f"{section or 'TorchLlmArgs'}.{name}: Extra inputs are not permitted")
    kv = options.get("kv_cache_config") or {}
    asked = kv.get("use_kv_cache_manager_v2") is True
    if asked and version < Version(1, 3, 0, 20) and kv.get("event_buffer_max_size"):
        raise RuntimeError("Executor worker returned error: event_buffer_max_size must be 0")
    if not 0 <= kv.get("free_gpu_memory_fraction", 0.9) <= 1:
        raise ValueError("kv_cache_config.free_gpu_memory_fraction must be a float between 0 and 1")
    transceiver = options.get("cache_transceiver_config") or {}
    backend, python = transceiver.get("backend"), _runtime(version, transceiver, architecture)
    if backend not in (None, "DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI"):
        raise ValueError(f"cache_transceiver_config.backend: Input should be 'DEFAULT', 'UCX', ... {backend}")
    if backend not in (None, "DEFAULT", "NIXL") and python:
        raise RuntimeError("Python transceiver currently only supports the NIXL backend")
    buffer, block = transceiver.get("max_tokens_in_buffer") or 0, kv.get("tokens_per_block", 32)
    if backend is not None and not python and buffer % block:
        raise RuntimeError("Executor worker returned error: maxNumTokens.value() % tokensPerBlock == 0")


def _known(version: Version, section: str) -> set[str]:
    if version < Version(1, 3, 0, 0):
        return set(_OF_12[section].split())
    new = version >= Version(1, 4, 0, 1)
    lists = [each for each in NAMES if each.section == section]
    return {name for each in lists if new or "1.4.0rc4" not in each.read for name in each.names}


def _runtime(version: Version, transceiver: Mapping[str, Any], architecture: str) -> bool:
    """Whether the Python transceiver is used."""
    default = "PYTHON" if version >= Version(1, 4, 0, 1) else "auto"
    runtime = transceiver.get("transceiver_runtime", default)
    if runtime == "auto":
        return version >= Version(1, 3, 0, 26) and architecture.startswith("Gemma3")
    return runtime == "PYTHON"
