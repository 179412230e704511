"""Prompts that no decode worker will fetch: tried with another one, or freed by their prefill worker."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.router.test_forward import FakeCall, Step, run
from tests.router_disagg_helpers import D2, LAST, Served, computed
from vswa_plugin.dynamo.client import Unreached, WorkerHttpError
from vswa_plugin.errors import InvalidRequest, Overloaded, Unavailable
from vswa_plugin.router.disagg import DECODE_TRIES
from vswa_plugin.selection import NoCandidate
from vswa_plugin.wire.events import Rank

#: What the prefill workers hand over, see computed().
PARAMS = {"secret": [1, "x"]}
#: Of prompts that worker 11 computes.
FREED = [(11, PARAMS)]
THERE = {"routing": {"prefill_worker_id": 11}}
UNREACHED = Unreached("connection refused")


def test_a_decode_worker_that_cannot_be_called_is_replaced_and_the_prompt_is_not_computed_again() -> None:
    async def body() -> None:
        served = Served({21: [UNREACHED]})
        served.book.add("other", D2, range(1_000, 1_010), 160, 0)
        assert LAST["finish_reason"] == (await served.all(**THERE))[-1]["finish_reason"]
        assert [11, 21, 22] == served.asked()
        (_, first), (_, second) = served.workers.asked[1:]
        assert PARAMS == first["prefill_result"]["disaggregated_params"]
        assert first["prefill_result"] == second["prefill_result"]
        counts = served.forwarder.counts
        assert (1, 1) == (counts.decode_retries.total(), counts.ended.total())
        assert [] == await served.released()
        assert 1 == len(served.book), "the other"

    run(body())


def test_decode_workers_that_cannot_be_called_are_replaced_only_so_often_and_only_by_others() -> None:
    async def body() -> None:
        lost = Served({21: [UNREACHED], 22: [UNREACHED]})
        with pytest.raises(Unreached, match="connection refused"):
            await lost.all(**THERE)
        assert [11, 21, 22] == sorted(lost.asked())
        assert FREED == await lost.released()
        many = Served({number: [UNREACHED] for number in range(40, 50)})
        many.model.decode.ranks = tuple(Rank(number) for number in range(40, 50))
        many.workers.ids += range(40, 50)
        many.model.clients |= dict.fromkeys(range(40, 50), many.workers)  # type: ignore[arg-type]
        with pytest.raises(Unreached, match="connection refused"):
            await many.all(**THERE)
        assert len(set(many.asked())) == len(many.asked()) == 1 + DECODE_TRIES
        assert FREED == await many.released()
        assert lost.idle() and many.idle()

    run(body())


def test_a_worker_of_both_phases_that_cannot_be_called_is_the_frontends_to_replace() -> None:
    async def body() -> None:
        served = Served({31: [UNREACHED]}, agg=True)
        served.model.prefill.ranks = served.model.decode.ranks = ()
        with pytest.raises(Unreached):
            await served.all()
        assert [31] == served.asked()
        assert [] == await served.released()

    run(body())


@pytest.mark.parametrize(
    "steps",
    [
        [Unavailable("stream ended")],
        [{"token_ids": []}, Unavailable("stream ended")],
        [InvalidRequest("too long")],
        [Overloaded("full")],
        [WorkerHttpError(418, "no coffee")],
    ],
)
def test_a_decode_call_that_fails_before_its_first_token_frees_the_prompt(steps: list[Step]) -> None:
    async def body() -> None:
        served = Served({21: steps, 22: steps})
        error = steps[-1]
        assert isinstance(error, Exception)
        with pytest.raises(type(error), match=str(error)):
            await served.all(**THERE)
        assert FREED == await served.released()
        assert 1 == served.forwarder.counts.released_prompts.total()
        assert 2 == len(served.asked()), "the decode worker may have begun to fetch it: it is used up"

    run(body())


def test_after_the_first_token_the_prompt_has_been_fetched() -> None:
    async def body() -> None:
        broken: list[Step] = [{"token_ids": [5]}, Unavailable("stream ended")]
        served = Served({21: broken, 22: broken})
        with pytest.raises(Unavailable, match="stream ended"):
            await served.all(**THERE)
        assert [] == await served.released()
        await Served().all()
        assert [] == await served.released()

    run(body())


def test_no_decode_worker_at_all_frees_the_prompt() -> None:
    async def body() -> None:
        served = Served()

        def leave() -> None:
            served.model.decode.ranks = ()

        served.workers.heard = leave  # as the prompt is computed
        with pytest.raises(NoCandidate):
            await served.all(**THERE)
        assert FREED == await served.released()

    run(body())


def test_a_client_that_goes_while_a_decode_worker_waits_frees_the_prompt() -> None:
    async def body() -> None:
        served = Served({21: [None], 22: [None]})
        call = FakeCall()
        asked = asyncio.create_task(served.all(call, **THERE))
        while len(served.asked()) < 2:
            await asyncio.sleep(0)
        call.leave()
        assert [] == await asked
        assert FREED == await served.released()

    run(body())


def test_a_client_that_goes_as_its_prompt_is_computed_frees_it() -> None:
    async def body() -> None:
        served = Served({11: [computed(), None]})
        call = FakeCall()
        asked = asyncio.create_task(served.all(call, **THERE))
        while not served.asked():
            await asyncio.sleep(0)
        call.leave()
        assert [] == await asked
        assert FREED == await served.released()

    run(body())


def test_an_answer_that_needs_no_decode_worker_frees_nothing() -> None:
    async def body() -> None:
        served = Served({11: [computed(finish_reason="stop")]})
        await served.all(**THERE)
        assert [] == await served.released()

    run(body())


async def _not_released() -> bool:
    return False


async def _failing() -> bool:
    raise Unavailable("it has gone too")


def test_what_a_prefill_worker_did_not_hold_is_not_counted_and_a_lost_one_costs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def body() -> None:
        for releasing in (_not_released, _failing):
            served = Served({21: [Unavailable("gone")], 22: [Unavailable("gone")]})
            served.workers.releasing = releasing
            with pytest.raises(Unavailable, match="gone"):
                await served.all(**THERE)
            assert FREED == await served.released()
            assert 0 == served.forwarder.counts.released_prompts.total()
            assert served.idle()

    run(body())
    assert ["prefill worker 11 could not be told"] == [
        record.getMessage()[:35] for record in caplog.records if "prefill worker" in record.getMessage()
    ]


def test_prompts_that_are_freed_at_the_same_time_are_all_counted() -> None:
    async def body() -> None:
        served, answer = Served({21: [Unavailable("gone")], 22: [Unavailable("gone")]}), asyncio.Event()

        async def slow() -> bool:
            await answer.wait()
            return True

        served.workers.releasing = slow
        for _ in range(3):
            with pytest.raises(Unavailable, match="gone"):
                await served.all(**THERE)
        while len(served.workers.released) < 3:
            await asyncio.sleep(0)
        answer.set()
        assert FREED * 3 == await served.released()
        assert 3 == served.forwarder.counts.released_prompts.total()

    run(body())


def test_a_prefill_worker_that_has_left_is_not_called() -> None:
    async def body() -> None:
        served = Served({21: [Unavailable("gone")], 22: [Unavailable("gone")]})

        def leave() -> None:
            if len(served.asked()) == 2:
                served.model.clients.pop(11, None)

        served.workers.heard = leave
        with pytest.raises(Unavailable, match="gone"):
            await served.all(**THERE)
        assert [] == await served.released()

    run(body())


def test_a_router_that_stops_waits_for_what_it_has_to_tell() -> None:
    async def body() -> None:
        served, told = Served({21: [Unavailable("gone")], 22: [Unavailable("gone")]}), asyncio.Event()

        async def slow() -> bool:
            await told.wait()
            return True

        served.workers.releasing = slow
        with pytest.raises(Unavailable, match="gone"):
            await served.all(**THERE)
        draining = asyncio.create_task(served.forwarder.drain(1))
        for _ in range(50):  # it is told, and whatever else there is to do has been done
            await asyncio.sleep(0)
        assert FREED == served.workers.released
        assert not draining.done()
        told.set()
        assert await draining
        assert 1 == served.forwarder.counts.released_prompts.total()

    run(body())
