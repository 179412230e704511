"""The names of TensorRT-LLM's options: every one passes, in its own section only, with both engines."""

from __future__ import annotations

from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.serving.options import parse_options as parse_for_gemma3_cpu
from vswa_plugins.tensorrt_llm.options import parse_options
from vswa_plugins.trtllm_events.names import NAMES, option_names

from vswa_plugin.errors import ConfigError

SECTIONS = ("", "kv_cache_config", "cache_transceiver_config")
EVERY = [(each.section, name) for each in NAMES for name in sorted(each.names)]
#: Names of 1.3.0rc27 to 1.4.0rc4 that were refused before.
ONCE_REFUSED = {
    "": """
        generation_config custom_tokenizer kv_cache_compression_config perf_metrics_output_dir
        encoder_cuda_graph_config enable_encoder_decoder_mixed_cuda_graph enable_mla_skip_correction
        mla_skip_correction_threshold enable_in_graph_sampling prefill_cuda_graph_backend
        prefill_capture_num_tokens use_fine_grained_sync checkpoint_io_policy ray_worker_nsight_options
        sleep_config
    """,
    "kv_cache_config": """
        mamba_state_config disk_io_threads disk_keep_copy_after_restore disk_write_through
        disk_protected_copy_fraction host_cache_bind_to_gpu_numa_node cold_tier_offload_min_priority
        kv_pool_rebalance_check_interval kv_pool_rebalance_cooldown_secs
        kv_pool_rebalance_min_sampled_kv_caches kv_pool_rebalance_moving_average_decay
        kv_pool_rebalance_ratio_threshold kv_pool_rebalance_target_ratio_update_interval
        fp8_context_mla_kv_len_cap mixed_precision_first_n iteration_stats_interval kv_events_config
    """,
    "cache_transceiver_config": """
        enable_pipelined_transfer agent_bounce_buffer_enable agent_bounce_params
    """,
}


def within(section: str, name: str, value: object = None) -> dict[str, Any]:
    return {section: {name: value}} if section else {name: value}


def test_every_name_is_listed_once_and_says_where_it_was_read() -> None:
    assert len(EVERY) == len(set(EVERY)) == sum(len(option_names(section)) for section in SECTIONS)
    assert {each.section for each in NAMES} == set(SECTIONS)
    assert all(each.read for each in NAMES)


@pytest.mark.parametrize(("section", "name"), EVERY)
def test_a_real_option_passes_and_one_letter_more_does_not(section: str, name: str) -> None:
    parse_options(within(section, name), "args.yaml", "agg")
    with pytest.raises(ConfigError, match=f"unknown option.*{name}x.*args.yaml"):
        parse_options(within(section, f"{name}x"), "args.yaml", "agg")


@pytest.mark.parametrize("section", SECTIONS)
def test_names_of_newer_releases_pass(section: str) -> None:
    assert set(ONCE_REFUSED[section].split()) <= option_names(section)


@pytest.mark.parametrize("section", ["", "kv_cache_config"])
def test_the_embedded_engine_reads_the_same_file(section: str) -> None:
    for name in option_names(section):
        parse_for_gemma3_cpu(within(section, name), "args.yaml")


def test_an_option_that_changes_what_the_cache_holds_is_refused_by_the_embedded_engine() -> None:
    with pytest.raises(ConfigError, match="kv_cache_compression_config: expected no value"):
        parse_for_gemma3_cpu({"kv_cache_compression_config": {"algorithm": "triattention"}}, "args.yaml")


def test_a_section_that_is_not_checked_passes_as_it_is_and_an_unknown_one_does_not() -> None:
    section = {"whatever": {"it": ["holds"]}}

    assert section == parse_options({"moe_config": section}, "args.yaml", "agg").llm_args["moe_config"]
    with pytest.raises(ConfigError, match=r"unknown option 'moe_konfig'.*did you mean 'moe_config'"):
        parse_options({"moe_konfig": section}, "args.yaml", "agg")
