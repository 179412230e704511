"""The table of releases, row by row: manager, rule, and what is changed in the options.

The table is written here once more, as it was read from the sources: release by release the manager of a
model that prefers V2, for each way to hand over blocks.
"""

from __future__ import annotations

from typing import Any

import pytest
from vswa_plugins.tensorrt_llm.package import Version
from vswa_plugins.tensorrt_llm.releases import RELEASES, Handover
from vswa_plugins.tensorrt_llm.rules import decide

from tests.tensorrt_llm_models import GEMMA, kv, options_of, planned
from vswa_plugin.errors import ConfigError

ARCHITECTURES = (GEMMA, "Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration")


def transceiver(backend: str, runtime: str | None = None) -> dict[str, Any]:
    section = {"backend": backend} | ({} if runtime is None else {"transceiver_runtime": runtime})
    return {"cache_transceiver_config": section}


#: Options for each column: aggregated, NIXL, NIXL + PYTHON, UCX, any + CPP.
COLUMNS = (
    {},
    transceiver("NIXL"),
    transceiver("NIXL", "PYTHON"),
    transceiver("UCX"),
    transceiver("NIXL", "CPP"),
)
OLD, NEW, V2 = "trtllm_v1_contiguous", "trtllm_v1", "trtllm_v2"
TABLE = {
    "1.0.0": (OLD, OLD, OLD, OLD, OLD),
    "1.2.1": (OLD, OLD, OLD, OLD, OLD),
    "1.3.0rc0": (OLD, OLD, OLD, OLD, OLD),
    "1.3.0rc16": (OLD, OLD, OLD, OLD, OLD),
    "1.3.0rc17": (NEW, NEW, NEW, NEW, NEW),
    "1.3.0rc20": (NEW, NEW, NEW, NEW, NEW),
    "1.3.0rc24": (NEW, NEW, NEW, NEW, NEW),
    "1.3.0rc25": (V2, V2, V2, NEW, NEW),
    "1.3.0rc26": (V2, V2, V2, NEW, NEW),
    "1.3.0rc30": (V2, V2, V2, NEW, NEW),
    "1.3.0": (V2, V2, V2, NEW, NEW),
    "1.4.0rc1": (V2, V2, V2, NEW, NEW),
    "1.4.0": (V2, V2, V2, NEW, NEW),
}


def version(text: str) -> Version:
    parsed = Version.parse(text)
    assert parsed is not None
    return parsed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("release", TABLE)
def test_the_rule_of_each_release_and_transceiver(release: str, architecture: str) -> None:
    decisions = [decide(options_of(data), version(release), architecture, {}) for data in COLUMNS]

    assert TABLE[release] == tuple(decision.rule for decision in decisions)
    assert all("V2" == d.manager if d.rule == V2 else "V1" == d.manager for d in decisions)


@pytest.mark.parametrize("release", TABLE)
def test_a_model_that_does_not_prefer_v2_uses_v1(release: str) -> None:
    for data in COLUMNS:
        assert "V1" == decide(options_of(data), version(release), "LlamaForCausalLM", {}).manager


@pytest.mark.parametrize(("release", "starts"), [("1.2.1", False), ("1.3.0rc19", False), ("1.3.0rc20", True)])
def test_v2_that_is_asked_for_is_used_where_it_gives_events(release: str, starts: bool) -> None:
    options = options_of(kv(use_kv_cache_manager_v2=True) | transceiver("NIXL", "PYTHON"))
    if starts:
        assert V2 == decide(options, version(release), GEMMA, {}).rule
    elif release.startswith("1.2"):
        decision = decide(options, version(release), GEMMA, {})
        assert (OLD, 2) == (decision.rule, len(decision.unknown_options)), "both options are left out"
    else:
        with pytest.raises(ConfigError, match="whose manager V2 gives no KV events"):
            decide(options, version(release), GEMMA, {})


