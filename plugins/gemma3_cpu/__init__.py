"""The embedded engine: a real Gemma 3 in NumPy with a per-window paged KV cache, for laptops and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from vswa_plugin.commands import Commands
    from vswa_plugin.engine import Engine, EngineSettings

NAME = "gemma3_cpu"


@hookimpl
def vswa_engine_names() -> list[str]:
    return [NAME]


@hookimpl
def vswa_engine(settings: EngineSettings) -> Engine | None:
    if settings.engine != NAME:
        return None
    from .engine import Gemma3CpuEngine

    return Gemma3CpuEngine(settings)


@hookimpl
def vswa_register_commands(commands: Commands) -> None:
    from .commands import configure_make_model, run_make_model

    commands.add(
        "make-model", "write a small random Gemma 3 checkpoint", configure_make_model, run_make_model
    )
