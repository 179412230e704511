"""One request through a prefill and a decode worker: who is chosen, what is handed over, what is booked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.router.test_decide import Prefers
from tests.router.test_forward import FakeCall, run
from tests.router_disagg_helpers import AGG, D1, D2, LAST, P1, P2, PROMPT, Served, computed, usage
from vswa_plugin.blocks.layout import Naming
from vswa_plugin.engine.contract import ChunkDict
from vswa_plugin.errors import Unavailable
from vswa_plugin.router.pools import Model
from vswa_plugin.selection import Load, NoCandidate


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
        assert served.forwarder.counts.ended["m", "completed"] == served.promises.ranks[P2].exact == 1
        assert D2 not in served.promises.ranks, "what it was handed is not what was promised"

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
        assert [rank.actual_tokens for rank in served.promises.ranks.values()] == [cached]

    run(body())


def test_a_prefill_worker_that_says_nothing_of_its_cache_leaves_the_usage_as_it_is() -> None:
    async def body() -> None:
        served = Served({11: [computed(None)], 12: [computed(None)]})
        assert (await served.all())[-1] == LAST
        assert [rank.unreported for rank in served.promises.ranks.values()] == [1]

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


def test_a_prompt_is_hashed_once_for_both_phases_and_all_tries() -> None:
    async def body() -> None:
        served = Served({11: [Unavailable("gone")]})
        served.holds(P1, 8)
        await served.all()
        assert served.asked() == [11, 12, served.asked()[2]]
        assert served.hashed == 1

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
    model = Model("m", Naming(16, 16))
    assert model.missing() == "no worker serves this model right now"
    model.prefill.ranks = (P1,)
    assert "--mode decode" in str(model.missing())
    model.decode.ranks = (D1,)
    assert model.missing() is None
    model.prefill.ranks = ()
    assert "--mode prefill" in str(model.missing())
    model.pool.ranks = (AGG,)
    assert model.missing() is None
