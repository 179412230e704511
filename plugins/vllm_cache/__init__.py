"""vLLM's KV cache manager for models of any layout, without a model: for simulations and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from vswa_plugin.engine import RankSetup, SimulatedRank


@hookimpl
def vswa_simulated_rank(setup: RankSetup) -> SimulatedRank | None:
    if setup.layout.rule not in ("vllm", "vllm_hybrid"):
        return None
    from . import rank

    return rank.SimulatedRank(setup)
