"""Cache groups and reuse rule of a TensorRT-LLM worker, before its engine has said anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm.engine import TensorRtLlmEngine
from vswa_plugins.tensorrt_llm.package import Version
from vswa_plugins.tensorrt_llm.rules import decide

from tests.tensorrt_llm_helpers import OPTIONS, settings_for
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin
from tests.tensorrt_llm_models import GEMMA, NEW, RC29, STABLE, UCX, kv, options_of, planned, windows_of
from vswa_plugin.errors import ConfigError

# -- windows ---------------------------------------------------------------------------------------

PATTERN = [512] * 5 + [32768]


def test_windows_are_clamped_to_the_longest_sequence() -> None:
    assert [512, None] == windows_of(kv(max_attention_window=PATTERN))
    assert [512, None] == windows_of({"max_seq_len": 4096, **kv(max_attention_window=PATTERN)})
    assert [None] == windows_of({"max_seq_len": 512, **kv(max_attention_window=PATTERN)})
    assert [1024, None] == windows_of(kv(max_attention_window=[1024] * 5 + [99999]))


def test_without_windows_an_old_release_keeps_one_global_pool_and_that_is_said() -> None:
    plan = planned({}, STABLE)

    assert [None] == [group.window_size for group in plan.groups]
    assert "max_attention_window" not in plan.llm_args["kv_cache_config"]
    assert any("one global pool" in change for change in plan.changes)


def test_without_windows_a_release_that_derives_them_is_given_the_models() -> None:
    plan = planned({}, NEW)

    assert [512, None] == [group.window_size for group in plan.groups]
    assert (PATTERN * 5)[:26] == plan.llm_args["kv_cache_config"]["max_attention_window"]


def test_the_context_is_always_said_to_the_engine() -> None:
    assert (
        131_072 == planned(kv(max_attention_window=[1024] * 5 + [131072]), size="4b").llm_args["max_seq_len"]
    )
    assert 999 == planned({"max_seq_len": 999}).llm_args["max_seq_len"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            kv(max_attention_window=[256] * 5 + [32768]),
            "layer 0 .* a window of 512 tokens and needs at least 512",
        ),
        (
            kv(max_attention_window=[512]),
            "layer 5 of the model has global attention and needs at least 32768",
        ),
        ({"max_seq_len": 32769}, "expected at most the model's context of 32768 tokens, got 32769"),
    ],
)
def test_windows_and_contexts_that_give_wrong_answers_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(data)


def test_a_block_size_that_does_not_divide_the_window_is_refused(standin: None, model: Path) -> None:
    options = {"kv_cache_config": {**OPTIONS["kv_cache_config"], "tokens_per_block": 16}}

    with pytest.raises(ConfigError, match=r"multiple of the block size \(16 tokens\), got 8"):
        TensorRtLlmEngine(settings_for(model, options))


# -- the rule --------------------------------------------------------------------------------------

V1, V2 = kv(use_kv_cache_manager_v2=False), kv(use_kv_cache_manager_v2=True)
CPP = {"cache_transceiver_config": {"backend": "nixl", "transceiver_runtime": "CPP"}}


@pytest.mark.parametrize(
    ("version", "architecture", "data", "rule"),
    [
        (None, GEMMA, {}, "trtllm_v2"),
        (RC29, GEMMA, V1, "trtllm_v1"),
        (NEW, "LlamaForCausalLM", V2, "trtllm_v2"),
        (STABLE, GEMMA, {"vswa": {"reuse_rule": "trtllm_v2"}}, "trtllm_v2"),
    ],
)
def test_what_the_user_sets_decides_before_the_table_of_releases(
    version: Version | None, architecture: str, data: dict[str, Any], rule: str
) -> None:
    decision = decide(options_of(data), version, architecture, {})

    assert rule == decision.rule
    assert decision.reasons


def test_the_reasons_are_said_in_the_log(
    standin: None, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        TensorRtLlmEngine(settings_for(model, OPTIONS | UCX, "decode"))

    assert (
        "reuse rule trtllm_v1 (KV cache manager V1): TensorRT-LLM 1.3.0rc29: Gemma3ForCausalLM, any, runtime "
        "CPP: V1"
    ) in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("transceiver", [UCX, CPP])
def test_a_manager_that_cannot_hand_over_its_blocks_is_refused(transceiver: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected false or 'auto', got true: the cache transceiver"):
        decide(options_of(V2 | transceiver, "decode"), RC29, GEMMA, {})


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"vswa.reuse_rule: unknown rule 'trtllm_v3': did you mean"):
        decide(options_of({"vswa": {"reuse_rule": "trtllm_v3"}}), RC29, GEMMA, {})
