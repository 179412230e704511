"""A plugin whose engine has a few lines and all three modes: for tests of what stands around engines.

``--engine standin``. Option ``step_s``: the seconds that each token takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import ChunkDict, EngineInfo, EngineSettings, EventSink, RequestDict
from vswa_plugin.errors import ConfigError, InvalidRequest, Unavailable
from vswa_plugin.hookspecs import hookimpl

NAME = "standin"


class StandinEngine:
    event_format = "trtllm"

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._stopped = False
        groups = (CacheGroup(0, 512, 32), CacheGroup(1, None, 32))
        layout = CacheLayout(groups, "trtllm_v2", settings.served_model_name)
        self.info = EngineInfo(layout, 8192, 8, 1024, 256)
        if unknown := settings.options.keys() - {"step_s"}:
            raise ConfigError(f"unknown option {sorted(unknown)} in {settings.options_source}")

    def start(self, on_events: EventSink) -> None: ...

    def stop(self) -> None:
        self._stopped = True

    def failure(self) -> str | None:
        return None

    def stats(self) -> dict[str, float]:
        return {"running": 0.0}

    async def generate(self, request: RequestDict) -> AsyncIterator[ChunkDict]:
        """Repeat the prompt's last token; a decode worker repeats what its prefill worker handed over."""
        prompt = request["token_ids"]
        token, mode = prompt[-1], self._settings.mode
        last: ChunkDict = {"token_ids": [token], "index": 0, "finish_reason": "length"}
        last["completion_usage"] = {
            "prompt_tokens": len(prompt),
            "completion_tokens": 1,
            "total_tokens": len(prompt) + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        if mode == "prefill":
            yield {**last, "disaggregated_params": {"token": token}}
            return
        if mode == "decode":
            given: dict[str, Any] | None = request.get("prefill_result")
            if given is None:
                raise InvalidRequest("expected a prefill result, got none")
            last["token_ids"] = [given["disaggregated_params"]["token"]]
        for _ in range((request["stop_conditions"].get("max_tokens") or 1) - 1):
            yield {"token_ids": last["token_ids"], "index": 0}
            await asyncio.sleep(self._settings.options.get("step_s", 0))
            if self._stopped:
                raise Unavailable("the engine stops")
        yield last


@hookimpl
def vswa_engine_names() -> list[str]:
    return [NAME]


@hookimpl
def vswa_engine(settings: EngineSettings) -> StandinEngine | None:
    return StandinEngine(settings) if settings.engine == NAME else None
