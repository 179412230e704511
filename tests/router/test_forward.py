"""One request through the forwarder, with a worker made of a few lines: books, errors, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from vswa_plugin.blocks.layout import Naming
from vswa_plugin.dynamo.client import WorkerHttpError, namespaced_sequence_hashes
from vswa_plugin.engine.contract import ChunkDict
from vswa_plugin.errors import InvalidRequest, Overloaded, Unavailable
from vswa_plugin.index import WindowIndex
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.forward import Forwarder
from vswa_plugin.router.pools import Model
from vswa_plugin.router.promises import Promises
from vswa_plugin.selection import Load, NoCandidate, Weights
from vswa_plugin.wire.events import Rank

A, B = Rank(1), Rank(2, 3)
PROMPT = list(range(40))
LAST: ChunkDict = {
    "token_ids": [7],
    "finish_reason": "stop",
    "completion_usage": {"prompt_tokens_details": {"cached_tokens": 0}},
}
Step = ChunkDict | Exception | None


class FakeCall:
    """A request whose client goes when ``leave`` is called."""

    request_id = "r1"

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self._gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def stopped(self) -> bool:
        return self._gone.done()

    def gone(self) -> asyncio.Future[bool]:
        return self._gone

    def leave(self) -> None:
        self._gone.set_result(True)


class FakeClient:
    """Workers 1 and 2, which say what ``steps`` says; None waits for ever."""

    def __init__(self, *steps: Step) -> None:
        self.steps = steps
        self.ids = [1, 2]
        self.requests: list[tuple[int, dict[str, Any]]] = []

    def instance_ids(self) -> list[int]:
        return self.ids

    async def generate(
        self, request: dict[str, Any], worker_id: int, call: FakeCall
    ) -> AsyncIterator[ChunkDict]:
        self.requests.append((worker_id, request))
        for step in self.steps:
            if isinstance(step, Exception):
                raise step
            if step is None:
                await asyncio.Event().wait()
            else:
                yield step


class Served:
    """A forwarder with one model, ``m``, on ranks A and B."""

    def __init__(
        self, *steps: Step, live: Callable[[Rank], bool] = lambda rank: True, **weights: Any
    ) -> None:
        self.promises = Promises()
        decider = Decider(WindowIndex(), Weights(**weights), namespaced_sequence_hashes)
        self.forwarder = Forwarder(decider, self.promises, live)
        self.client = FakeClient(*steps)
        self.model = self.forwarder.models["m"] = Model("m", Naming(16, 16))
        self.model.clients = {1: self.client, 2: self.client}  # type: ignore[dict-item]
        self.model.pool.ranks = (A, B)
        self.book = self.model.pool.book

    def chunks(self, call: Any = None, **request: Any) -> AsyncIterator[ChunkDict]:
        return self.forwarder.forward(
            {"model": "m", "token_ids": PROMPT, "routing": {"dp_rank": 0}, **request}, call or FakeCall()
        )

    async def all(self, call: Any = None, **request: Any) -> list[ChunkDict]:
        return [chunk async for chunk in self.chunks(call, **request)]

    def idle(self) -> bool:
        return len(self.book) == 0 == self.forwarder.in_flight


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 5))


def test_chunks_pass_as_they_are_and_the_worker_gets_the_request_with_its_dp_rank() -> None:
    async def body() -> None:
        served = Served({"token_ids": [5]}, LAST)
        request = {"routing": {"backend_instance_id": 2, "cache_salt": "s"}, "extra_args": {"a": 1}}
        assert await served.all(**request) == [{"token_ids": [5]}, LAST]
        ((worker_id, forwarded),) = served.client.requests
        assert worker_id == 2
        assert forwarded["routing"] == {"backend_instance_id": 2, "cache_salt": "s", "dp_rank": 3}
        assert (forwarded["token_ids"], forwarded["extra_args"]) == (PROMPT, {"a": 1})
        assert served.idle()
        assert served.forwarder.counts.ended == {("m", "completed"): 1}
        assert served.promises.ranks[B].exact == 1

    run(body())


def test_the_load_counts_the_prompt_until_the_first_token_and_blocks_until_the_end() -> None:
    async def body() -> None:
        served = Served({"token_ids": []}, {"token_ids": [5]}, {"token_ids": list(range(40))}, LAST)
        loads = [served.book.load(A) async for _ in served.chunks()]
        # The last chunk finds it gone: who has seen it may send the next request at once.
        assert loads == [Load(2, 40, 1), *[Load(2, 0, 1)] * 2, Load(0, 0, 0)]
        assert served.idle()

    run(body())


def test_output_counts_where_it_is_tracked() -> None:
    async def body() -> None:
        served = Served({"token_ids": [5]}, {"token_ids": list(range(40))}, LAST, track_output_blocks=True)
        loads = [served.book.load(A).blocks async for _ in served.chunks()]
        assert loads == [2, 5, 0]
        assert served.idle()

    run(body())


def test_nothing_is_asked_of_the_worker_before_the_frontend_asks_for_it() -> None:
    async def body() -> None:
        asked = []

        class Counting(FakeClient):
            async def generate(self, *_: Any) -> AsyncIterator[ChunkDict]:
                for number in range(1_000):
                    asked.append(number)
                    yield {"token_ids": [number]}

        served = Served()
        served.model.clients = {1: Counting()}  # type: ignore[dict-item]
        chunks = served.chunks()
        for _ in range(3):
            await anext(chunks)
        await asyncio.sleep(0)
        assert len(asked) == 3
        await chunks.aclose()  # type: ignore[attr-defined]
        assert served.idle()

    run(body())


def test_a_client_that_goes_frees_the_load_though_nobody_closes_the_stream() -> None:
    async def body() -> None:
        served = Served({"token_ids": [5]}, None)
        call = FakeCall()
        abandoned = served.chunks(call)
        await anext(abandoned)
        call.leave()
        await asyncio.sleep(0)
        assert served.idle()
        assert served.forwarder.counts.ended == {("m", "cancelled"): 1}
        await abandoned.aclose()  # type: ignore[attr-defined]
        assert served.forwarder.in_flight == 0

    run(body())


def test_a_client_that_goes_with_the_last_chunk_has_a_finished_request() -> None:
    async def body() -> None:
        served = Served(LAST, None)
        call = FakeCall()
        abandoned = served.chunks(call)
        await anext(abandoned)
        call.leave()
        await asyncio.sleep(0)
        assert served.idle()
        counts = served.forwarder.counts
        assert (counts.received, counts.ended) == ({"m": 1}, {("m", "completed"): 1})
        await abandoned.aclose()  # type: ignore[attr-defined]
        assert (served.forwarder.in_flight, counts.ended) == (0, {("m", "completed"): 1})

    run(body())


def test_a_request_that_nobody_reads_is_not_begun() -> None:
    async def body() -> None:
        served = Served(LAST)
        chunks = served.chunks()
        assert served.idle()
        assert not served.forwarder.counts.received
        await chunks.aclose()  # type: ignore[attr-defined]
        assert served.idle()
        assert not served.client.requests

    run(body())


def test_a_promise_is_judged_by_whether_the_view_was_live_when_the_rank_was_chosen() -> None:
    async def body() -> None:
        served = Served({"token_ids": [5]}, LAST, live=lambda rank: live[rank])
        live = {A: False, B: True}
        for worker_id in (1, 2):
            chunks = served.chunks(routing={"backend_instance_id": worker_id})
            await anext(chunks)
            live[A] = live[B] = True  # too late for this one
            assert [LAST] == [chunk async for chunk in chunks]
        recent = served.promises._recent
        assert [False, True] == [each.live for worker_id in (1, 2) for each in recent[worker_id]]

    run(body())


def test_a_lost_worker_is_passed_on_for_migration_and_avoided() -> None:
    async def body() -> None:
        served = Served({"token_ids": [5]}, Unavailable("stream ended"))
        with pytest.raises(Unavailable, match="stream ended"):
            await served.all(routing={"backend_instance_id": 1})
        served.client.steps = (LAST,)
        assert served.idle()
        assert served.forwarder.counts.ended == {("m", "unavailable"): 1}
        for _ in range(5):
            await served.all(routing={})
        assert {worker_id for worker_id, _ in served.client.requests[1:]} == {2}
        served.client.ids = [1]
        await served.all(routing={})
        assert served.client.requests[-1][0] == 1, "better than nobody"
        served.forwarder.forget(1)
        assert not served.forwarder._services.avoided.now(), "if it comes back, it has done nothing yet"

    run(body())


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InvalidRequest("too long"), "refused"),
        (Overloaded("full"), "unavailable"),
        (WorkerHttpError(418, "no coffee"), "refused"),
        (WorkerHttpError(501, "not built"), "failed"),
    ],
)
def test_a_workers_refusal_passes_with_its_words_and_is_no_reason_to_avoid_it(
    error: Exception, outcome: str
) -> None:
    async def body() -> None:
        served = Served(error)
        with pytest.raises(type(error), match=str(error)):
            await served.all()
        assert served.idle()
        assert served.forwarder.counts.ended == {("m", outcome): 1}
        served.client.steps = (LAST,)
        await served.all()
        assert served.client.requests[-1][0] == 1

    run(body())


def test_an_unknown_model_and_a_model_without_workers_are_refused() -> None:
    async def body() -> None:
        served = Served(LAST)
        with pytest.raises(InvalidRequest, match=r"unknown model 'mm': did you mean 'm'\?"):
            await served.all(model="mm")
        served.client.ids = []
        with pytest.raises(NoCandidate, match="no worker serves this model"):
            await served.all()
        assert served.idle()

    run(body())


def test_a_prompt_that_the_frontend_has_computed_ahead_is_of_the_model_of_its_endpoint() -> None:
    """It comes under a name that no worker serves; a client's wrong name stays wrong."""

    async def body() -> None:
        served = Served(LAST)
        for name, shown in (("speculative_prefill", "m"), ("m", "other")):
            request = {"model": name, "token_ids": PROMPT}
            assert [LAST] == [chunk async for chunk in served.forwarder.forward(request, FakeCall(), shown)]
        for name, shown in (("mm", "m"), ("speculative_prefill", None)):
            with pytest.raises(InvalidRequest, match="unknown model"):
                served.forwarder.forward({"model": name, "token_ids": PROMPT}, FakeCall(), shown)
        assert served.idle()

    run(body())


def test_unfinished_requests_are_not_compared_and_unreported_ones_are_counted_apart() -> None:
    async def body() -> None:
        served = Served({**LAST, "finish_reason": "cancelled"})
        await served.all()
        assert not served.promises.ranks
        served.client.steps = ({"token_ids": [7], "finish_reason": "stop"},)
        await served.all()
        assert served.promises.ranks[A].unreported == 1

    run(body())


def test_a_draining_router_sends_new_requests_elsewhere_and_waits_for_the_old() -> None:
    async def body() -> None:
        served = Served({"token_ids": [5]}, None)
        call = FakeCall()
        chunks = served.chunks(call)
        await anext(chunks)
        assert not await served.forwarder.drain(0.01)
        with pytest.raises(Unavailable, match="the router is stopping"):
            await served.all()
        draining = asyncio.create_task(served.forwarder.drain(5))
        await asyncio.sleep(0)
        call.leave()
        assert await draining

    run(body())
