"""Choices over HTTP: a gateway is told where a request goes, and its load counts until it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from tests.e2e_helpers import eventually
from tests.router.test_models import ODD
from tests.router_http_helpers import A1, HASHES, PROMPT, A, Api, B, entry_of, run, stored
from vswa_plugin.dynamo.preprocess import NotRead
from vswa_plugin.router import reservations
from vswa_plugin.router.replicas.load import SharedLoad
from vswa_plugin.selection import Load, RoutedRequest, Scored
from vswa_plugin.wire.events import Rank


def test_the_choice_is_exact_names_the_headers_that_pin_it_and_counts_as_load() -> None:
    """A holds the whole prompt without its sliding blocks, B less that can be resumed."""

    async def body() -> tuple[Any, Load]:
        async with Api() as api:
            await api.all_live()
            await api.holds(A, stored(sliding=[0, 1], whole=range(8)))
            await api.holds(B, stored(sliding=[3, 4], whole=range(5)))
            began = time.time()
            status, answer = await api.post("/select", token_ids=PROMPT, model_name="m", ttl_s=60)
            assert status == 200
            assert 59 < answer["expires_at"] - began < 61
            return answer, api.book.load(B)

    answer, load = run(body())

    assert (answer["worker_id"], answer["dp_rank"]) == ("2", 0)
    assert answer["headers"] == {"x-dynamo-worker-instance-id": "2", "x-dynamo-dp-rank": "0"}
    assert (answer["cached_tokens"], answer["effective_prefill_tokens"]) == (80, 50)
    assert answer["overlap"]["longest_matched"] == 80
    assert answer["endpoint"] == "dyn://ns.backend.generate"
    assert load == Load(8, 50, 1)


def test_the_answer_looks_at_the_tiers_of_the_chosen_worker_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> tuple[Any, list[Any]]:
        async with Api() as api:
            for rank in (A, A1, B):
                await api.holds(rank, stored(sliding=range(8), whole=range(8)))
            tiers, asked = api.fleet.index.tiers, []

            def counted(rank: Any, *given: Any) -> Any:
                asked.append(rank)
                return tiers(rank, *given)

            monkeypatch.setattr(api.fleet.index, "tiers", counted)
            _, answer = await api.post("/select", token_ids=PROMPT, allowed_worker_ids=[2])
            return answer, asked

    answer, asked = run(body())

    assert answer["overlap"]["ranks"]["0"]["tiers"] == {"device": 8}
    assert [B, B] == asked, "once for the cost, once for the answer"


def test_plugins_are_told_the_session_that_a_request_belongs_to() -> None:
    sessions: list[str | None] = []

    class Watching:
        def score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float]:
            sessions.append(request.session_id)
            return {}

        def select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
            return None

    async def body() -> list[int]:
        async with Api(hooks=Watching()) as api:
            await api.all_live()
            wishes: list[dict[str, Any]] = [{"session_id": "conversation"}, {}, {"session_id": 7}]
            return [(await api.post("/select", token_ids=PROMPT, **wish))[0] for wish in wishes]

    assert run(body()) == [200, 200, 400]
    assert sessions == ["conversation", None]


@pytest.mark.parametrize(
    "wish", [{"prompt_logprobs": 0}, {"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}], ids=str
)
def test_a_request_that_switches_the_cache_off_is_promised_nothing(wish: dict[str, Any]) -> None:
    async def body() -> tuple[Any, Load]:
        async with Api() as api:
            await api.all_live()
            await api.holds(B, stored(sliding=range(8), whole=range(8)))
            status, answer = await api.post("/select", token_ids=PROMPT, allowed_worker_ids=[2], **wish)
            assert status == 200, answer
            return answer, api.book.load(B)

    answer, load = run(body())

    assert (0, 130, 0) == (
        answer["cached_tokens"],
        answer["effective_prefill_tokens"],
        answer["overlap"]["longest_matched"],
    )
    assert 130 == load.prefill_tokens


def test_its_load_goes_down_at_the_first_token_and_ends_with_its_release() -> None:
    async def body() -> list[Load]:
        async with Api() as api:
            await api.all_live()
            _, answer = await api.post("/select", token_ids=PROMPT, allowed_worker_ids=[2])
            wish = {"selection_id": answer["selection_id"]}
            loads = [api.book.load(B)]
            for path in ("/prefill_complete", "/prefill_complete", "/release"):
                status, told = await api.post(path, **wish)
                assert (status, told) == (200, {**wish, "predicted_tokens": 0})
                loads.append(api.book.load(B))
            assert (await api.post("/release", **wish))[0] == 404
            assert (await api.post("/prefill_complete", **wish))[0] == 404
            return loads

    assert run(body()) == [Load(8, 130, 1), Load(8, 0, 1), Load(8, 0, 1), Load()]


def test_a_reservation_that_nobody_releases_ends_by_its_time() -> None:
    async def body() -> int:
        async with Api() as api:
            await api.all_live()
            _, short = await api.post("/select", token_ids=PROMPT, ttl_s=0.05)
            _, long = await api.post("/select", token_ids=PROMPT, ttl_s=30)
            await eventually(lambda: len(api.book) == 1, "it has ended")
            assert (await api.post("/release", selection_id=short["selection_id"]))[0] == 404
            assert (await api.post("/release", selection_id=long["selection_id"]))[0] == 200
            assert len(api.book) == 0
            return api.choices.reservations.ended["m", "ttl"]

    assert run(body()) == 1


def test_a_burst_is_spread_by_what_the_gateway_has_been_told_already() -> None:
    async def body() -> list[tuple[int, int]]:
        async with Api() as api:
            await api.all_live()
            prompts = [[start + n for n in range(130)] for start in (0, 1_000, 2_000)]
            found = [(await api.post("/select", token_ids=prompt))[1] for prompt in prompts]
            return sorted((int(each["worker_id"]), each["dp_rank"]) for each in found)

    assert run(body()) == [(1, 0), (1, 1), (2, 0)]


def test_choosing_without_a_reservation_leaves_no_load() -> None:
    async def body() -> tuple[Any, int]:
        async with Api() as api:
            await api.all_live()
            _, answer = await api.post("/select", token_ids=PROMPT, reserve=False)
            return answer, len(api.book) + len(api.choices.reservations)

    answer, left = run(body())

    assert (answer["reserved"], answer["expires_at"], left) == (False, None, 0)


def test_reservations_made_are_those_that_ended_and_those_that_are_active() -> None:
    async def body() -> list[tuple[int, int]]:
        async with Api() as api:
            await api.all_live()
            kept, sums = api.choices.reservations, []
            ids = []
            for _ in range(4):
                _, answer = await api.post("/select", token_ids=PROMPT)
                ids.append(answer["selection_id"])
            await api.post("/select", token_ids=PROMPT, ttl_s=0.05)
            await api.post("/select", token_ids=PROMPT, reserve=False)
            await api.post("/select", token_ids=PROMPT, dp_rank=9)
            await eventually(lambda: kept.ended["m", "ttl"], "one has ended by its time")
            for selection_id in (ids[0], ids[0], ids[1], "none"):
                await api.post("/release", selection_id=selection_id)
                sums.append((kept.made.total(), kept.ended.total() + len(kept)))
                assert kept.active.total() == len(kept)
            kept.close()
            assert kept.ended == {("m", "ttl"): 1, ("m", "release"): 2, ("m", "shutdown"): 2}
            return [*sums, (kept.made.total(), kept.ended.total())]

    assert [(5, 5)] * 5 == run(body())


def test_an_id_of_the_callers_own_is_taken_once_at_a_time() -> None:
    async def body() -> list[int]:
        async with Api() as api:
            await api.all_live()
            statuses = []
            for path in ("/select", "/select", "/release", "/select"):
                wish: dict[str, Any] = {"selection_id": "mine"}
                if path == "/select":
                    wish["token_ids"] = PROMPT
                statuses.append((await api.post(path, **wish))[0])
            assert len(api.book) == 1
            return statuses

    assert run(body()) == [200, 409, 200, 200]


def test_the_time_of_a_released_reservation_does_not_end_the_next_of_its_name() -> None:
    async def body() -> int:
        async with Api() as api:
            await api.all_live()
            await api.post("/select", token_ids=PROMPT, selection_id="mine", ttl_s=0.05)
            await api.post("/release", selection_id="mine")
            await api.post("/select", token_ids=PROMPT, selection_id="mine", ttl_s=30)
            await api.post("/select", token_ids=PROMPT, selection_id="later", ttl_s=0.1)
            await eventually(lambda: api.choices.reservations.ended["m", "ttl"], "the later one has ended")
            return (await api.post("/release", selection_id="mine"))[0]

    assert run(body()) == 200


def test_what_the_engine_reports_at_release_is_compared_with_what_was_promised() -> None:
    async def body() -> Any:
        async with Api() as api:
            await api.holds(A, stored(sliding=range(8), whole=range(8)))
            await api.holds(A1)
            await api.holds(B)
            for cached in (128, 130, 96, None):
                _, answer = await api.post("/select", token_ids=PROMPT)
                wish = {} if cached is None else {"cached_tokens": cached}
                await api.post("/release", selection_id=answer["selection_id"], **wish)
            return api.promises.ranks[A]

    found = run(body())

    assert (found.exact, found.over, found.under, found.unreported) == (2, 1, 0, 1)
    assert (found.predicted_tokens, found.actual_tokens) == (3 * 128, 128 + 130 + 96)


def test_a_worker_that_comes_is_chosen_and_one_that_goes_is_not() -> None:
    async def body() -> tuple[int, int, Load, int]:
        async with Api() as api:
            await api.all_live()
            only_b = {"token_ids": PROMPT, "allowed_worker_ids": [2]}
            _, first = await api.post("/select", **only_b)
            api.enter(entry_of(9))
            _, nine = await api.post("/select", token_ids=PROMPT, allowed_worker_ids=[9])
            del api.fleet.entries[entry_of(2).key]
            status, _ = await api.post("/select", **only_b)
            gone = api.book.load(B)
            released, _ = await api.post("/release", selection_id=first["selection_id"])
            assert released == 200
            return int(nine["worker_id"]), status, gone, len(api.book)

    assert run(body()) == (9, 503, Load(), 1)


def test_a_worker_of_another_block_size_is_no_candidate() -> None:
    async def body() -> int:
        async with Api() as api:
            api.enter(entry_of(8, block_size=32))
            await api.all_live()
            return (await api.post("/select", token_ids=PROMPT, allowed_worker_ids=[8]))[0]

    assert run(body()) == 503


def test_taints_are_those_of_the_registry() -> None:
    async def body() -> list[Any]:
        async with Api() as api:
            api.enter(entry_of(2, taints=("new",)))
            await api.all_live()
            found = []
            for taints in (["new"], ["none"]):
                wish = {"routing_constraints": {"required_taints": taints}}
                found.append(await api.post("/select", token_ids=PROMPT, **wish))
            return found

    (status, answer), (none, refused) = run(body())

    assert (status, answer["worker_id"], none) == (200, "2", 503)
    assert "required_taints" in refused["error"]


def test_too_many_reservations_are_refused_until_some_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "MAX_RESERVATIONS", 1)

    async def body() -> list[int]:
        async with Api() as api:
            await api.all_live()
            _, first = await api.post("/select", token_ids=PROMPT)
            refused = await api.post("/select", token_ids=PROMPT)
            assert len(api.book) == 1
            await api.post("/release", selection_id=first["selection_id"])
            return [refused[0], (await api.post("/select", token_ids=PROMPT))[0]]

    assert run(body()) == [503, 200]


def test_a_router_that_forwards_itself_refuses_to_select() -> None:
    async def body() -> list[Any]:
        async with Api(selector=False) as api:
            await api.all_live()
            found = [await api.post("/select", token_ids=PROMPT)]
            found.append(await api.post("/release", selection_id="x"))
            assert (await api.post("/query", token_ids=PROMPT))[0] == 200
            return found

    for status, answer in run(body()):
        assert status == 404
        assert "--selector-only" in answer["error"]


def test_a_server_that_stops_leaves_no_load_to_other_routers() -> None:
    async def body() -> int:
        async with Api() as api:
            await api.all_live()
            await api.post("/select", token_ids=PROMPT)
            book = api.book
        return len(book)

    assert run(body()) == 0


def test_reservations_are_load_for_other_routers_too() -> None:
    async def body() -> list[Load]:
        other = SharedLoad(2)
        async with Api() as api:
            mine = SharedLoad(1)
            api.choices._new_book = mine.book
            await api.all_live()
            theirs = other.book("m", 16)
            mine.others.clear()
            other.tick(0.0, True)
            for payload in other.take():
                mine.receive(payload, 0.0)
            found = []
            _, answer = await api.post("/select", token_ids=PROMPT, allowed_worker_ids=[2])
            for path in ("/prefill_complete", "/release"):
                for payload in mine.take():
                    other.receive(payload, 0.0)
                found.append(theirs.load(B))
                await api.post(path, selection_id=answer["selection_id"])
            for payload in mine.take():
                other.receive(payload, 0.0)
            return [*found, theirs.load(B)]

    assert run(body()) == [Load(8, 130, 1), Load(8, 0, 1), Load()]


def test_selections_at_once_get_different_ids() -> None:
    async def body() -> set[str]:
        async with Api() as api:
            await api.all_live()
            found = await asyncio.gather(*(api.post("/select", token_ids=PROMPT) for _ in range(8)))
            assert len(HASHES) == 8
            return {answer["selection_id"] for _, answer in found}

    assert len(run(body())) == 8


@pytest.mark.parametrize(("changes", "reason"), ODD, ids=[next(iter(changes)) for changes, _ in ODD])
def test_an_odd_entry_costs_itself_alone_and_is_named_once(
    caplog: pytest.LogCaptureFixture, changes: dict[str, Any], reason: str
) -> None:
    odd = entry_of(**{"worker_id": 15, "epochs": {0: 1}, **changes})
    elsewhere = {"namespace": "n2", "component": "o"}
    alone = entry_of(**{"worker_id": 15, "epochs": {0: 1}, "model": "other", **elsewhere, **changes})

    async def body() -> None:
        async with Api() as api:
            api.enter(odd, alone)
            await api.all_live()
            status, answer = await api.post("/select", token_ids=PROMPT)
            assert (status, answer["worker_id"] in ("1", "2")) == (200, True)
            assert (await api.post("/select", token_ids=PROMPT, model_name="other"))[0] == 404
            api.enter(entry_of(3))
            assert (await api.post("/select", token_ids=PROMPT, allowed_worker_ids=[3]))[0] == 200

    run(body())
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert f"worker {odd.worker_id} is not used: {reason}" in error


class Counting:
    """Stands for Dynamo's preprocessor; keeps what it was given."""

    def __init__(self, tokens: Sequence[int] = PROMPT) -> None:
        self.tokens = tokens
        self.given: list[tuple[str, dict[str, Any]]] = []

    async def token_ids(self, path: str, body: Mapping[str, msgspec.Raw]) -> Sequence[int]:
        self.given.append((path, {name: msgspec.json.decode(value) for name, value in body.items()}))
        if not self.tokens:
            raise NotRead(422, "this cannot be read")
        return self.tokens


