"""Each request of a router is counted once, however it ends and in whatever phase."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.router.test_forward import LAST, FakeCall
from tests.router.test_forward import Served as Together
from tests.router.test_forward import run as run_within
from tests.router_disagg_helpers import Served as Apart
from tests.router_disagg_helpers import computed
from vswa_plugin.dynamo.client import WorkerHttpError
from vswa_plugin.engine.outcomes import OUTCOMES
from vswa_plugin.errors import InvalidRequest, Overloaded, Unavailable
from vswa_plugin.router.counts import RequestCounts
from vswa_plugin.router.tallies import MAX_MODELS, OTHER

#: How the worker that ends a request ends it, and what that is. None: it hangs until the client goes.
ENDS: list[tuple[Any, str]] = [
    (LAST, "completed"),
    ({**LAST, "finish_reason": "error: out of memory"}, "failed"),
    ({**LAST, "finish_reason": "cancelled"}, "cancelled"),
    (InvalidRequest("too long"), "refused"),
    (WorkerHttpError(418, "no coffee"), "refused"),
    (Overloaded("full"), "unavailable"),
    (Unavailable("lost"), "unavailable"),
    (WorkerHttpError(500, "broken"), "failed"),
    (RuntimeError("a bug of ours"), "failed"),
    ("no last chunk", "failed"),
    (None, "cancelled"),
]
#: What a client does after the first chunk.
READ, LEAVE, CLOSE = "reads to the end", "goes", "closes the stream"
END = st.sampled_from(ENDS)
CLIENT = st.sampled_from([READ, LEAVE, CLOSE])


def sums(counts: RequestCounts) -> tuple[int, int]:
    return counts.received.total(), counts.ended.total() + counts.in_flight.total()


def steps(first: dict[str, Any], end: Any) -> list[Any]:
    return [first] if end == "no last chunk" else [first, end]


async def one(served: Together | Apart, client: str) -> bool:
    """Send a request; whether its client left before its end."""
    call = FakeCall()
    chunks: Any = served.chunks(call)
    try:
        await anext(chunks)
    except Exception:
        return False
    counts = served.forwarder.counts
    assert sums(counts)[0] == sums(counts)[1]
    if client == LEAVE:
        call.leave()
        await asyncio.sleep(0)
    if client != READ:
        await chunks.aclose()
        return True
    with contextlib.suppress(Exception):
        async for _ in chunks:
            pass
    return False


@examples(100)
@given(st.lists(st.tuples(END, CLIENT), min_size=1, max_size=6))
def test_requests_of_one_phase_add_up(script: list[tuple[tuple[Any, str], str]]) -> None:
    async def body() -> None:
        served, expected = Together(), dict.fromkeys(OUTCOMES, 0)
        for (end, outcome), wanted in script:
            client = LEAVE if end is None else wanted
            served.client.steps = tuple(steps({"token_ids": [5]}, end))
            left = await one(served, client)
            expected["cancelled" if left else outcome] += 1
            counts = served.forwarder.counts
            assert expected == {each: counts.ended["m", each] for each in OUTCOMES}
        assert (len(script),) * 2 == sums(served.forwarder.counts)
        assert served.idle()

    run_within(body())


@examples(100)
@given(st.lists(st.tuples(st.booleans(), END, CLIENT), min_size=1, max_size=6))
def test_requests_of_two_phases_are_counted_once_too(
    script: list[tuple[bool, tuple[Any, str], str]],
) -> None:
    """The end is that of the prefill worker, or of the decode worker after a prefill that went well."""

    async def body() -> None:
        served, expected = Apart(), dict.fromkeys(OUTCOMES, 0)
        for in_prefill, (end, outcome), client in script:
            if in_prefill and not isinstance(end, Exception):
                continue
            well, ended = [computed()], steps({"token_ids": [5]}, end)
            for worker_id in served.workers.ids:
                first = ended[-1:] if in_prefill else well
                served.workers.steps[worker_id] = first if worker_id in (11, 12) else ended
            left = await one(served, LEAVE if end is None else client)
            expected["cancelled" if left else outcome] += 1
            counts = served.forwarder.counts
            assert expected == {each: counts.ended["m", each] for each in OUTCOMES}
        assert (sum(expected.values()),) * 2 == sums(served.forwarder.counts)
        assert served.idle()

    run_within(body())


def test_what_is_turned_away_at_the_door_is_counted_and_an_unknown_model_makes_no_label() -> None:
    async def body() -> None:
        served = Together(LAST)
        for name in ("mm", "m2", "m3"):
            with pytest.raises(InvalidRequest):
                await served.all(model=name)
        await served.forwarder.drain(0)
        with pytest.raises(Unavailable):
            await served.all()
        counts = served.forwarder.counts
        assert counts.received == {OTHER: 3, "m": 1}
        assert counts.ended == {(OTHER, "refused"): 3, ("m", "unavailable"): 1}
        assert counts.under_way == 0

    run_within(body())


def test_models_beyond_the_bound_are_counted_together_and_still_add_up() -> None:
    async def body() -> None:
        counts = RequestCounts()
        for number in range(MAX_MODELS + 10):
            counts.began(f"model {number}")
        for number in range(MAX_MODELS + 10):
            counts.end(f"model {number}", "completed")
        assert len(counts.received) == MAX_MODELS + 1
        assert counts.ended[OTHER, "completed"] == counts.received[OTHER] == 10
        assert sums(counts) == (MAX_MODELS + 10, MAX_MODELS + 10)
        assert await counts.idle(5)

    run_within(body())
