"""One request through a prefill and a decode worker, made of a few lines: books, errors, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest

from tests.test_router_decide import Prefers
from tests.test_router_forward import FakeCall, Step, run
from vswa_plugin.dynamo_client import Refused, namespaced_sequence_hashes
from vswa_plugin.engine import ChunkDict
from vswa_plugin.errors import InvalidRequest, Overloaded, Unavailable
from vswa_plugin.events import Rank, Stored
from vswa_plugin.index import WindowIndex
from vswa_plugin.layout import CacheGroup, CacheLayout
from vswa_plugin.router.accuracy import Accuracy
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.disagg import PREFILL_TRIES
from vswa_plugin.router.forward import Forwarder, Model
from vswa_plugin.selection import Load, NoCandidate, Weights

P1, P2, D1, D2, AGG = Rank(11), Rank(12, 1), Rank(21), Rank(22, 2), Rank(31)
LAYOUT = CacheLayout((CacheGroup(0, 32, 16), CacheGroup(1, None, 16)), "trtllm_v2", "m")
PROMPT = list(range(160))
HASHES = namespaced_sequence_hashes(PROMPT, 16)


def usage(cached: int | None) -> dict[str, Any]:
    details = {} if cached is None else {"cached_tokens": cached, "audio_tokens": 0}
    return {"prompt_tokens": 160, "prompt_tokens_details": details}


def computed(cached: int | None = 0, **more: Any) -> ChunkDict:
    """The last chunk of a prefill worker."""
    last = {"token_ids": [9], "finish_reason": "length", "completion_usage": usage(cached)}
    return {**last, "disaggregated_params": {"secret": [1, "x"]}, **more}


LAST: ChunkDict = {"token_ids": [7], "finish_reason": "stop", "completion_usage": usage(160)}


class Workers:
    """All workers; each says what ``steps`` has for it, None waits. ``heard`` is called before each."""

    def __init__(self, steps: Mapping[int, list[Step]]) -> None:
        self.steps = dict(steps)
        self.ids = [11, 12, 21, 22, 31]
        self.asked: list[tuple[int, dict[str, Any]]] = []
        self.heard: Callable[[], None] = lambda: None

    def instance_ids(self) -> list[int]:
        return self.ids

    async def generate(
        self, request: dict[str, Any], worker_id: int, call: FakeCall
    ) -> AsyncIterator[ChunkDict]:
        self.asked.append((worker_id, request))
        for step in self.steps[worker_id]:
            self.heard()
            if isinstance(step, Exception):
                raise step
            if step is None:
                await call.gone()  # as a stream of Dynamo, it ends when the client goes
                return
            yield dict(step)


class Served:
    """A forwarder with one model on P1, P2 and D1, D2; all workers well unless ``steps`` says otherwise."""

    def __init__(
        self,
        steps: Mapping[int, list[Step]] | None = None,
        hooks: Any = None,
        agg: bool = False,
        **weights: Any,
    ) -> None:
        well: dict[int, list[Step]] = {
            **{rank.worker_id: [computed()] for rank in (P1, P2)},
            **{rank.worker_id: [{"token_ids": [5]}, LAST] for rank in (D1, D2, AGG)},
        }
        self.index = WindowIndex()
        for rank in (P1, P2, D1, D2, AGG):
            self.index.join(rank, LAYOUT)
        self.accuracy = Accuracy()
        decider = Decider(self.index, Weights(**weights), namespaced_sequence_hashes, hooks)
        self.forwarder = Forwarder(decider, self.accuracy, lambda rank: True)
        self.workers = Workers({**well, **(steps or {})})
        model = self.model = self.forwarder.models["m"] = Model("m", 16)
        model.clients = dict.fromkeys(self.workers.ids, self.workers)  # type: ignore[arg-type]
        model.prefill.ranks, model.decode.ranks = (P1, P2), (D1, D2)
        model.pool.ranks = (AGG,) if agg else ()
        self.book = model.pool.book

    def holds(self, rank: Rank, blocks: int) -> None:
        """Resumable there."""
        for group in (0, 1):
            self.index.apply(rank, Stored(group, 0, None, tuple(HASHES[:blocks])))

    def chunks(self, call: Any = None, **request: Any) -> AsyncIterator[ChunkDict]:
        given = {"model": "m", "token_ids": PROMPT, "stop_conditions": {"max_tokens": 50, "min_tokens": 4}}
        return self.forwarder.forward({**given, **request}, call or FakeCall())

    async def all(self, call: Any = None, **request: Any) -> list[ChunkDict]:
        return [chunk async for chunk in self.chunks(call, **request)]

    def asked(self) -> list[int]:
        return [worker_id for worker_id, _ in self.workers.asked]

    def idle(self) -> bool:
        return len(self.book) == 0 == self.forwarder.in_flight


def test_prefill_computes_the_prompt_and_decode_gets_what_it_hands_over_as_it_is() -> None:
    async def body() -> None:
        served = Served({12: [{"token_ids": []}, computed(48)]})
        served.holds(P2, 3)
        served.holds(D2, 3)
        routing = {"backend_instance_id": 22, "cache_salt": None}

        assert await served.all(routing=routing, extra_args={"a": 1}) == [
            {"token_ids": [5]},
            {**LAST, "completion_usage": usage(48)},
        ]
        (prefill, asked), (decode, told) = served.workers.asked
        assert (prefill, decode) == (12, 22)
        assert asked["stop_conditions"] == {"max_tokens": 1, "min_tokens": 1}
        assert asked["routing"] == {**routing, "dp_rank": 1, "prefill_worker_id": 12, "prefill_dp_rank": 1}
        assert told["routing"] == {**routing, "dp_rank": 2, "prefill_worker_id": 12, "prefill_dp_rank": 1}
        assert told["prefill_result"]["disaggregated_params"] == {"secret": [1, "x"]}
        assert told["stop_conditions"] == {"max_tokens": 50, "min_tokens": 4}
        assert (told["token_ids"], told["extra_args"]) == (PROMPT, {"a": 1})
        assert served.idle()
        assert served.forwarder.stats.finished == served.accuracy.ranks[P2].exact == 1
        assert D2 not in served.accuracy.ranks, "what it was handed is not what was promised"

    run(body())


@pytest.mark.parametrize(
    ("last", "cached"),
    [(computed(32), 32), (computed(None, disaggregated_params={"cached_tokens": 16}), 16)],
)
def test_what_was_cached_is_read_from_the_usage_or_beside_what_is_handed_over(
    last: ChunkDict, cached: int
) -> None:
    async def body() -> None:
        served = Served({11: [last], 12: [last]})
        assert (await served.all())[-1]["completion_usage"] == usage(cached)
        assert [rank.actual_tokens for rank in served.accuracy.ranks.values()] == [cached]

    run(body())


def test_a_prefill_worker_that_says_nothing_of_its_cache_leaves_the_usage_as_it_is() -> None:
    async def body() -> None:
        served = Served({11: [computed(None)], 12: [computed(None)]})
        assert (await served.all())[-1] == LAST
        assert [rank.unreported for rank in served.accuracy.ranks.values()] == [1]

    run(body())


def test_the_prompt_is_load_of_the_prefill_rank_until_it_is_computed_and_then_of_the_decode_rank() -> None:
    async def body() -> None:
        served = Served({11: [{"token_ids": []}, computed(), {"token_ids": []}]})
        served.holds(P1, 4)
        served.holds(D2, 8)
        loads: list[tuple[Load, Load]] = []
        served.workers.heard = lambda: loads.append((served.book.load(P1), served.book.load(D1)))
        await served.all(routing={"decode_worker_id": 21})

        # Before each chunk; the first one of the prefill worker has no token, the second one is its last.
        assert loads == [(Load(10, 96, 1), Load())] * 2 + [(Load(), Load())] + [(Load(), Load(10, 0, 1))] * 2
        assert served.idle()

    run(body())


def test_prefill_goes_where_most_is_cached_whatever_blocks_are_held_there() -> None:
    async def body() -> None:
        served = Served()
        served.holds(P1, 4)
        served.book.add("other", P1, range(1_000, 1_009), 160, 0)
        await served.all()
        assert served.asked()[0] == 11

    run(body())


def test_prompts_in_flight_send_the_next_one_to_another_prefill_worker() -> None:
    async def body() -> None:
        served = Served()
        served.book.add("other", P1, range(1_000, 1_010), 160, 160)
        for _ in range(4):
            await served.all()
        assert {each for each in served.asked() if each in (11, 12)} == {12}

    run(body())


def test_decode_goes_where_least_is_read_and_what_it_holds_counts_as_saved_transfer() -> None:
    async def chosen(other_blocks: int, **weights: Any) -> int:
        served = Served(**weights)
        served.holds(D1, 6)
        served.book.add("other", D1, range(1_000, 1_000 + other_blocks), 16 * other_blocks, 0)
        await served.all()
        return served.asked()[1]

    async def body() -> None:
        assert await chosen(4) == 21
        assert await chosen(6) == 22
        assert await chosen(4, transfer_credit=0.5) == 22
        assert await chosen(4, transfer_credit=0) == 22
        assert await chosen(4, overlap_score_credit=0) == 22

    run(body())


def test_decode_goes_where_fewest_requests_are_though_none_fills_a_block() -> None:
    async def body() -> None:
        served = Served()
        served.book.add("other", D1, (), 9, 0)
        for _ in range(5):
            await served.all(token_ids=PROMPT[:9])
        assert set(served.asked()[1::2]) == {22}

    run(body())


def test_a_crowd_with_one_prompt_is_decoded_by_all_though_one_holds_it() -> None:
    async def body() -> None:
        served = Served({21: [None], 22: [None]})
        served.holds(D1, 10)
        calls = [FakeCall() for _ in range(8)]
        tasks = [asyncio.create_task(served.all(call)) for call in calls]
        while len(served.workers.asked) < 16:
            await asyncio.sleep(0)
        decoding = [each for each in served.asked() if each > 20]
        assert 3 <= decoding.count(21) <= 5
        for call in calls:
            call.leave()
        await asyncio.gather(*tasks)
        assert served.idle()

    run(body())


def test_plugins_are_asked_for_each_phase() -> None:
    async def body() -> None:
        hooks = Prefers({P1: 0.0})
        await Served(hooks=hooks).all()
        assert [(told.phase, {each.rank for each in found}) for told, found in hooks.told] == [
            ("prefill", {P1, P2}),
            ("decode", {D1, D2}),
        ]

    run(body())


def test_a_prefill_worker_that_is_lost_is_replaced_before_anything_was_streamed() -> None:
    async def body() -> None:
        served = Served({11: [{"token_ids": []}, Unavailable("stream ended")]})
        served.holds(P1, 8)
        assert (await served.all())[-1]["finish_reason"] == "stop"
        assert served.asked()[:2] == [11, 12]
        assert served.forwarder.stats.prefill_retries == 1
        assert served.forwarder.stats.unavailable == 0
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
        assert many.forwarder.stats.unavailable == 1

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
        assert served.forwarder.stats.unavailable == 1
        assert served.idle()
        await served.all(token_ids=[*PROMPT, 5])
        assert served.asked()[3] == 22

    run(body())


@pytest.mark.parametrize("phase", [(11, 12), (21, 22)])
@pytest.mark.parametrize("error", [InvalidRequest("too long"), Overloaded("full"), Refused(418, "no coffee")])
def test_a_refusal_in_either_phase_passes_with_its_words(phase: tuple[int, ...], error: Exception) -> None:
    async def body() -> None:
        served = Served({number: [error] for number in phase})
        with pytest.raises(type(error), match=str(error)):
            await served.all()
        assert len(served.asked()) == (1 if 11 in phase else 2), "nobody else is asked"
        assert served.forwarder.stats.refused == 1
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
        assert served.forwarder.stats.cancelled == 1

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


def test_an_answer_that_a_prefill_worker_ends_itself_is_the_clients() -> None:
    async def body() -> None:
        for reason in ("stop", "error"):
            last = computed(0, finish_reason=reason)
            served = Served({11: [last], 12: [last]})
            (chunk,) = await served.all()
            assert (chunk["finish_reason"], chunk["token_ids"]) == (reason, [9])
            assert "disaggregated_params" not in chunk
            assert served.idle()
            assert bool(served.accuracy.ranks) is (reason == "stop")

    run(body())


def test_a_prefill_worker_that_breaks_its_contract_is_named() -> None:
    async def body() -> None:
        nothing = {"token_ids": [9], "finish_reason": "length"}
        with pytest.raises(Refused, match=r"prefill worker [bc]: expected disaggregated_params"):
            await Served({11: [nothing], 12: [nothing]}).all()
        with pytest.raises(Unavailable, match="ended without a last chunk"):
            await Served({11: [], 12: [{"token_ids": [9]}]}).all()

    run(body())


def test_without_one_kind_of_worker_the_other_is_not_asked_and_the_reason_is_given() -> None:
    async def body() -> None:
        served = Served()
        for here, missing in (([11, 12], "decode"), ([21, 22], "prefill")):
            served.workers.ids = here
            with pytest.raises(NoCandidate, match=f"no {missing} worker .*--mode {missing}"):
                await served.all()
        served.workers.ids = []
        with pytest.raises(NoCandidate, match="no worker serves this model"):
            await served.all()
        assert not served.asked()
        assert served.idle()

    run(body())


def test_aggregated_workers_beside_them_serve_while_one_kind_is_away() -> None:
    async def body() -> None:
        served = Served(agg=True)
        await served.all()
        served.workers.ids = [21, 22, 31]
        await served.all()
        assert len(served.asked()) == 3
        worker_id, request = served.workers.asked[-1]
        assert worker_id == 31
        assert "prefill_result" not in request

    run(body())


def test_a_model_can_be_served_by_aggregated_workers_or_by_one_of_each_kind() -> None:
    model = Model("m", 16)
    assert model.missing() == "no worker serves this model right now"
    model.prefill.ranks = (P1,)
    assert "--mode decode" in str(model.missing())
    model.decode.ranks = (D1,)
    assert model.missing() is None
    model.prefill.ranks = ()
    assert "--mode prefill" in str(model.missing())
    model.pool.ranks = (AGG,)
    assert model.missing() is None
