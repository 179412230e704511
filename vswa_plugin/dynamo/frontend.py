"""Dynamo's own OpenAI HTTP frontend, out of the runtime wheel."""

from __future__ import annotations

from typing import Any

import msgspec

from vswa_plugin.dynamo.names import ROUTER_MODES
from vswa_plugin.dynamo.runtime import runtime_error


class FrontendSettings(msgspec.Struct, frozen=True):
    """Dynamo's OpenAI HTTP frontend.

    :param router_mode: one of ``ROUTER_MODES``.
    :param namespace: show only models of this one; ``namespace_prefix``: of those that begin with it.
    """

    http_host: str
    http_port: int
    router_mode: str = "round-robin"
    namespace: str | None = None
    namespace_prefix: str | None = None
    migration_limit: int = 3


async def serve_frontend(runtime: Any, settings: FrontendSettings) -> None:
    """Run Dynamo's own frontend until the runtime is shut down. Models are found through discovery.

    :raises ConfigError: it refuses a setting; another VswaError: it has failed.
    """
    from dynamo.llm import EngineType, EntrypointArgs, RouterConfig, RouterMode, make_engine, run_input

    arguments = EntrypointArgs(
        EngineType.Dynamic,
        http_host=settings.http_host,
        http_port=settings.http_port,
        router_config=RouterConfig(getattr(RouterMode, ROUTER_MODES[settings.router_mode])),
        namespace=settings.namespace,
        namespace_prefix=settings.namespace_prefix,
        migration_limit=settings.migration_limit,
    )
    try:
        await run_input(runtime, "http", await make_engine(runtime, arguments))
    except Exception as error:  # Dynamo raises plain Exception
        raise runtime_error("Dynamo's frontend", error) from error
