"""A prefill or decode worker is lost or refuses a request, or its client goes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.router.test_forward import FakeCall, Step, run
from tests.router_disagg_helpers import P1, PROMPT, Served, computed
from vswa_plugin.dynamo.client import WorkerHttpError
from vswa_plugin.errors import InvalidRequest, Overloaded, Unavailable
from vswa_plugin.router.disagg import PREFILL_TRIES
from vswa_plugin.wire.events import Rank


def test_a_prefill_worker_that_is_lost_is_replaced_before_anything_was_streamed() -> None:
    async def body() -> None:
        served = Served({11: [{"token_ids": []}, Unavailable("stream ended")]})
        served.holds(P1, 8)
        assert (await served.all())[-1]["finish_reason"] == "stop"
        assert served.asked()[:2] == [11, 12]
        assert served.forwarder.counts.prefill_retries.total() == 1
        assert served.forwarder.counts.ended["m", "unavailable"] == 0
        await served.all()
        assert served.asked()[3] == 12, "it is avoided for a while"
        assert served.idle()

    run(body())


def test_lost_prefill_workers_are_replaced_only_so_often_and_only_by_others() -> None:
    async def body() -> None:
        lost = Served({11: [Unavailable("gone")], 12: [Unavailable("gone too")]})
        with pytest.raises(Unavailable, match="gone"):
            await lost.all()
        assert sorted(lost.asked()) == [11, 12]
        pinned = Served({11: [Unavailable("gone")]})
        with pytest.raises(Unavailable, match="gone"):
            await pinned.all(routing={"prefill_worker_id": 11})
        many = Served({number: [Unavailable("gone")] for number in range(40, 50)})
        many.model.prefill.ranks = tuple(Rank(number) for number in range(40, 50))
        many.workers.ids += range(40, 50)
        many.model.clients |= dict.fromkeys(range(40, 50), many.workers)  # type: ignore[arg-type]
        with pytest.raises(Unavailable, match="gone"):
            await many.all()
        assert len(set(many.asked())) == len(many.asked()) == PREFILL_TRIES
        assert lost.idle() and pinned.idle() and many.idle()
        assert many.forwarder.counts.ended["m", "unavailable"] == 1

    run(body())


def test_a_prefill_worker_that_is_lost_after_its_last_chunk_is_not_missed() -> None:
    async def body() -> None:
        broken: list[Step] = [computed(), Unavailable("gone")]
        served = Served({11: broken, 12: broken})
        assert (await served.all())[-1]["finish_reason"] == "stop"
        assert len(served.asked()) == 2

    run(body())


def test_a_decode_worker_that_is_lost_is_the_frontends_to_migrate() -> None:
    async def body() -> None:
        served = Served({21: [{"token_ids": [5]}, Unavailable("stream ended")]})
        with pytest.raises(Unavailable, match="stream ended"):
            await served.all(routing={"decode_worker_id": 21})
        assert served.forwarder.counts.ended["m", "unavailable"] == 1
        assert served.idle()
        await served.all(token_ids=[*PROMPT, 5])
        assert served.asked()[3] == 22

    run(body())


@pytest.mark.parametrize("phase", [(11, 12), (21, 22)])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InvalidRequest("too long"), "refused"),
        (Overloaded("full"), "unavailable"),
        (WorkerHttpError(418, "no coffee"), "refused"),
    ],
)
def test_a_refusal_in_either_phase_passes_with_its_words(
    phase: tuple[int, ...], error: Exception, outcome: str
) -> None:
    async def body() -> None:
        served = Served({number: [error] for number in phase})
        with pytest.raises(type(error), match=str(error)):
            await served.all()
        assert len(served.asked()) == (1 if 11 in phase else 2), "nobody else is asked"
        assert served.forwarder.counts.ended == {("m", outcome): 1}
        assert served.idle()

    run(body())


@pytest.mark.parametrize("phase", [11, 21])
def test_a_client_that_goes_frees_the_load_of_either_phase_and_starts_no_further_one(phase: int) -> None:
    async def body() -> None:
        served = Served({number: [None] for number in (phase, phase + 1)})
        call = FakeCall()
        asked = asyncio.create_task(served.all(call))
        while not served.asked() or served.asked()[-1] < phase:
            await asyncio.sleep(0)
        assert len(served.book) == 1
        call.leave()
        await asyncio.sleep(0)
        assert served.idle()
        assert await asked == []
        assert len(served.asked()) == (1 if phase == 11 else 2)
        assert served.forwarder.counts.ended["m", "cancelled"] == 1

    run(body())


def test_a_client_that_goes_as_the_prompt_is_computed_starts_no_decode() -> None:
    async def body() -> None:
        served = Served({11: [computed(), None], 12: [computed(), None]})
        call = FakeCall()
        asked = asyncio.create_task(served.all(call))
        while not served.asked():
            await asyncio.sleep(0)
        call.leave()
        assert await asked == []
        assert len(served.asked()) == 1
        assert served.idle()

    run(body())


def test_a_prompt_whose_worker_is_lost_after_its_client_has_gone_is_given_to_nobody_else() -> None:
    async def body() -> None:
        call = FakeCall()
        served = Served({number: [{"token_ids": []}, Unavailable("gone")] for number in (11, 12)})
        task = asyncio.create_task(served.all(call))
        served.workers.heard = lambda: call.stopped() or call.leave()
        generate = served.workers.generate

        async def slow(*given: Any) -> Any:
            async for chunk in generate(*given):
                await asyncio.sleep(0)  # the client's going is seen
                yield chunk

        served.workers.generate = slow  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="gone"):
            await task
        assert len(served.asked()) == 1
        assert served.idle()
        assert served.forwarder.counts.prefill_retries.total() == 0

    run(body())


def test_an_answer_that_a_prefill_worker_ends_itself_is_the_clients() -> None:
    async def body() -> None:
        for reason in ("stop", "error"):
            last = computed(0, finish_reason=reason)
            served = Served({11: [last], 12: [last]})
            (chunk,) = await served.all()
            assert (chunk["finish_reason"], chunk["token_ids"]) == (reason, [9])
            assert "disaggregated_params" not in chunk
            assert served.idle()
            assert bool(served.promises.ranks) is (reason == "stop")

    run(body())


def test_a_prefill_worker_that_breaks_its_contract_is_named() -> None:
    async def body() -> None:
        nothing = {"token_ids": [9], "finish_reason": "length"}
        with pytest.raises(WorkerHttpError, match=r"prefill worker 1[12]: expected disaggregated_params"):
            await Served({11: [nothing], 12: [nothing]}).all()
        with pytest.raises(Unavailable, match="ended without a last chunk"):
            await Served({11: [], 12: [{"token_ids": [9]}]}).all()

    run(body())
