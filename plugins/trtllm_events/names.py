"""The names of TensorRT-LLM's options, with where each was read. Data.

TensorRT-LLM's own models of its options forbid other names, each release its own. Here are the names of all
of them together, so that a misspelt one is refused at once and a real one never is. A section that is no part
of this list is let through by its name, with whatever stands in it.
"""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """Names that were read in one place.

    :param section: of the file; empty: its top level.
    :param read: where.
    """

    section: str
    read: str
    names: frozenset[str]


def _names(section: str, read: str, names: str) -> Names:
    return Names(section, read, frozenset(names.split()))


_KV, _TRANSCEIVER = "kv_cache_config", "cache_transceiver_config"
_SOURCE = "tensorrt_llm/llmapi/llm_args.py at commit 0004396720 (2026, between 1.3.0rc27 and 1.4.0rc1)"
_OLDER = "references of 1.2 and of release candidates of 1.3; the commit above has them no more"
_NEWER = "reference pages of 1.4.0rc1 and 1.4.0rc4"

NAMES = (
    _names(
        "",
        f"{_SOURCE}: BaseLlmArgs, TorchLlmArgs; but for model and mpi_session, which no file gives",
        """
        allreduce_strategy attention_dp_config attn_backend backend batch_wait_max_tokens_ratio
        batch_wait_timeout_iters batch_wait_timeout_ms batched_logits_processor cache_transceiver_config
        checkpoint_format checkpoint_io_policy checkpoint_loader context_parallel_size cp_config
        cuda_graph_config custom_tokenizer decoding_config disable_mm_encoder disable_overlap_scheduler dtype
        dwdp_config enable_attention_dp enable_autotuner enable_chunked_prefill
        enable_early_first_token_response enable_encoder_decoder_mixed_cuda_graph enable_energy_metrics
        enable_in_graph_sampling enable_iter_perf_stats enable_iter_req_stats enable_layerwise_nvtx_marker
        enable_lm_head_tp_in_adp enable_lora enable_low_latency_host_dispatch enable_min_latency
        enable_mla_skip_correction enable_resource_governor enable_speculative_beam_history_d2h encode_only
        encoder_cuda_graph_config encoder_max_batch_size encoder_max_num_tokens env_overrides
        force_dynamic_quantization garbage_collection_gen0_threshold gather_generation_logits
        generation_config gms_config gpus_per_node guided_decoding_backend iter_stats_max_iterations
        kv_cache_compression_config kv_cache_config kv_connector_config layer_wise_benchmarks_config
        load_format lora_config max_batch_size max_beam_width max_input_len max_num_tokens max_seq_len
        max_stats_len mla_skip_correction_threshold mm_encoder_only model_kwargs moe_cluster_parallel_size
        moe_config moe_expert_parallel_size moe_tensor_parallel_size multimodal_config mx_config
        num_postprocess_workers num_serve_frontends nvfp4_gemm_config orchestrator_type otlp_traces_endpoint
        peft_cache_config perf_metrics_max_requests perf_metrics_output_dir pipeline_parallel_size
        post_processor_hook postprocess_tokenizer_dir pp_partition prefill_capture_num_tokens
        prefill_cuda_graph_backend print_iter_log prometheus_metrics_config ray_placement_config
        ray_worker_extension_cls ray_worker_nsight_options reasoning_parser reorder_policy_config
        request_stats_max_iterations return_perf_metrics revision sampler_force_async_worker sampler_type
        scheduler_config skip_tokenizer_init sleep_config sparse_attention_config speculative_config
        stream_interval telemetry_config tensor_parallel_size tokenizer tokenizer_mode tokenizer_revision
        torch_compile_config trust_remote_code use_cute_dsl_bf16_bmm use_cute_dsl_bf16_gemm
        use_cute_dsl_blockscaling_bmm use_cute_dsl_blockscaling_mm use_fine_grained_sync
        """,
    ),
    _names(
        "",
        _OLDER,
        """
        autotuner_enabled disable_flashinfer_sampling enable_tqdm enable_trtllm_sampler encoder_max_num_items
        extended_runtime_perf_knob_config fail_fast_on_attention_window_too_large moe_backend quant_config
        use_cuda_graph video_pruning_rate
        """,
    ),
    _names(
        _KV,
        f"{_SOURCE}: KvCacheConfig",
        """
        attention_dp_events_gather_period_ms avg_seq_len block_reuse_config copy_on_partial_reuse
        cross_kv_cache_fraction disk_cache_path disk_cache_size disk_prefetch_num_reqs dtype
        enable_block_reuse enable_kv_pool_rebalance enable_partial_reuse enable_swa_scratch_reuse
        event_buffer_max_size fp8_context_mla_kv_len_cap free_gpu_memory_fraction host_cache_size
        iteration_stats_interval kv_cache_event_hash_algo kv_events_config kv_pool_rebalance_check_interval
        kv_pool_rebalance_cooldown_secs kv_pool_rebalance_min_sampled_kv_caches
        kv_pool_rebalance_moving_average_decay kv_pool_rebalance_ratio_threshold
        kv_pool_rebalance_target_ratio_update_interval mamba_ssm_cache_dtype mamba_ssm_philox_rounds
        mamba_ssm_stochastic_rounding mamba_state_cache_interval mamba_state_config max_attention_window
        max_gpu_total_bytes max_tokens max_util_for_resume pool_ratio secondary_offload_min_priority
        sink_token_length tokens_per_block use_kv_cache_manager_v2 use_uvm
        """,
    ),
    _names(_KV, _OLDER, "block_reuse_policy onboard_blocks"),
    _names(
        _KV,
        _NEWER,
        """
        cold_tier_offload_min_priority disk_io_threads disk_keep_copy_after_restore
        disk_protected_copy_fraction disk_write_through host_cache_bind_to_gpu_numa_node
        mixed_precision_first_n
        """,
    ),
    _names(
        _TRANSCEIVER,
        f"{_SOURCE}: CacheTransceiverConfig",
        """
        backend enable_pipelined_transfer kv_cache_bounce_size_mb kv_transfer_poll_interval_ms
        kv_transfer_sender_future_timeout_ms kv_transfer_timeout_ms max_tokens_in_buffer transceiver_runtime
        """,
    ),
    _names(_TRANSCEIVER, _NEWER, "agent_bounce_buffer_enable agent_bounce_params"),
)


def option_names(section: str = "") -> frozenset[str]:
    """The names of TensorRT-LLM's options in ``section`` of a file, of all releases together."""
    return frozenset().union(*(each.names for each in NAMES if each.section == section))
