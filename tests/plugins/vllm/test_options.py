"""vLLM's options, checked before vLLM is imported."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.vllm.options import VllmOptions, parse_options

from tests.properties import examples
from vswa_plugin.errors import ConfigError

KNOWN = {
    "block_size", "data_parallel_rank", "data_parallel_size", "decode_context_parallel_size",
    "disable_hybrid_kv_cache_manager", "disable_sliding_window", "dtype", "enable_lora",
    "enable_prefix_caching", "enable_prompt_embeds", "gpu_memory_utilization", "kv_events_config",
    "kv_transfer_config",
    "max_logprobs", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "model",
    "num_gpu_blocks_override", "prefix_match_unit", "runner", "scheduling_policy", "served_model_name",
    "spec_method", "speculative_config", "swa_bounded_replay",
}  # fmt: skip


def parsed(ranks: int = 1, **options: Any) -> VllmOptions:
    return parse_options(options, "args.yaml", KNOWN, ranks)


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        parsed(**options)
    return str(refused.value)


def test_options_go_to_the_engine_as_they_are() -> None:
    made = parsed(gpu_memory_utilization=0.5, dtype="float32", block_size=32)

    assert {
        "gpu_memory_utilization": 0.5,
        "dtype": "float32",
        "block_size": 32,
        "enable_prefix_caching": True,
    } == made.engine_args
    assert () == made.changes


def test_names_may_have_the_hyphens_of_the_command_line() -> None:
    assert 4096 == parse_options({"max-model-len": 4096}, "args.yaml", KNOWN).engine_args["max_model_len"]
    assert "expected it once" in refusal(**{"max-model-len": 1, "max_model_len": 1})


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    text = refusal(gpu_memory_utilisation=0.5)

    assert "'gpu_memory_utilisation' in args.yaml: did you mean 'gpu_memory_utilization'?" in text


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("max_batch_size", "max_num_seqs"), ("max_seq_len", "max_model_len"), ("kv_cache_config", "block_size")],
)
def test_a_name_of_tensorrt_llm_is_refused_with_vllms(theirs: str, ours: str) -> None:
    assert f"write {ours}" in refusal(**{theirs: 1})


def test_unknown_names_go_through_where_the_user_or_the_release_says_so() -> None:
    assert 1 == parsed(new_option=1, vswa={"allow_unknown": True}).engine_args["new_option"]
    assert 1 == parse_options({"new_option": 1}, "args.yaml", ()).engine_args["new_option"]
    assert "vswa" not in parsed(vswa={}).engine_args


def test_what_events_need_is_turned_on_and_said() -> None:
    made = parsed(enable_prefix_caching=False, kv_events_config={"enable_kv_cache_events": False})

    assert made.engine_args["enable_prefix_caching"] is True
    assert {"enable_kv_cache_events": True, "publisher": "zmq"} == made.events
    assert {"enable_prefix_caching", "kv_events_config.enable_kv_cache_events", "block_size"} == {
        change.split(" = ")[0] for change in made.changes
    }


def test_the_events_may_have_a_port_and_limits_of_their_own() -> None:
    given = {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5600", "buffer_steps": 5, "topic": "kv"}

    assert {"enable_kv_cache_events": True, "publisher": "zmq", **given} == parsed(
        kv_events_config=given
    ).events
    assert "kv_events_config" not in parsed(kv_events_config=given).engine_args


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ({"publisher": "null"}, "kv_events_config.publisher: expected 'zmq'"),
        (
            {"endpoint": "tcp://10.0.0.1:5557"},
            "kv_events_config.endpoint: expected an address that vLLM binds",
        ),
        ({"end_point": "x"}, "did you mean 'kv_events_config.endpoint'?"),
        ({"buffer_steps": 0}, "kv_events_config.buffer_steps: expected an integer of at least 1"),
        (
            {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"},
            "expected a port at least 2 away from that of endpoint",
        ),
    ],
)
def test_events_that_cannot_be_received_are_refused(events: dict[str, Any], message: str) -> None:
    assert message in refusal(data_parallel_size=2, kv_events_config=events)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/m"}, "give --model-path"),
        ({"served_model_name": "m"}, "give --served-model-name"),
        ({"data_parallel_rank": 1}, "this worker starts all ranks itself"),
        ({"enable_prompt_embeds": True}, "expected False, got True"),
        ({"prefix_match_unit": 8}, "expected no value, got 8"),
        ({"decode_context_parallel_size": 2}, "expected 1, got 2"),
        ({"swa_bounded_replay": True}, "no reuse rule knows it"),
        ({"runner": "pooling"}, "this worker generates text"),
        ({"speculative_config": {"method": "eagle3", "model": "x"}}, "a method without a draft model"),
        ({"speculative_config": {"model": "x"}}, "a method without a draft model"),
        ({"spec_method": "mtp"}, "a method without a draft model"),
        ({"block_size": "16"}, "block_size: expected an integer of at least 1, got '16'"),
        ({"max_model_len": "32k"}, "max_model_len: expected a number of tokens, got '32k'"),
        ({"max_model_len": 0}, "max_model_len: expected an integer of at least 1"),
        ({"vswa": {"reuse_rule": "trtllm_v2"}}, "vswa.reuse_rule: expected 'vllm'"),
        ({"vswa": {"kv_blocks": {}}}, "unknown option 'vswa.kv_blocks'"),
        ({"vswa": {"lora_adapters": {"a": 1}}, "enable_lora": True}, "names and directories"),
        ({"vswa": {"lora_adapters": {"a": "/a"}}}, "none without enable_lora: true"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_its_reason(options: dict[str, Any], message: str) -> None:
    text = refusal(**options)

    assert message in text
    assert "args.yaml" in text and "\n" not in text


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_speculation_without_a_draft_model_is_taken(method: str) -> None:
    assert parsed(speculative_config={"method": method}).engine_args["speculative_config"] == {
        "method": method
    }


def test_the_number_of_ranks_comes_from_the_file_or_the_command_line() -> None:
    assert (1, 2, 3) == (parsed().ranks, parsed(data_parallel_size=2).ranks, parsed(3).ranks)
    assert 3 == parsed(3).engine_args["data_parallel_size"]
    with pytest.raises(
        ConfigError, match="data_parallel_size: expected 3, as --data-parallel-size says, got 2"
    ):
        parsed(3, data_parallel_size=2)


@pytest.mark.parametrize("length", [-1, "auto", None])
def test_the_context_may_be_what_the_model_or_the_memory_allows(length: object) -> None:
    assert parsed(max_model_len=length).max_model_len is None


@pytest.mark.parametrize("option", ["disable_hybrid_kv_cache_manager", "disable_sliding_window"])
def test_layers_may_be_kept_as_if_all_were_global(option: str) -> None:
    assert (False, True) == (parsed().one_pool, parsed(**{option: True}).one_pool)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@examples(300)
@given(st.dictionaries(st.sampled_from(sorted(KNOWN | {"vswa"})), VALUES, max_size=4))
def test_any_values_are_taken_or_refused_in_one_line(options: dict[str, Any]) -> None:
    try:
        parse_options(options, "args.yaml", KNOWN)
    except ConfigError as error:
        assert "\n" not in str(error) and "args.yaml" in str(error)


# -- handing over ----------------------------------------------------------------------------------

NIXL = {"kv_connector": "NixlConnector"}
SEVERAL = {"kv_connector": "MultiConnector"}


def transfer(mode: str, given: object = None) -> Any:
    options = {} if given is None else {"kv_transfer_config": given}
    return parse_options(options, "args.yaml", KNOWN, mode=mode).transfer


@pytest.mark.parametrize(("mode", "role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_blocks_are_handed_over_by_nixl(mode: str, role: str) -> None:
    assert {**NIXL, "kv_role": role} == transfer(mode) == transfer(mode, NIXL)
    for other in ("kv_both", role):
        assert {**NIXL, "kv_role": other} == transfer(mode, {**NIXL, "kv_role": other})


def test_what_the_user_says_of_it_stays() -> None:
    own = {
        **NIXL,
        "engine_id": "rack-4",
        "kv_connector_extra_config": {"kv_lease_duration": 60},
        "kv_load_failure_policy": "recompute",
    }

    assert {**own, "kv_role": "kv_producer"} == transfer("prefill", own)


def test_what_is_set_is_noted() -> None:
    made = parse_options({"block_size": 16}, "args.yaml", KNOWN, mode="decode")

    assert ["kv_transfer_config"] == [change.split(" = ")[0] for change in made.changes]
    assert "kv_transfer_config" not in made.engine_args


@pytest.mark.parametrize(
    ("mode", "given", "words"),
    [
        ("prefill", {"kv_role": "kv_producer"}, "expected NixlConnector or NixlPullConnector, got"),
        ("decode", {"kv_connector": "NixlPushConnector"}, "got 'NixlPushConnector'; prefill and"),
        ("prefill", {**NIXL, "kv_role": "kv_consumer"}, "kv_role: expected 'kv_producer' or 'kv_both', got"),
        ("decode", {**NIXL, "kv_role": "kv_producer"}, "kv_role: expected 'kv_consumer' or 'kv_both', got"),
        ("decode", [1], "kv_transfer_config: expected a mapping"),
        (
            "decode",
            {**NIXL, "kv_connector_extra_config": {"bidirectional_kv_xfer": True}},
            "bidirectional_kv_xfer: expected False, got True; what a prefill worker fetched",
        ),
        (
            "prefill",
            {**SEVERAL, "kv_connector_extra_config": {"connectors": [{"kv_connector": "X"}]}},
            "connectors: expected one of them to be NixlConnector",
        ),
        ("prefill", SEVERAL, "connectors: expected one of them to be NixlConnector"),
    ],
)  # fmt: skip
def test_what_hands_over_nothing_is_refused(mode: str, given: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        transfer(mode, given)
    assert "(in args.yaml)" in str(refused.value)


def test_one_of_several_connectors_may_be_nixls() -> None:
    inner = [{"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}, {**NIXL, "kv_role": "kv_both"}]
    several = {**SEVERAL, "kv_connector_extra_config": {"connectors": inner}}

    assert {**several, "kv_role": "kv_consumer"} == transfer("decode", several)


def test_an_aggregated_worker_takes_any_connector_or_none() -> None:
    assert {"kv_connector": "ExampleConnector"} == transfer("agg", {"kv_connector": "ExampleConnector"})
    assert transfer("agg") is None
