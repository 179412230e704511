"""An engine that writes each request down as it comes, before anything is refused. For ``--plugin``.

Its option ``seen`` names the file, which gets one request a line.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import msgspec

from vswa_plugin.engine.contract import ChunkDict, EngineSettings, RequestDict
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.testing.engine import StandinEngine

NAME = "seeing"


class SeeingEngine(StandinEngine):
    def __init__(self, settings: EngineSettings) -> None:
        options = dict(settings.options)
        self._seen = Path(options.pop("seen"))
        super().__init__(msgspec.structs.replace(settings, options=options))

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        with self._seen.open("a", encoding="utf-8") as file:
            file.write(json.dumps(request) + "\n")
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


@hookimpl
def vswa_engine_names() -> list[str]:
    return [NAME]


@hookimpl
def vswa_engine(settings: EngineSettings) -> SeeingEngine | None:
    return SeeingEngine(settings) if settings.engine == NAME else None
