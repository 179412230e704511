"""What docs/models-hybrid.md says: its table, and in which direction a global-only router is wrong."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from vswa_plugins.gemma3_cpu.simulate.requests import Workload, answer

from tests.accuracy.test_pages import ROOT, loaded
from tests.vllm_cache_helpers import Held
from vswa_plugin.blocks.layout import FULL, CacheLayout, Resumption
from vswa_plugin.engine.presets import PRESETS, VLLM, rank_setup
from vswa_plugin.host.loading import load_host

bench_hybrid = loaded(ROOT / "benchmarks" / "bench_hybrid.py")
MODELS = [name for name, each in PRESETS.items() if each.engine == VLLM]
#: The only one all of whose layers are in one global group.
ALL_GLOBAL = "llama-4-scout"


class Promises(NamedTuple):
    """Of so many requests: right by all groups; too much, or too little, by the global ones."""

    exact: int
    over: int
    under: int


@pytest.fixture(scope="module")
def host() -> Any:
    with load_host(environ={}) as host:
        yield host


def promises(host: Any, name: str, requests: int, seed: int) -> Promises:
    """By the rule, boundary by boundary, over all that events have added up to."""
    blocks, prompt_len = bench_hybrid.MODELS[name]
    setup = rank_setup(name, blocks, 0.5, None, 32_768)
    rank = host.simulated_rank(setup)
    layout = setup.layout
    full = CacheLayout(
        tuple(group for group in layout.groups if group.kind == FULL),
        "vllm_hybrid",
        name,
        resumption=Resumption(layout.block_size, layout.hash_block_size),
    )
    held = Held(layout)
    exact, over, under = 0, 0, 0
    for request in islice(Workload(seed, prompt_len), requests):
        sequence = rank.open(request.prompt, request.output_len)
        exact += held.resumable(request.prompt) == sequence.cached_tokens
        of_full = held.resumable_of(full, request.prompt)
        over += of_full > sequence.cached_tokens
        under += of_full < sequence.cached_tokens
        sequence.compute_prompt()
        sequence.finish(answer(request.prompt, request.output_len))
        held.apply(rank.take_events())
    return Promises(exact, over, under)


def test_the_table_is_the_committed_result() -> None:
    page = (ROOT / "docs" / "models-hybrid.md").read_text("utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "hybrid.json").read_text("utf-8"))

    assert f"{bench_hybrid.BEGIN}\n{bench_hybrid.table(result)}\n{bench_hybrid.END}" in page
    assert MODELS == [row["model"] for row in result["rows"]] == list(bench_hybrid.MODELS)


def test_the_sentences_below_the_table_are_true_of_it() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "hybrid.json").read_text("utf-8"))
    for row in result["rows"]:
        scores = row["scores"]
        assert row["requests"] == scores["exact"]["exact_blocks"], row["model"]
        assert 0 == scores["global only"]["under"], row["model"]
        assert (row["model"] == ALL_GLOBAL) == (0 == scores["global only"]["over"]), row["model"]


@pytest.mark.parametrize("name", MODELS)
def test_a_small_run_shows_the_same(host: Any, name: str) -> None:
    counted = promises(host, name, 80, 5)

    assert 80 == counted.exact
    assert 0 == counted.under
    assert (name == ALL_GLOBAL) == (0 == counted.over)


@pytest.mark.parametrize("name", ["gemma-4-31b", "qwen3.5-9b"])
def test_the_benchmark_counts_as_the_rule_does(host: Any, name: str) -> None:
    found, row = promises(host, name, 40, 5), bench_hybrid.measured(name, 40, [5])

    of_full = row["scores"]["global only"]
    assert 40 == row["requests"]
    assert found == (row["scores"]["exact"]["exact_blocks"], of_full["over"], of_full["under"])


def test_only_the_text_between_the_marks_is_rewritten(tmp_path: Path) -> None:
    page = f"before\n{bench_hybrid.BEGIN}\nold\n{bench_hybrid.END}\nafter\n"

    assert page.replace("old", "new") == bench_hybrid.rewritten(page, "new")
    with pytest.raises(SystemExit, match=r"expected the lines .* once, got 0 pairs"):
        bench_hybrid.rewritten("text\n", "new")
