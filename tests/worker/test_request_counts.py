"""Each request of a worker is counted once: those received have ended, in one way, or are under way."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.worker.test_handler import Scripted, Served
from vswa_plugin.errors import InvalidRequest, Overloaded, Unavailable

FIRST = {"token_ids": [5]}
#: How the engine ends a request, and what that is. None: it hangs until the client goes.
ENDS: list[tuple[Any, tuple[str, str]]] = [
    *(({"finish_reason": reason}, ("completed", reason)) for reason in ("stop", "eos", "length")),
    ({"finish_reason": "an odd one"}, ("completed", "other")),
    ({"finish_reason": "error: out of memory"}, ("failed", "")),
    ({"finish_reason": "cancelled"}, ("cancelled", "")),
    (InvalidRequest("too long"), ("refused", "")),
    (Overloaded("full"), ("unavailable", "")),
    (Unavailable("stopping"), ("unavailable", "")),
    (RuntimeError("a bug"), ("failed", "")),
    (None, ("cancelled", "")),
]


def in_all(served: Served) -> int:
    handler = served.handler
    return handler.counts.ended.total() + handler.in_flight


@examples(100)
@given(st.lists(st.tuples(st.sampled_from(ENDS), st.booleans()), min_size=1, max_size=6))
def test_requests_add_up_however_they_end(script: list[tuple[tuple[Any, tuple[str, str]], bool]]) -> None:
    async def body() -> None:
        engine = Scripted()
        served = Served(engine)
        expected: dict[tuple[str, str], int] = {}
        for (end, how), leaves in script:
            engine.steps = (FIRST, *((None,) if leaves else (end,)))
            gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            chunks: Any = served.handler.handle({"token_ids": [1, 2, 3]}, "r", gone)
            await anext(chunks)
            assert served.handler.counts.received == in_all(served)
            if leaves or end is None:
                gone.set_result(True)
            with contextlib.suppress(Exception):
                async for _ in chunks:
                    pass
            while served.handler.in_flight:  # the engine's task ends with the next turn of the loop
                assert served.handler.counts.received == in_all(served)
                await asyncio.sleep(0)
            key = ("cancelled", "") if leaves else how
            expected[key] = expected.get(key, 0) + 1
            assert expected == dict(served.handler.counts.ended)
        assert len(script) == served.handler.counts.received == in_all(served)
        assert 0 == served.handler.in_flight

    asyncio.run(asyncio.wait_for(body(), 10))


def test_what_is_turned_away_or_given_up_is_counted_once_and_for_another_worker() -> None:
    async def body() -> None:
        engine = Scripted(FIRST, None)
        served = Served(engine)
        under_way = asyncio.create_task(served.request())
        while not served.handler.signs_of_life:
            await asyncio.sleep(0)
        served.handler.abandon("the engine hangs")
        for each in (under_way, asyncio.create_task(served.request())):
            with contextlib.suppress(Unavailable):
                await each
        assert await served.handler.drain(5)
        with contextlib.suppress(Unavailable):
            await served.request()

        assert {("unavailable", ""): 3} == dict(served.handler.counts.ended)
        assert 3 == served.handler.counts.received == in_all(served)

    asyncio.run(asyncio.wait_for(body(), 10))
