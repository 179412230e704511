"""Options of the embedded engine, and the cache groups and pools that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from vswa_plugins.gemma3_cpu.serving.options import SECTION, EngineOptions, parse_options
from vswa_plugins.gemma3_cpu.serving.pools import CachePlan, ModelShape, plan_cache

from vswa_plugin.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "engine_configs" / "gemma3"
FIVE_TO_ONE = (512, 512, 512, 512, 512, None)
SMALL = ModelShape(FIVE_TO_ONE, context_length=8192, bytes_per_token=256)
GEMMA_1B = ModelShape((FIVE_TO_ONE * 5)[:26], context_length=32_768, bytes_per_token=2048)
#: Those of which each committed config names its own.
SIZES = {
    f"{name}b": ModelShape(((1024,) * 5 + (None,)) * (layers // 6) + (1024,) * (layers % 6), 131_072, width)
    for name, layers, width in ((4, 34, 8192), (12, 48, 16_384), (27, 62, 16_384))
}
MIB = 1 << 20


def windows(plan: CachePlan) -> list[int | None]:
    return [pool.group.window_size for pool in plan.pools]


def blocks(plan: CachePlan) -> dict[int | None, int]:
    return {pool.group.window_size: pool.num_blocks for pool in plan.pools}


def plan(data: dict[str, Any], shape: ModelShape = SMALL) -> CachePlan:
    return plan_cache(parse_options(data, "FILE"), shape)


def test_no_options_give_the_defaults() -> None:
    assert EngineOptions() == parse_options({})


def test_options_are_read() -> None:
    data = {
        "max_batch_size": 4,
        "max_num_tokens": 100,
        "max_seq_len": 2048,
        "kv_cache_config": {
            "max_attention_window": [512, 2048],
            "tokens_per_block": 16,
            "max_tokens": 4096,
            "enable_block_reuse": False,
            "enable_partial_reuse": False,
            "event_buffer_max_size": 0,
            "host_cache_size": 1 << 20,
            "use_kv_cache_manager_v2": False,
        },
        "gemma3_cpu": {
            "kv_blocks": {512: 200, "global": 600},
            "kv_memory_mb": 64,
            "max_queue_size": 3,
            "max_chunk_tokens": 64,
            "threads": 2,
            "debug_step_delay_s": 5,
            "host_blocks": {512: 0, "global": 30},
            "reuse_rule": "trtllm_v1_contiguous",
            "transfer_host": "127.0.0.2",
            "transfer_port": 9999,
            "transfer_timeout_s": 2,
        },
    }
    expected = EngineOptions(
        max_batch_size=4,
        max_num_tokens=100,
        max_seq_len=2048,
        max_attention_window=(512, 2048),
        tokens_per_block=16,
        max_tokens=4096,
        enable_block_reuse=False,
        event_buffer_max_size=0,
        kv_blocks={512: 200, None: 600},
        kv_memory_mb=64,
        max_queue_size=3,
        max_chunk_tokens=64,
        threads=2,
        debug_step_delay_s=5.0,
        enable_partial_reuse=False,
        host_cache_size=1 << 20,
        host_blocks={512: 0, None: 30},
        reuse_rule="trtllm_v1_contiguous",
        transfer_host="127.0.0.2",
        transfer_port=9999,
        transfer_timeout_s=2.0,
        source="FILE",
    )

    assert expected == parse_options(data, "FILE")


def test_what_means_nothing_on_a_cpu_is_collected() -> None:
    data = {
        "backend": "pytorch",
        "tensor_parallel_size": 1,
        "disable_overlap_scheduler": True,
        "cache_transceiver_config": {"backend": "UCX", "max_tokens_in_buffer": 16384},
        "kv_cache_config": {"free_gpu_memory_fraction": 0.9, "dtype": "auto"},
    }

    assert (
        "backend",
        "cache_transceiver_config",
        "disable_overlap_scheduler",
        "kv_cache_config.dtype",
        "kv_cache_config.free_gpu_memory_fraction",
    ) == parse_options(data).ignored


def test_null_means_default() -> None:
    assert EngineOptions() == parse_options(
        {
            "max_batch_size": None,
            "kv_cache_config": None,
            "gemma3_cpu": {"kv_blocks": None},
            "lora_config": None,
        }
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"kv_cache_config": {"max_atention_window": [512]}},
            r"unknown option 'kv_cache_config.max_atention_window' in FILE.*mean 'max_attention_window'\?",
        ),
        ({"max_batchsize": 4}, r"'max_batchsize' in FILE: did you mean 'max_batch_size'\?"),
        ({"gemma3_cpu": {"queue": 4}}, r"'gemma3_cpu.queue' in FILE: .*max_queue_size"),
        ({"zzz": 4}, "'zzz' in FILE: gemma3_cpu reads gemma3_cpu, kv_cache_config, max_batch_size"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: expected 1, got 2; .*in FILE"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size: expected 1, got True"),
        ({"speculative_config": {"a": 1}}, "speculative_config: expected no value"),
        (
            {"kv_cache_config": {"kv_cache_event_hash_algo": "v2_sha256"}},
            "kv_cache_config.kv_cache_event_hash_algo: expected 'auto' or 'v1_block_key', got 'v2_sha256'",
        ),
        ({"kv_cache_config": {"use_kv_cache_manager_v2": 2}}, "expected True or False or 'auto', got 2"),
        (
            {"gemma3_cpu": {"reuse_rule": "vllm"}},
            "gemma3_cpu.reuse_rule: expected one of trtllm_v2, trtllm_v1, trtllm_v1_contiguous, got 'vllm'",
        ),
        ({"gemma3_cpu": {"transfer_host": ""}}, "transfer_host: expected a string, got ''"),
        ({"gemma3_cpu": {"transfer_port": 1 << 16}}, r"expected an integer in \[0, 65535\], got 65536"),
        ({"gemma3_cpu": {"transfer_timeout_s": 0}}, "expected seconds above 0, got 0"),
        ({"max_batch_size": 0}, "max_batch_size: expected an integer of at least 1, got 0"),
        ({"max_batch_size": "8"}, "max_batch_size: expected an integer of at least 1, got '8'"),
        ({"kv_cache_config": []}, r"kv_cache_config: expected a mapping, got \[\]"),
        ({"kv_cache_config": {"enable_block_reuse": 1}}, "enable_block_reuse: expected true or false, got 1"),
        ({"kv_cache_config": {"max_attention_window": 512}}, "expected a list of positive integers"),
        ({"kv_cache_config": {"max_attention_window": []}}, "expected a list of positive integers"),
        (
            {"gemma3_cpu": {"kv_blocks": {"512k": 3}}},
            "kv_blocks.512k: expected a window in tokens or 'global'",
        ),
        (
            {"gemma3_cpu": {"kv_blocks": {512: -1}}},
            "kv_blocks.512: expected an integer of at least 1, got -1",
        ),
        ({"gemma3_cpu": {"debug_step_delay_s": -1}}, "expected seconds of at least 0, got -1"),
        (
            {"max_num_tokens": 4, "max_batch_size": 8},
            r"max_num_tokens: expected at least max_batch_size \(8\)",
        ),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(data, "FILE")


def test_without_windows_in_the_file_the_models_own_are_used() -> None:
    assert [512, None] == windows(plan({}))
    assert [0, 1] == [pool.group.group_id for pool in plan({}).pools]


def test_the_group_of_layer_0_comes_first() -> None:
    assert [None, 512] == windows(plan({}, ModelShape((None, 512), 8192, 256)))


def test_a_window_is_clamped_to_the_context_and_then_global() -> None:
    assert [512, None] == windows(plan({"kv_cache_config": {"max_attention_window": [512] * 5 + [32768]}}))
    assert [None] == windows(plan({"max_seq_len": 512}))
    assert [None] == windows(plan({"kv_cache_config": {"max_attention_window": [32768]}}))


def test_a_larger_window_than_the_models_is_allowed() -> None:
    larger = plan({"kv_cache_config": {"max_attention_window": [1024] * 5 + [8192]}})

    assert [1024, None] == windows(larger)
    assert [(512,), (None,)] == [pool.model_windows for pool in larger.pools]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            [256] * 5 + [8192],
            "layer 0 of the model has a window of 512 tokens and needs .* 512 tokens, got 256",
        ),
        ([512], "layer 5 of the model has global attention and needs at least 8192 tokens, got 512"),
        ([512] * 5 + [4096], "layer 5 .* got 4096; a smaller window gives wrong answers"),
        ([512, 8192], "expected one window for all layers with a window of 512 tokens, .* layer 1: 8192"),
    ],
)
def test_windows_that_do_not_fit_the_model_are_refused(pattern: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"kv_cache_config.max_attention_window: {message}.*in FILE"):
        plan({"kv_cache_config": {"max_attention_window": pattern}})


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_seq_len: expected at most the model's context of 8192 tokens"):
        plan({"max_seq_len": 8193})


def test_pools_follow_the_rule() -> None:
    # 8192 / 32 blocks make one context; a running request holds 33 sliding blocks at most.
    assert {None: 4 * 256, 512: 512} == blocks(plan({}))
    assert {None: 4 * 256, 512: 20 * 33} == blocks(plan({"max_batch_size": 20}))
    assert {None: 100, 512: 264} == blocks(plan({"kv_cache_config": {"max_tokens": 3200}}))
    assert {None: 600, 512: 300} == blocks(plan({"gemma3_cpu": {"kv_blocks": {"global": 600}}}))
    assert {None: 600, 512: 7} == blocks(plan({"gemma3_cpu": {"kv_blocks": {"global": 600, "512": 7}}}))


@pytest.mark.parametrize("rule", ["trtllm_v1", "trtllm_v1_contiguous"])
def test_a_sliding_pool_of_manager_v1_holds_the_longest_prompt(rule: str) -> None:
    own = {"reuse_rule": rule}

    small = {"kv_cache_config": {"max_tokens": 3200}, "max_batch_size": 2}
    assert {None: 100, 512: 66} == blocks(plan(small))
    assert {None: 100, 512: 256} == blocks(plan({**small, "gemma3_cpu": own}))
    with pytest.raises(ConfigError, match="needs 1664 MiB"):
        plan({"gemma3_cpu": {**own, "kv_memory_mb": 1}}, GEMMA_1B)


def test_pools_shrink_to_the_memory_bound_but_not_below_one_request() -> None:
    sizes = blocks(plan({}, GEMMA_1B))
    used = (4 * sizes[None] + 22 * sizes[512]) * 2048 * 32  # type: ignore[operator]

    assert 0.99 * 1024 * MIB < used <= 1024 * MIB
    assert sizes[None] > 1024 and sizes[512] > 33
    assert {None: 1024, 512: 33} == blocks(plan({"gemma3_cpu": {"kv_memory_mb": 302}}, GEMMA_1B))


def test_a_memory_bound_too_small_for_one_request_says_what_is_needed() -> None:
    with pytest.raises(
        ConfigError, match=r"kv_memory_mb: one request .* needs 302 MiB .* 100 MiB are left of 100"
    ):
        plan({"gemma3_cpu": {"kv_memory_mb": 100}}, GEMMA_1B)


def test_sizes_for_any_engine_are_those_of_all_sliding_pools_and_of_the_global_one_and_go_first() -> None:
    two_windows = ModelShape((512, 1024, None), context_length=8192, bytes_per_token=256)
    given = {"vswa": {"kv_blocks": {"sliding": 60, "global": 90}}, "gemma3_cpu": {"kv_blocks": {"512": 7}}}

    assert {512: 60, 1024: 60, None: 90} == blocks(plan(given, two_windows))
    assert {512: 60, None: 1024} == blocks(plan({"vswa": {"kv_blocks": {"sliding": 60}}}))
    with pytest.raises(ConfigError, match=r"vswa\.kv_blocks\.512' in FILE.*known: global, sliding"):
        plan({"vswa": {"kv_blocks": {"512": 60}}})


def test_sizes_that_are_given_are_not_bounded() -> None:
    data = {"gemma3_cpu": {"kv_memory_mb": 1, "kv_blocks": {512: 40, "global": 10}}}

    assert {512: 40, None: 10} == blocks(plan(data, GEMMA_1B))


def test_a_pool_size_for_an_unknown_window_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"kv_blocks.1024: expected a window .* known: 512, global"):
        plan({"gemma3_cpu": {"kv_blocks": {1024: 5}}})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_committed_configs_say_their_source_and_are_read(path: Path) -> None:
    text = path.read_text()
    size = path.stem.rpartition("_")[2]
    data = yaml.safe_load(text)
    if size in SIZES:
        # One request of the whole context takes more than the default bound.
        data[SECTION] = {"kv_memory_mb": 1 << 20}
    loaded = plan_cache(parse_options(data, str(path)), SIZES.get(size, GEMMA_1B))

    assert all(word in text.split("\n\n")[0] for word in ("# Source:", "date", "# Used:"))
    assert [1024 if size in SIZES else 512, None] == windows(loaded)
    if size not in SIZES:
        assert [512, None] == windows(plan_cache(parse_options(data), SMALL))


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ({}, "trtllm_v2"),
        ({"kv_cache_config": {"use_kv_cache_manager_v2": "auto"}}, "trtllm_v2"),
        ({"kv_cache_config": {"use_kv_cache_manager_v2": True}}, "trtllm_v2"),
        ({"kv_cache_config": {"use_kv_cache_manager_v2": False}}, "trtllm_v1"),
        ({"gemma3_cpu": {"reuse_rule": "trtllm_v1"}}, "trtllm_v1"),
        (
            {
                "kv_cache_config": {"use_kv_cache_manager_v2": False},
                "gemma3_cpu": {"reuse_rule": "trtllm_v1_contiguous"},
            },
            "trtllm_v1_contiguous",
        ),
    ],
)
def test_the_rule_is_what_was_named_or_what_the_choice_of_a_manager_means(
    data: dict[str, Any], rule: str
) -> None:
    assert rule == parse_options(data).reuse_rule


def host_blocks(plan: CachePlan) -> dict[int | None, int]:
    return {pool.group.window_size: pool.host_blocks for pool in plan.pools}


def test_a_host_tier_is_there_only_where_it_is_asked_for() -> None:
    device = sum(pool.num_blocks * pool.layers * 256 * 32 for pool in plan({}).pools)
    half = {"kv_cache_config": {"host_cache_size": device // 2}}

    assert {None: 0, 512: 0} == host_blocks(plan({}))
    assert {None: 512, 512: 256} == host_blocks(plan(half))
    assert {None: 512, 512: 7} == host_blocks(plan({**half, "gemma3_cpu": {"host_blocks": {512: 7}}}))
    with pytest.raises(ConfigError, match=r"host_blocks.1024: expected a window .* known: 512, global"):
        plan({"gemma3_cpu": {"host_blocks": {1024: 5}}})


def test_a_page_holds_all_layers_of_its_group() -> None:
    assert [22, 4] == [pool.layers for pool in plan({}, GEMMA_1B).pools]
    assert [26] == [pool.layers for pool in plan({"max_seq_len": 512}, GEMMA_1B).pools]


def test_the_rule_for_any_engine_goes_before_the_own_one() -> None:
    options = parse_options({"vswa": {"reuse_rule": "trtllm_v1", "lora_adapters": {}}, "gemma3_cpu": {}})

    assert "trtllm_v1" == options.reuse_rule
    with pytest.raises(ConfigError, match=r"vswa\.reuse_rule: expected one of trtllm_v2, .* got 'lru'"):
        parse_options({"vswa": {"reuse_rule": "lru"}})
