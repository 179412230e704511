"""One request through the worker's handler, with an engine made of a few lines."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from vswa_plugin.dynamo.names import RELEASE
from vswa_plugin.engine.contract import WORKER_ONLY, ChunkDict
from vswa_plugin.engine.records import RequestRecord
from vswa_plugin.errors import InvalidRequest, Unavailable
from vswa_plugin.publishing.healing import Claim
from vswa_plugin.wire.events import ReuseReport
from vswa_plugin.worker.handler import RequestHandler

USAGE = {"prompt_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}


class Scripted:
    """An engine that yields what it was given; ``None`` waits until it is cancelled."""

    def __init__(self, *steps: ChunkDict | Exception | None) -> None:
        self.steps = steps
        self.closed = 0
        self.failed: str | None = None

    def failure(self) -> str | None:
        return self.failed

    async def generate(self, _: Any) -> AsyncIterator[ChunkDict]:
        try:
            for step in self.steps:
                if isinstance(step, Exception):
                    raise step
                if step is None:
                    await asyncio.Event().wait()
                else:
                    yield step
        finally:
            self.closed += 1


class Claims:
    """As much of a publisher as a handler uses."""

    healing = True

    def __init__(self, events: int) -> None:
        self.engine_events = events
        self.claims: list[Claim] = []
        self.prompts: list[tuple[Any, ...]] = []
        self.reports: list[ReuseReport] = []

    def report(self, report: ReuseReport) -> None:
        self.reports.append(report)

    def prompt(self, *prompt: Any) -> None:
        self.prompts.append(prompt)

    def claim(self, claim: Claim) -> None:
        self.claims.append(claim)


class Served:
    def __init__(self, engine: Scripted, ranks: int = 0) -> None:
        self.records: list[RequestRecord] = []
        self.publishers = {rank: Claims(10 * rank) for rank in range(ranks)}
        self.handler = RequestHandler(
            engine,  # type: ignore[arg-type]
            "m",
            7,
            self.records.append,
            self.publishers,  # type: ignore[arg-type]
        )

    async def request(self, gone: asyncio.Future[bool] | None = None, **changed: Any) -> list[ChunkDict]:
        gone = gone or asyncio.get_running_loop().create_future()
        request = {"token_ids": [1, 2, 3, 4], "routing": {"dp_rank": 3}, **changed}
        return [chunk async for chunk in self.handler.handle(request, "r1", gone)]


def test_chunks_pass_through_and_the_record_says_what_happened() -> None:
    chunks: list[ChunkDict] = [
        {"token_ids": [5], "index": 0},
        {"token_ids": [6, 7], "index": 0, "finish_reason": "stop", "completion_usage": USAGE},
    ]
    engine = Scripted(*chunks)
    served = Served(engine)

    assert asyncio.run(served.request()) == chunks
    (record,) = served.records
    assert (record.request_id, record.model, record.worker_id, record.dp_rank) == ("r1", "m", 7, 3)
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (4, 2, 3)
    assert record.finish_reason == "stop"
    assert record.first_token_s is not None
    assert 0 <= record.first_token_s <= record.total_s
    assert engine.closed == 1


@pytest.mark.parametrize(
    ("routing", "ranks"), [({"dp_rank": 1}, [1]), ({}, [0, 1, 2]), ({"dp_rank": "x"}, [0, 1, 2])], ids=str
)
def test_the_ranks_that_may_serve_a_request_are_given_its_prompt_before_the_engine_is(
    routing: dict[str, Any], ranks: list[int]
) -> None:
    served = Served(Scripted({"token_ids": [5]}), ranks=3)
    seen: list[list[tuple[Any, ...]]] = []
    generate = served.handler._engine.generate

    def generating(request: Any) -> Any:
        seen.extend(publisher.prompts for publisher in served.publishers.values())
        return generate(request)

    served.handler._engine.generate = generating  # type: ignore[method-assign]
    asyncio.run(served.request(routing={**routing, "cache_salt": "s", "lora_name": "l"}))

    assert [[([1, 2, 3, 4], "s", "l")] if rank in ranks else [] for rank in range(3)] == seen


def test_a_client_that_goes_before_the_first_token_closes_the_engines_generator() -> None:
    engine = Scripted(None)
    served = Served(engine)

    async def body() -> list[ChunkDict]:
        gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(served.request(gone))
        while not served.handler.in_flight:
            await asyncio.sleep(0)
        gone.set_result(True)
        return await asyncio.wait_for(serving, 5)

    assert asyncio.run(body()) == []
    assert engine.closed == 1
    assert served.handler.in_flight == 0
    assert [record.finish_reason for record in served.records] == ["cancelled"]


def test_a_client_that_goes_while_nobody_asks_for_chunks_still_stops_the_engine() -> None:
    """Dynamo drops the stream of a client that has gone without closing it."""
    engine = Scripted({"token_ids": [5]}, None)
    served = Served(engine)

    async def body() -> None:
        gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        abandoned = served.handler.handle({"token_ids": [1]}, "r1", gone)
        await anext(abandoned)
        gone.set_result(True)
        async with asyncio.timeout(5):
            while served.handler.in_flight:
                await asyncio.sleep(0)
        assert engine.closed == 1
        assert [record.finish_reason for record in served.records] == ["cancelled"]
        assert await served.handler.drain(1)
        await abandoned.aclose()

    asyncio.run(body())


def test_a_client_that_has_gone_before_the_engine_is_asked_ends_at_once() -> None:
    served = Served(Scripted(None))

    async def body() -> list[ChunkDict]:
        gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        gone.set_result(True)
        return await asyncio.wait_for(served.request(gone), 5)

    assert asyncio.run(body()) == []
    assert served.handler.in_flight == 0
    assert [record.finish_reason for record in served.records] == ["cancelled"]


@pytest.mark.parametrize("error", [InvalidRequest("too long"), RuntimeError("bug")])
def test_an_error_reaches_dynamo_and_is_recorded(error: Exception) -> None:
    engine = Scripted({"token_ids": [5]}, error)
    served = Served(engine)

    with pytest.raises(type(error), match=str(error)):
        asyncio.run(served.request())
    assert engine.closed == 1
    assert [record.finish_reason for record in served.records] == ["error"]
    assert served.handler.in_flight == 0


def test_a_draining_worker_sends_new_requests_elsewhere_and_waits_for_the_old() -> None:
    engine = Scripted({"token_ids": [5]}, None)
    served = Served(engine)

    async def body() -> tuple[bool, bool]:
        gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(served.request(gone))
        while not served.handler.in_flight:
            await asyncio.sleep(0)
        timed_out = await served.handler.drain(0.01)
        with pytest.raises(Unavailable, match="the worker is stopping"):
            await served.request()
        draining = asyncio.create_task(served.handler.drain(5))
        gone.set_result(True)
        await serving
        return timed_out, await draining

    assert asyncio.run(body()) == (False, True)


def test_a_failed_engine_sends_requests_elsewhere() -> None:
    engine = Scripted()
    engine.failed = "out of memory"

    with pytest.raises(Unavailable, match="out of memory"):
        asyncio.run(Served(engine).request())


def test_an_engine_that_is_given_up_sends_the_requests_under_way_elsewhere_and_those_to_come() -> None:
    engine = Scripted({"token_ids": [5]}, None)
    served = Served(engine)

    async def body() -> None:
        serving = [asyncio.create_task(served.request()) for _ in range(3)]
        async with asyncio.timeout(5):
            while served.handler.signs_of_life < 3:
                await asyncio.sleep(0)
            served.handler.abandon("it hangs")
            for each in (*serving, served.request()):
                with pytest.raises(Unavailable, match="it hangs"):
                    await each
        assert await served.handler.drain(1)

    asyncio.run(body())

    assert engine.closed == 3
    assert [record.finish_reason for record in served.records] == ["cancelled"] * 3


def test_a_request_that_ends_leaves_the_others_under_way() -> None:
    served = Served(Scripted({"token_ids": [5]}, None))

    async def body() -> list[int]:
        loop = asyncio.get_running_loop()
        gone: list[asyncio.Future[bool]] = [loop.create_future() for _ in range(3)]
        serving = [asyncio.create_task(served.request(each)) for each in gone]
        async with asyncio.timeout(5):
            while served.handler.in_flight < 3:
                await asyncio.sleep(0)
            left = []
            for client, request in zip(gone, serving, strict=True):
                client.set_result(True)
                await request
                left.append(served.handler.in_flight)
        return left

    assert asyncio.run(body()) == [2, 1, 0]


def test_each_chunk_is_a_sign_of_life_and_so_is_what_else_the_worker_hears() -> None:
    served = Served(Scripted(*one_answer()))
    asyncio.run(served.request())
    served.handler.alive()

    assert served.handler.signs_of_life == 3


def test_a_request_of_which_nobody_wants_a_record_is_served() -> None:
    served = Served(Scripted(*one_answer()))
    served.handler._record = None

    assert len(asyncio.run(served.request())) == 2
    assert served.handler.in_flight == 0


def one_answer(**told: int) -> list[ChunkDict]:
    return [
        {"token_ids": [5], "index": 0, WORKER_ONLY: told},
        {"token_ids": [6], "index": 0, "finish_reason": "stop", "completion_usage": USAGE},
    ]


def test_what_a_chunk_tells_the_worker_goes_no_further() -> None:
    served = Served(Scripted(*one_answer(dp_rank=1, transferred_tokens=3)))

    chunks = asyncio.run(served.request())

    assert [{"token_ids": [5], "index": 0}, ["token_ids", "index", "finish_reason", "completion_usage"]] == [
        chunks[0],
        list(chunks[1]),
    ]
    assert [(1, 3)] == [(record.dp_rank, record.transferred_tokens) for record in served.records]


def test_a_claim_goes_to_the_rank_that_served_the_request() -> None:
    served = Served(Scripted(*one_answer(dp_rank=1)), ranks=2)

    asyncio.run(served.request())

    assert [] == served.publishers[0].claims
    assert [Claim((1, 2, 3, 4), 2, mark=10)] == served.publishers[1].claims


def test_the_count_of_another_worker_claims_nothing_here() -> None:
    served = Served(Scripted(*one_answer(dp_rank=0, transferred_tokens=1)), ranks=1)

    asyncio.run(served.request())

    assert [] == served.publishers[0].claims
    assert [2] == [record.cached_tokens for record in served.records]


@pytest.mark.parametrize("tokens", [[1, 2, 3, 4], struct.pack("<4i", 1, 2, 3, 4)], ids=["a list", "packed"])
def test_the_prompt_of_record_and_claim_is_that_of_the_request(tokens: list[int] | bytes) -> None:
    served = Served(Scripted(*one_answer(dp_rank=0)), ranks=1)

    asyncio.run(served.request(token_ids=tokens))

    assert [4] == [record.prompt_tokens for record in served.records]
    assert [Claim((1, 2, 3, 4), 2, mark=0)] == served.publishers[0].claims


@pytest.mark.parametrize("rank", ["one", [1], 1.5])
def test_a_rank_that_is_none_is_left_to_the_engine_to_refuse(rank: Any) -> None:
    served = Served(Scripted(InvalidRequest("routing.dp_rank: expected a rank")))

    with pytest.raises(InvalidRequest, match="expected a rank"):
        asyncio.run(served.request(routing={"dp_rank": rank}))
    assert [0] == [record.dp_rank for record in served.records]


def test_a_claim_that_fails_costs_neither_the_record_nor_the_end_of_the_request() -> None:
    served = Served(Scripted(*one_answer(dp_rank=0)), ranks=1)
    served.publishers[0].claim = None  # type: ignore[assignment, method-assign]

    async def body() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        await served.request()
        assert await served.handler.drain(1)

    asyncio.run(body())

    assert 1 == len(served.records)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"token_ids": [1], "routing": [1]}, "routing: expected an object, got list"),
        ({"token_ids": 5}, "token_ids: expected a list of integers, got int"),
        ({"token_ids": b"12345"}, "token_ids: expected 4 bytes per token, got 5 bytes"),
    ],
)
def test_a_malformed_request_is_refused_before_the_engine_is_asked(
    request_: dict[str, Any], message: str
) -> None:
    engine = Scripted({"token_ids": [1]})
    handler = RequestHandler(engine, "m", 1, None)  # type: ignore[arg-type]

    async def check() -> None:
        gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        with pytest.raises(InvalidRequest, match=message):
            await anext(handler.handle(request_, "r", gone))

    asyncio.run(check())
    assert (0, 0) == (handler.in_flight, engine.closed)


class Holding(Scripted):
    """A prefill engine that holds the prompts of these params."""

    def __init__(self, *held: dict[str, Any]) -> None:
        super().__init__({"token_ids": [1], "finish_reason": "length"})
        self.held = list(held)

    def release(self, params: dict[str, Any]) -> bool:
        if params in self.held:
            self.held.remove(params)
            return True
        return False


def test_a_prompt_that_nobody_will_fetch_is_given_back_to_the_engine_also_while_the_worker_drains() -> None:
    async def body() -> None:
        engine = Holding({"ticket": 1}, {"ticket": 2})
        served = Served(engine)
        assert await served.request(**{RELEASE: {"ticket": 1}}) == [{"released": True}]
        assert await served.request(**{RELEASE: {"ticket": 1}}) == [{"released": False}]
        assert await served.handler.drain(1)
        assert await served.request(**{RELEASE: {"ticket": 2}}) == [{"released": True}]
        assert (engine.held, engine.closed, served.records) == ([], 0, []), "it is no request"

    asyncio.run(body())


def test_an_engine_that_holds_no_prompts_has_nothing_to_release() -> None:
    async def body() -> None:
        served = Served(Scripted())
        assert await served.request(**{RELEASE: {"ticket": 1}}) == [{"released": False}]
        with pytest.raises(InvalidRequest, match="vswa_release: expected disaggregated_params, got list"):
            await served.request(**{RELEASE: ["ticket"]})

    asyncio.run(body())


@pytest.mark.parametrize(
    ("steps", "reported"),
    [
        (
            [{"token_ids": [5]}, {"finish_reason": "stop", "completion_usage": USAGE}],
            [ReuseReport("r1", 4, 2)],
        ),
        (
            [
                {"token_ids": [5], WORKER_ONLY: {"dp_rank": 1, "queue_s": 0.25}},
                {"finish_reason": "length", "completion_usage": USAGE},
            ],
            [ReuseReport("r1", 4, 2, 0.25)],
        ),
        # The worker that computed the prompt reports it.
        ([{WORKER_ONLY: {"transferred_tokens": 4}, "finish_reason": "stop", "completion_usage": USAGE}], []),
        ([{"finish_reason": "stop"}], []),
        ([{"finish_reason": "stop", "completion_usage": {"prompt_tokens": 4}}], []),
        ([{"finish_reason": "cancelled", "completion_usage": USAGE}], []),
        ([{"completion_usage": USAGE}, Unavailable("gone")], []),
    ],
)
def test_what_a_completed_request_reused_is_reported_by_its_rank(
    steps: list[ChunkDict | Exception], reported: list[ReuseReport]
) -> None:
    served = Served(Scripted(*steps), ranks=2)

    async def body() -> None:
        with contextlib.suppress(Unavailable):
            await served.request(routing={"dp_rank": 1})
        await asyncio.sleep(0)

    asyncio.run(body())

    assert [[], reported] == [each.reports for each in served.publishers.values()]
