"""Dynamo's own OpenAI HTTP frontend, out of the runtime wheel."""

from __future__ import annotations

from typing import Any

import msgspec

from vswa_plugin.errors import ConfigError, unknown_choice


class FrontendSettings(msgspec.Struct, frozen=True):
    """Dynamo's OpenAI HTTP frontend."""

    http_host: str
    http_port: int
    router_mode: str = "round-robin"
    namespace: str | None = None
    migration_limit: int = 3


async def serve_frontend(runtime: Any, settings: FrontendSettings) -> None:
    """Run Dynamo's own frontend until the runtime is shut down. Models are found through discovery."""
    from dynamo.llm import EngineType, EntrypointArgs, RouterConfig, RouterMode, make_engine, run_input

    modes = {
        "round-robin": RouterMode.RoundRobin,
        "random": RouterMode.Random,
        "kv": RouterMode.KV,
        "direct": RouterMode.Direct,
    }
    if settings.router_mode not in modes:
        raise ConfigError(unknown_choice("router mode", settings.router_mode, modes))
    arguments = EntrypointArgs(
        EngineType.Dynamic,
        http_host=settings.http_host,
        http_port=settings.http_port,
        router_config=RouterConfig(modes[settings.router_mode]),
        namespace=settings.namespace,
        migration_limit=settings.migration_limit,
    )
    await run_input(runtime, "http", await make_engine(runtime, arguments))
