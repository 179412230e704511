"""What an engine states, as families."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tests.metrics_helpers import Family, families_of
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import EngineInfo
from vswa_plugin.program.metrics import About, Page
from vswa_plugin.worker.metrics import engine_families

LAYOUT = CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 32)), "trtllm_v2", "m")


async def _page(engine: Any) -> dict[str, Family]:
    return families_of(await Page(lambda: About("worker"), lambda: engine_families(engine)).render())


def families(stats: dict[str, float], ranks: int = 1, totals: frozenset[str] = frozenset()) -> Any:
    info = EngineInfo(LAYOUT, 1024, 8, 1024, 256, data_parallel_size=ranks, totals=totals)
    found = asyncio.run(_page(SimpleNamespace(info=info, stats=lambda: stats)))
    return {
        name: (each.type, {tuple(sorted(s.labels.items())): s.value for s in each.samples})
        for name, each in found.items()
        if name.startswith("vswa_engine_")
    }


def test_what_only_grows_is_a_counter_and_windows_are_labels() -> None:
    stats = {"running": 2, "steps": 7, "blocks_used_512": 3, "blocks_used_global": 4}

    assert {
        "vswa_engine_running": ("gauge", {(("dp_rank", "0"),): 2}),
        "vswa_engine_steps_total": ("counter", {(("dp_rank", "0"),): 7}),
        "vswa_engine_blocks_used": (
            "gauge",
            {(("dp_rank", "0"), ("window", "512")): 3, (("dp_rank", "0"), ("window", "global")): 4},
        ),
    } == families(stats, totals=frozenset({"steps"}))


def test_ranks_are_labels_and_their_sum_is_left_out_so_that_a_family_adds_up() -> None:
    stats = {"running": 5, "running_rank_0": 2, "running_rank_1": 3, "requests": 9}
    stats |= {"blocks_used_512": 3, "blocks_used_512_rank_0": 1, "blocks_used_512_rank_1": 2}

    assert {
        "vswa_engine_running": ("gauge", {(("dp_rank", "0"),): 2, (("dp_rank", "1"),): 3}),
        "vswa_engine_requests": ("gauge", {(("dp_rank", ""),): 9}),
        "vswa_engine_blocks_used": (
            "gauge",
            {(("dp_rank", "0"), ("window", "512")): 1, (("dp_rank", "1"), ("window", "512")): 2},
        ),
    } == families(stats, ranks=2)
