"""Our calls beside the real signatures, where TensorRT-LLM can be imported. No GPU work is done.

pip install 'vswa-plugin[trtllm,test]' --extra-index-url https://pypi.nvidia.com
python -m pytest tests/plugins/tensorrt_llm/test_contract.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm import package
from vswa_plugins.tensorrt_llm.fields import GUIDED, NOT_SET, SAMPLING
from vswa_plugins.trtllm_events import option_names
from vswa_plugins.trtllm_events.hashing import block_key

from tests import tensorrt_llm_package as standin

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_llm") is None,
    reason="tensorrt_llm is not installed; the docstring of this file says how to run it",
)


#: Sampling parameters that a request can set.
OURS = {*SAMPLING.values(), "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos"}
OURS |= {"detokenize", "logprobs", "guided_decoding"}


@pytest.fixture(scope="module")
def api() -> package.Api:
    return package.load()


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def fields(struct: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(struct)} if dataclasses.is_dataclass(struct) else set()


def test_the_methods_that_we_call_take_what_we_give(api: package.Api) -> None:
    given = {"inputs", "sampling_params", "lora_request", "streaming", "disaggregated_params"}
    given |= {"scheduling_params", "cache_salt"}

    assert given <= parameters(api.LLM.generate_async)
    assert {"timeout"} <= parameters(api.LLM.get_kv_cache_events)
    assert callable(api.LLM.shutdown)


def test_a_dead_executor_can_be_told(api: package.Api) -> None:
    """By one of the ways of plugins/tensorrt_llm/health.py."""
    from tensorrt_llm.executor import GenerationExecutor

    asked = getattr(api.LLM, "_check_health", None) or getattr(GenerationExecutor, "check_health", None)
    assert callable(asked) or callable(GenerationExecutor.is_shutdown)


def test_events_can_be_fetched_by_a_thread() -> None:
    """By one of the ways of plugins/tensorrt_llm/polling.py: a queue that is made there, or a remote call."""
    from tensorrt_llm.executor import GenerationExecutor
    from tensorrt_llm.executor.proxy import GenerationExecutorProxy

    remote = GenerationExecutorProxy.get_kv_events is not GenerationExecutor.get_kv_events
    assert remote or callable(GenerationExecutor._maybe_initialize_iteration_results)


def test_sampling_parameters_have_the_names_that_we_map_to(api: package.Api) -> None:
    theirs = fields(api.SamplingParams) | parameters(api.SamplingParams)

    assert OURS <= theirs
    assert set() == {name for name in theirs - OURS - set(NOT_SET) if not name.startswith("_")}
    assert set(GUIDED) <= fields(api.GuidedDecodingParams) | parameters(api.GuidedDecodingParams)


def test_the_standin_promises_nothing_that_is_not_there(api: package.Api) -> None:
    pairs = {
        "DisaggregatedParams": fields(api.DisaggregatedParams),
        "SchedulingParams": fields(api.SchedulingParams) | parameters(api.SchedulingParams),
        "Logprob": fields(api.Logprob),
        "SamplingParams": fields(api.SamplingParams) | parameters(api.SamplingParams),
    }

    for name, real in pairs.items():
        assert fields(getattr(standin, name)) <= real, name
    assert parameters(standin.LLM.generate_async) >= parameters(api.LLM.generate_async) & {
        "inputs",
        "sampling_params",
        "cache_salt",
        "priority",
    }
    assert isinstance(package.disagg_request_id(api), int)


def test_all_options_of_the_release_are_known() -> None:
    """A new one is added to trtllm_events/names.py; until then vswa.allow_unknown lets it pass."""
    from tensorrt_llm.llmapi import llm_args

    assert set() == set(llm_args.TorchLlmArgs.model_fields) - option_names() - {"model", "mpi_session"}
    assert set() == set(llm_args.KvCacheConfig.model_fields) - option_names("kv_cache_config")
    transceiver = set(llm_args.CacheTransceiverConfig.model_fields)
    assert set() == transceiver - option_names("cache_transceiver_config")


def test_block_hashes_are_the_engines_own() -> None:
    kv_cache_hash = pytest.importorskip("tensorrt_llm.runtime.kv_cache_hash")
    given = parameters(kv_cache_hash.hash_v1_block_key)

    assert {"tokens", "parent_hash"} & given, given
    assert 924206229973855 == block_key([1, 2, 3, 4], None)