MESSAGES = [{"role": "user", "content": "Hi"}]


def test_text_and_messages_are_chosen_for_by_the_tokens_that_dynamos_frontend_makes_of_them() -> None:
    tokens = Counting()

    async def body() -> list[Any]:
        async with Api(tokens=tokens) as api:
            await api.all_live()
            await api.holds(B, stored(sliding=[3, 4], whole=range(5)))
            wishes: list[dict[str, Any]] = [
                {"prompt": "Hi"},
                {"messages": MESSAGES, "tools": [{"type": "function"}], "chat_template_args": {"a": 1}},
                {"token_ids": PROMPT},
            ]
            return [await api.post("/select", **wish) for wish in wishes]

    answers = run(body())

    assert [200] * 3 == [status for status, _ in answers]
    assert [80] * 3 == [answer["cached_tokens"] for _, answer in answers]
    assert tokens.given == [
        ("/v1/completions", {"model": "m", "prompt": "Hi"}),
        (
            "/v1/chat/completions",
            {
                "model": "m",
                "messages": MESSAGES,
                "tools": [{"type": "function"}],
                "chat_template_args": {"a": 1},
            },
        ),
    ]


@pytest.mark.parametrize(
    ("tokens", "wish", "reason"),
    [
        (None, {"prompt": "Hi"}, "`vswa picker` does"),
        (None, {}, "token_ids: expected the prompt, got none"),
        (
            Counting(),
            {"prompt": "Hi", "messages": MESSAGES},
            "expected one of token_ids, prompt and messages",
        ),
        (Counting(), {"prompt": "Hi", "token_ids": PROMPT}, "expected one of token_ids, prompt and messages"),
        (Counting(()), {"messages": MESSAGES}, "this cannot be read"),
        (Counting(), {"prompt": "Hi", "model": "x"}, "unknown model 'x'"),
    ],
)
def test_text_that_cannot_be_read_is_refused_with_the_reason(
    tokens: Counting | None, wish: dict[str, Any], reason: str
) -> None:
    async def body() -> tuple[int, Any]:
        async with Api(tokens=tokens) as api:
            await api.all_live()
            found: tuple[int, Any] = await api.post("/select", **wish)
            return found

    status, answer = run(body())

    assert status == (404 if "model" in wish else 400)
    assert reason in answer["error"]
