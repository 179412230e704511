"""Choices over HTTP where prefill and decode workers are apart: one of each, and load of both."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e_helpers import eventually
from tests.router_http_helpers import PROMPT, Api, entry_of, run, stored
from vswa_plugin.selection import Load
from vswa_plugin.wire.events import Rank

#: Prefill workers, the first with two ranks, and decode workers of the model ``d``.
P1, P1B, P2, D1, D2 = Rank(11), Rank(11, 1), Rank(12), Rank(21), Rank(22, 0)
PREFILL = (entry_of(11, "d", dp=2, mode="prefill"), entry_of(12, "d", mode="prefill"))
DECODE = (entry_of(21, "d", mode="decode"), entry_of(22, "d", mode="decode"))


class Apart(Api):
    """With two workers of each kind, all known exactly."""

    async def __aenter__(self) -> Apart:
        await super().__aenter__()
        self.enter(*PREFILL, *DECODE)
        for rank in (P1, P1B, P2, D1, D2):
            await self.holds(rank, model="d")
        return self

    def loads(self, *ranks: Rank) -> list[Load]:
        book = self.choices.models()["d"].pool.book
        return [book.load(rank) for rank in ranks]

    async def select(self, **wish: Any) -> tuple[int, Any]:
        return await self.post("/select", **{"token_ids": PROMPT, "model_name": "d", **wish})


def test_prompts_go_where_they_are_cached_and_decode_where_least_is_read_and_both_are_pinned() -> None:
    async def body() -> tuple[Any, list[Load]]:
        async with Apart() as api:
            await api.holds(P1, stored(sliding=[0, 1], whole=range(8)), "d")
            await api.holds(P1B, stored(sliding=[3, 4], whole=range(5)), "d")
            await api.select(token_ids=[*range(900, 1_030)], prefill_worker_id=12, decode_worker_id=22)
            status, answer = await api.select()
            assert status == 200
            return answer, api.loads(P1, P1B, P2, D1, D2)

    answer, loads = run(body())

    assert (answer["worker_id"], answer["dp_rank"]) == ("21", 0)
    assert (answer["prefill"]["worker_id"], answer["prefill"]["dp_rank"]) == ("11", 1)
    assert answer["headers"] == {
        "x-dynamo-worker-instance-id": "21",
        "x-dynamo-dp-rank": "0",
        "x-dynamo-prefill-instance-id": "11",
        "x-dynamo-prefill-dp-rank": "1",
    }
    assert answer["nvext"] == {
        "backend_instance_id": 21,
        "decode_worker_id": 21,
        "dp_rank": 0,
        "prefill_worker_id": 11,
        "prefill_dp_rank": 1,
    }
    assert (answer["cached_tokens"], answer["effective_prefill_tokens"]) == (80, 50)
    assert answer["prefill"]["overlap"]["dp"] == {"0": 32, "1": 80}
    assert answer["overlap"]["longest_matched"] == 0
    assert loads == [Load(), Load(8, 50, 1), Load(8, 130, 1), Load(8, 0, 1), Load(8, 0, 1)]


def test_the_prompt_is_load_until_it_is_computed_and_the_request_until_it_is_released() -> None:
    async def body() -> tuple[list[list[Load]], list[int]]:
        async with Apart() as api:
            _, answer = await api.select(prefill_worker_id=12, decode_worker_id=21)
            wish = {"selection_id": answer["selection_id"]}
            found = [api.loads(P2, D1)]
            for path in ("/prefill_complete", "/prefill_complete", "/release"):
                assert await api.post(path, **wish) == (200, {**wish, "predicted_tokens": 0})
                found.append(api.loads(P2, D1))
            return found, [(await api.post("/release", **wish))[0]]

    found, again = run(body())

    assert found[0] == [Load(8, 130, 1), Load(8, 0, 1)]
    assert found[1:3] == [[Load(), Load(8, 0, 1)]] * 2
    assert (found[3], again) == ([Load(), Load()], [404])


@pytest.mark.parametrize("how", ["release", "ttl", "choice only", "stop"])
def test_however_a_choice_ends_it_leaves_no_load_on_either_worker(how: str) -> None:
    async def body() -> list[Load]:
        async with Apart() as api:
            wish: dict[str, Any] = {"choice only": {"reserve": False}, "ttl": {"ttl_s": 0.05}}.get(how, {})
            _, answer = await api.select(**wish)
            model = api.choices.models()["d"]
            if how == "release":
                await api.post("/release", selection_id=answer["selection_id"])
            elif how == "ttl":
                await eventually(lambda: not len(model.pool.book), "it has ended")
            elif how == "stop":
                await api.server.stop()
            return api.loads(P1, P1B, P2, D1, D2)

    assert run(body()) == [Load()] * 5


def test_a_wish_that_no_decode_worker_meets_leaves_no_load_on_the_prefill_worker() -> None:
    async def body() -> list[Any]:
        async with Apart() as api:
            found = [await api.select(decode_worker_id=9), await api.select(allowed_worker_ids=[11, 12])]
            assert api.loads(P1, P1B, P2) == [Load()] * 3
            return found

    (pinned, said), (listed, _) = run(body())

    assert (pinned, listed) == (400, 503)
    expected = "decode_worker_id: expected a rank of this model that fits 9, got (worker.dp_rank): 21.0, 22.0"
    assert said["error"] == expected


def test_pins_and_lists_count_for_their_phase() -> None:
    async def body() -> list[tuple[int, int, int]]:
        async with Apart() as api:
            found = []
            for wish in (
                {"prefill_worker_id": 11, "prefill_dp_rank": 1, "decode_worker_id": 22},
                {"backend_instance_id": "21", "allowed_worker_ids": ["12", 21]},
            ):
                _, answer = await api.select(reserve=False, **wish)
                prefill = answer["prefill"]
                found.append((int(prefill["worker_id"]), prefill["dp_rank"], int(answer["worker_id"])))
            return found

    assert run(body()) == [(11, 1, 22), (12, 0, 21)]


def test_what_was_promised_and_reported_is_of_the_worker_that_computes() -> None:
    async def body() -> Any:
        async with Apart() as api:
            await api.holds(P2, stored(sliding=range(8), whole=range(8)), "d")
            _, answer = await api.select()
            await api.post("/release", selection_id=answer["selection_id"], cached_tokens=128)
            return api.promises.ranks

    ranks = run(body())

    assert ranks.keys() == {P2}
    assert (ranks[P2].exact, ranks[P2].predicted_tokens) == (1, 128)


def test_one_kind_of_worker_alone_cannot_serve_and_aggregated_ones_stand_in() -> None:
    async def body() -> list[Any]:
        async with Apart() as api:
            found = []
            for entry in DECODE:
                del api.fleet.entries[entry.key]
            found.append(await api.select())
            api.enter(entry_of(31, "d"))
            found.append(await api.select())
            return found

    (refused, said), (status, answer) = run(body())

    assert (refused, status) == (503, 200)
    assert "no decode worker serves this model right now" in said["error"]
    assert (answer["worker_id"], answer["prefill"]) == ("31", None)
    assert "x-dynamo-prefill-instance-id" not in answer["headers"]


def test_a_worker_that_goes_takes_its_part_of_the_load_with_it() -> None:
    async def body() -> list[Load]:
        async with Apart() as api:
            await api.select(prefill_worker_id=12, decode_worker_id=21)
            del api.fleet.entries[PREFILL[1].key]
            api.choices.models()
            return api.loads(P2, D1)

    assert run(body()) == [Load(), Load(8, 0, 1)]


def test_a_prompt_is_hashed_once_for_all_that_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> list[int]:
        async with Apart() as api:
            hashed: list[int] = []
            hasher = api.choices._hasher

            def counting(token_ids: Any, *more: Any) -> Any:
                hashed.append(len(token_ids))
                return hasher(token_ids, *more)

            monkeypatch.setattr(api.choices, "_hasher", counting)
            monkeypatch.setattr(api.decider, "_hasher", counting)
            await api.select()
            await api.post("/select", token_ids=PROMPT, model_name="m")
            return hashed

    assert run(body()) == [130, 130]
