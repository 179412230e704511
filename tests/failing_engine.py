"""A plugin whose engine fails as a request asks for: for tests of what becomes of it.

``--engine failing``. A request's seed is the number of one of :data:`FAILURES`, its max_tokens how many
tokens come before. One that goes on after a failure is served: its prompt ends with tokens of the first
worker, which repeats the prompt's last one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from vswa_plugin.engine.contract import ChunkDict, EngineSettings, RequestDict
from vswa_plugin.errors import InvalidRequest, Overloaded, RequestError, Unavailable
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.testing.engine import StandinEngine

NAME = "failing"
#: None: it hangs, and takes its time to stop.
FAILURES: dict[str, Exception | None] = {
    "invalid": InvalidRequest("expected a shorter prompt"),
    "full": Overloaded("the queue is full"),
    "failed": RequestError("the engine failed while it ran this request"),
    "value error": ValueError("a bug of the engine"),
    "key error": KeyError("another one"),
    "stops": Unavailable("the engine stops"),
    "hangs": None,
}


class FailingEngine(StandinEngine):
    hangs = False

    def stop(self) -> None:
        if self.hangs:
            time.sleep(2)

    async def generate(self, request: RequestDict) -> AsyncIterator[ChunkDict]:
        prompt, seed = request["token_ids"], request["sampling_options"].get("seed")
        for _ in range(request["stop_conditions"]["max_tokens"] - 1):
            yield {"token_ids": [prompt[-1]], "index": 0}
        if seed is None or prompt[-1] == prompt[-2]:
            yield {"token_ids": [prompt[-1]], "index": 0, "finish_reason": "length"}
            return
        failure = list(FAILURES.values())[seed]
        if failure is None:
            self.hangs = True
            await asyncio.Event().wait()
        else:
            raise failure


@hookimpl
def vswa_engine_names() -> list[str]:
    return [NAME]


@hookimpl
def vswa_engine(settings: EngineSettings) -> FailingEngine | None:
    return FailingEngine(settings) if settings.engine == NAME else None
