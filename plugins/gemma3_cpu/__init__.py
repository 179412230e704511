"""The embedded engine: a real Gemma 3 in NumPy with a per-window paged KV cache, for laptops and tests."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

from .name import NAME

if TYPE_CHECKING:
    from vswa_plugin.engine import Engine, EngineSettings, RankSetup, SimulatedRank
    from vswa_plugin.hookspecs import Commands


@hookimpl
def vswa_engine_names() -> list[str]:
    return [NAME]


@hookimpl
def vswa_engine(settings: EngineSettings) -> Engine | None:
    # Empty: no engine was named, and this one needs nothing but this package.
    if settings.engine not in (NAME, ""):
        return None
    from .serving.engine import Gemma3CpuEngine

    return Gemma3CpuEngine(settings)


@hookimpl
def vswa_simulated_rank(setup: RankSetup) -> SimulatedRank | None:
    if setup.layout.rule != "trtllm_v2":
        return None
    from .simulate import rank as simulated_rank

    return simulated_rank.SimulatedRank(setup)


@hookimpl
def vswa_register_commands(commands: Commands) -> None:
    from . import commands as ours
    from .simulate import command as simulate_command

    commands.add(
        "make-model",
        "write a small random Gemma 3 checkpoint",
        ours.configure_make_model,
        ours.run_make_model,
    )
    commands.add(
        "import-gguf", "convert a GGUF file of a Gemma 3", ours.configure_import_gguf, ours.run_import_gguf
    )
    commands.add("get-model", "install a real model by name", ours.configure_get_model, ours.run_get_model)
    commands.add(
        "simulate",
        "run requests through the cache managers, without a model",
        simulate_command.configure_simulate,
        partial(simulate_command.run_simulate, commands.simulated_rank),
    )
