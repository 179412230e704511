"""Option files that people bring along: keys of other tools and releases, keys given twice, huge values."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vswa_plugins.gemma3_cpu.serving.options
import vswa_plugins.tensorrt_llm.options

from vswa_plugin.errors import ConfigError
from vswa_plugin.worker.engine_args import load_engine_args

#: A refusal is read by a person: a few lines at most.
MAX_REFUSAL = 2_000


def for_gemma3_cpu(options: dict[str, Any], source: str, mode: str) -> object:
    return vswa_plugins.gemma3_cpu.serving.options.parse_options(options, source)


Parse = Callable[[dict[str, Any], str, str], object]
ENGINES: dict[str, Parse] = {
    "gemma3_cpu": for_gemma3_cpu,
    "tensorrt_llm": vswa_plugins.tensorrt_llm.options.parse_options,
}
each_engine = pytest.mark.parametrize("engine", ENGINES)


def refusal_of(tmp_path: Path, engine: str, text: str, override: str | None = None, mode: str = "agg") -> str:
    """Why a worker of ``engine`` does not take the file; empty where it does."""
    file = tmp_path / "options.yaml"
    file.write_text(text)
    try:
        options, source = load_engine_args(str(file), override)
        ENGINES[engine](options, source, mode)
    except ConfigError as error:
        return str(error).replace(str(file), "the file")
    return ""


# -- keys that belong elsewhere ------------------------------------------------------------------------

#: A file, and by what words one sees that its refusal says where the key belongs.
ELSEWHERE = {
    "build_config": (
        "build_config:\n  max_batch_size: 8\n  max_num_tokens: 1024\n  max_seq_len: 8192\n",
        "top level|outermost|max_batch_size",
    ),
    "pytorch_backend_config": (
        "pytorch_backend_config:\n  use_cuda_graph: true\n  kv_cache_dtype: auto\n",
        "top level|outermost|cuda_graph_config|kv_cache_config",
    ),
    "context_servers": (
        "context_servers:\n  num_instances: 1\n  urls: ['localhost:8001']\n",
        "--mode|prefill|launch",
    ),
    "generation_servers": ("generation_servers:\n  num_instances: 1\n", "--mode|decode|launch"),
    "cuda_graph_padding_enabled": (
        "cuda_graph_padding_enabled: true\n",
        r"cuda_graph_config\.enable_padding",
    ),
    "cuda_graph_batch_sizes": ("cuda_graph_batch_sizes: [1, 2]\n", r"cuda_graph_config\.batch_sizes"),
    "kv_cache_dtype": ("kv_cache_dtype: fp8\n", r"kv_cache_config\.dtype"),
    "apiVersion": (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  agg.yaml: |\n    backend: pytorch\n",
        "ConfigMap|Kubernetes",
    ),
}


@each_engine
@pytest.mark.parametrize("key", ELSEWHERE)
def test_a_key_that_is_unknown_at_its_place_is_refused_by_its_name(
    tmp_path: Path, key: str, engine: str
) -> None:
    assert f"'{key}'" in refusal_of(tmp_path, engine, ELSEWHERE[key][0])


@each_engine
@pytest.mark.parametrize("key", ELSEWHERE)
def test_the_refusal_of_a_key_from_another_tool_or_release_says_where_it_belongs_now(
    tmp_path: Path, key: str, engine: str
) -> None:
    text, place = ELSEWHERE[key]

    assert re.search(place, refusal_of(tmp_path, engine, text))


@each_engine
def test_the_overlap_scheduler_is_switched_by_the_name_that_it_has_now(tmp_path: Path, engine: str) -> None:
    assert "disable_overlap_scheduler" in refusal_of(tmp_path, engine, "enable_overlap_scheduler: true\n")


# -- keys that are given twice -------------------------------------------------------------------------

TWICE = {
    "at the top": (
        "kv_cache_config: {max_tokens: 8192}\nkv_cache_config: {max_attention_window: [512, 8192]}\n",
        "kv_cache_config",
    ),
    "in a section": ("kv_cache_config:\n  max_tokens: 8192\n  max_tokens: 4096\n", "max_tokens"),
    "in a section in braces": ("kv_cache_config: {max_tokens: 8192, max_tokens: 4096}\n", "max_tokens"),
}


@each_engine
@pytest.mark.parametrize("where", TWICE)
def test_a_key_that_is_given_twice_is_refused_by_its_name(tmp_path: Path, where: str, engine: str) -> None:
    text, key = TWICE[where]

    assert key in refusal_of(tmp_path, engine, text)


def test_a_key_that_is_given_twice_on_the_command_line_is_refused_by_its_name(tmp_path: Path) -> None:
    override = '{"max_batch_size": 4, "max_batch_size": 8}'

    assert "max_batch_size" in refusal_of(tmp_path, "gemma3_cpu", "backend: pytorch\n", override)


@each_engine
def test_the_same_key_in_two_sections_is_not_given_twice(tmp_path: Path, engine: str) -> None:
    assert "" == refusal_of(tmp_path, engine, "dtype: auto\nkv_cache_config: {dtype: auto}\n")


def test_a_key_that_replaces_one_of_a_merged_section_is_not_given_twice(tmp_path: Path) -> None:
    text = (
        "kv_cache_config: &kv {max_tokens: 8192, tokens_per_block: 32}\n"
        "cuda_graph_config: {<<: *kv, max_tokens: 4096}\n"
    )

    assert "" == refusal_of(tmp_path, "gemma3_cpu", text)


# -- values --------------------------------------------------------------------------------------------


def nested_aliases(levels: int) -> str:
    """Lists of ten, each of ten times the list before: 10 ** ``levels`` words in a few lines."""
    lines = ["  l0: &l0 [x, x, x, x, x, x, x, x, x, x]\n"]
    lines += [f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, levels)]
    return f"cuda_graph_config:\n{''.join(lines)}kv_cache_config:\n  max_attention_window: *l{levels - 1}\n"


@each_engine
def test_the_refusal_of_a_value_that_is_huge_once_its_aliases_are_followed_is_short(
    tmp_path: Path, engine: str
) -> None:
    refusal = refusal_of(tmp_path, engine, nested_aliases(5))

    assert "max_attention_window" in refusal
    assert len(refusal) <= MAX_REFUSAL


def test_the_refusal_of_a_long_override_that_is_not_json_is_short(tmp_path: Path) -> None:
    refusal = refusal_of(tmp_path, "gemma3_cpu", "backend: pytorch\n", '{"max_batch_size": [' + "1," * 50_000)

    assert "--override-engine-args" in refusal
    assert len(refusal) <= MAX_REFUSAL


@each_engine
def test_the_refusal_of_a_key_that_is_near_no_other_is_short(tmp_path: Path, engine: str) -> None:
    refusal = refusal_of(tmp_path, engine, "zzz: 1\n")

    assert "'zzz'" in refusal
    assert len(refusal) <= MAX_REFUSAL


TRANSFER_BUFFER = """
backend: pytorch
kv_cache_config: {tokens_per_block: 32, max_attention_window: [512, 512, 512, 512, 512, 8192]}
cache_transceiver_config: {backend: NIXL, max_tokens_in_buffer: %d}
"""


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_transfer_buffer_that_is_no_whole_number_of_blocks_is_refused_before_the_engine_starts(
    tmp_path: Path, mode: str
) -> None:
    refusal = refusal_of(tmp_path, "tensorrt_llm", TRANSFER_BUFFER % 8200, mode=mode)

    assert "max_tokens_in_buffer" in refusal
    assert "8200" in refusal
    assert "32" in refusal


@each_engine
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_transfer_buffer_of_whole_blocks_is_taken(tmp_path: Path, mode: str, engine: str) -> None:
    assert "" == refusal_of(tmp_path, engine, TRANSFER_BUFFER % 8192, mode=mode)