@pytest.mark.parametrize("backend", ["UCX", "MPI", "MOONCAKE"])
def test_where_the_engine_would_not_start_the_runtime_is_set_to_cpp(backend: str) -> None:
    """Dynamo's own files for Gemma 3 give UCX and no runtime."""
    for release, expected in (("1.3.0rc25", None), ("1.3.0rc26", "CPP"), ("1.4.0", "CPP")):
        plan = planned(transceiver(backend), version(release))

        assert expected == plan.llm_args["cache_transceiver_config"].get("transceiver_runtime")
        assert (expected is not None) == any("runtime = CPP" in change for change in plan.changes)


def test_a_variable_that_makes_another_transceiver_of_default_counts() -> None:
    options = options_of(transceiver("DEFAULT"))
    decision = decide(options, version("1.3.0rc29"), GEMMA, {"TRTLLM_USE_UCX_KVCACHE": "1"})

    assert (NEW, "CPP") == (decision.rule, decision.runtime)
    decision = decide(options, version("1.3.0rc29"), GEMMA, {})
    assert (V2, None) == (decision.rule, decision.runtime)


def test_the_runtime_python_without_nixl_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"expected CPP, or backend: NIXL.* got PYTHON with UCX"):
        decide(options_of(transceiver("UCX", "PYTHON")), version("1.3.0rc29"), GEMMA, {})


def test_another_model_gets_the_runtime_where_it_is_every_models_default() -> None:
    for release, expected in (("1.3.0rc29", None), ("1.4.0rc1", "CPP")):
        decision = decide(options_of(transceiver("UCX")), version(release), "LlamaForCausalLM", {})

        assert expected == decision.runtime


@pytest.mark.parametrize("size", ["1b", "4b", "12b", "27b"])
def test_the_12_line_gets_none_of_the_options_that_it_does_not_know(size: str) -> None:
    data = kv(
        use_kv_cache_manager_v2=True,
        max_attention_window=[512 if size == "1b" else 1024] * 5 + [32768 if size == "1b" else 131072],
    )
    plan = planned(data | transceiver("NIXL", "PYTHON"), version("1.2.1"), size)

    assert {"backend": "NIXL"} == plan.llm_args["cache_transceiver_config"]
    assert "use_kv_cache_manager_v2" not in plan.llm_args["kv_cache_config"]
    assert 2 == sum("this release does not know it" in change for change in plan.changes)


def test_windows_are_derived_from_rc27_on_by_v2_alone() -> None:
    for release, data, derived in (
        ("1.3.0rc26", {}, False),
        ("1.3.0rc27", {}, True),
        ("1.3.0rc27", kv(use_kv_cache_manager_v2=False), False),
    ):
        windows = [group.window_size for group in planned(data, version(release)).groups]

        assert ([512, None] if derived else [None]) == windows


def test_rows_are_in_order_and_say_where_they_were_read() -> None:
    assert sorted(RELEASES, key=lambda row: row.first) == list(RELEASES)
    assert all(row.read and len(row.managers) == len(Handover) for row in RELEASES)


def test_a_runtime_of_null_is_cpp_as_the_engine_takes_it() -> None:
    data = {"cache_transceiver_config": {"backend": "NIXL", "transceiver_runtime": None}}
    decisions = [decide(options_of(data), version(release), GEMMA, {}) for release in ("1.2.1", "1.3.0rc29")]

    assert [OLD, NEW] == [decision.rule for decision in decisions]
    assert ["transceiver_runtime"] == [name.split(".")[1] for name in decisions[0].unknown_options]


def test_an_option_of_null_is_left_out_too_where_the_release_does_not_know_it() -> None:
    plan = planned(kv(use_kv_cache_manager_v2=None), version("1.2.1"))

    assert "use_kv_cache_manager_v2" not in plan.llm_args["kv_cache_config"]


def test_the_variable_for_nixl_goes_before_the_others() -> None:
    env = {"TRTLLM_USE_NIXL_KVCACHE": "1", "TRTLLM_USE_UCX_KVCACHE": "1"}

    assert V2 == decide(options_of(transceiver("DEFAULT")), version("1.3.0rc29"), GEMMA, env).rule
