"""A plugin for the worker of run.py that is to publish no KV events: for comparison, and for nothing else.

``--engine vllm`` always has them on, because no router of ours can do without. Here vLLM is started without
them, by the same options otherwise; the thread that would receive them has nothing to do.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from vswa_plugin.engine import Engine, EngineSettings, EventSink
from vswa_plugin.hookspecs import hookimpl


@hookimpl(tryfirst=True)
def vswa_engine(settings: EngineSettings) -> Engine | None:
    if settings.engine != "vllm":
        return None
    from vswa_plugins.vllm import engine as module

    def launch(api: Any, model_path: str, options: Any, sockets: Any) -> Any:
        return api.AsyncLLM.from_engine_args(api.AsyncEngineArgs(model=model_path, **options.engine_args))

    class Silent(module.VllmEngine):
        def start(self, on_events: EventSink) -> None:
            with (
                mock.patch.object(module, "launch", launch),
                mock.patch.object(module.EventListener, "published", lambda listener: None),
            ):
                super().start(on_events)

    return Silent(settings)
