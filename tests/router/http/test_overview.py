"""What the live page is made of: the answer that it shows, and the document itself."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import aiohttp

from tests.router_http_helpers import A1, PROMPT, A, Api, B, entry_of, run, stored
from vswa_plugin.router.http import overview
from vswa_plugin.router.http.page import document


def test_the_answer_has_every_rank_with_its_windows_its_load_and_what_was_promised() -> None:
    async def body() -> Any:
        async with Api() as api:
            await api.holds(A, stored(sliding=[3, 4], whole=range(5)) + stored(sliding=[7], tier="host"))
            await api.holds(A1)
            for reused in (80, 16):
                _, chosen = await api.post("/select", token_ids=PROMPT, session_id="secret")
                await api.post("/release", selection_id=chosen["selection_id"], cached_tokens=reused)
            await api.post("/select", token_ids=PROMPT)
            return await api.get("/overview")

    status, answer = run(body())
    first, _, third = answer["ranks"]

    assert status == 200
    assert (first["worker_id"], first["dp_rank"], first["state"], first["mode"]) == ("1", 0, "live", "agg")
    assert first["windows"] == [
        {"window": "32", "resident": {"device": 2, "host": 1}, "capacity": None},
        {"window": "global", "resident": {"device": 5}, "capacity": 100},
    ]
    assert first["load"] == {"blocks": 8, "prefill_tokens": 50, "requests": 1}
    assert first["promises"] == {
        "exact": 1,
        "over": 1,
        "under": 0,
        "unreported": 0,
        "promised_tokens": 160,
        "reused_tokens": 96,
    }
    assert (third["worker_id"], third["state"], third["windows"][0]["resident"]) == ("2", "waiting", {})
    assert [(each["outcome"], each["error_blocks"]) for each in answer["choices"]] == [
        ("under way", 0),
        ("over", 4),
        ("kept", 0),
    ]
    assert answer["choices"][0]["candidates"][0]["cached_tokens"] == 80
    (model,) = answer["models"]
    assert (model["ranks"], model["live_ranks"], model["promises"]) == (3, 2, first["promises"])
    assert "secret" not in str(answer)


def test_a_window_has_the_capacity_that_its_worker_states() -> None:
    async def body() -> Any:
        async with Api() as api:
            api.enter(entry_of(7, model="v", capacity={"32": 9}))
            return (await api.get("/overview"))[1]["ranks"]

    (windows,) = (rank["windows"] for rank in run(body()) if rank["worker_id"] == "7")

    assert [("32", 9), ("global", 100)] == [(each["window"], each["capacity"]) for each in windows]


def test_windows_of_an_engine_with_one_pool_have_no_capacity_of_their_own() -> None:
    async def body() -> Any:
        async with Api() as api:
            api.enter(entry_of(7, model="v", rule="vllm", total_kv_blocks=77))
            return (await api.get("/overview"))[1]["ranks"]

    pools = {
        rank["worker_id"]: (rank["pool_capacity"], [window["capacity"] for window in rank["windows"]])
        for rank in run(body())
    }

    assert pools == {"1": (None, [None, 100]), "2": (None, [None, 100]), "7": (77, [None, None])}


def test_a_large_fleet_is_cut_and_no_rank_in_trouble_is_left_out_before_a_live_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(overview, "MAX_RANKS", 2)

    async def body() -> Any:
        async with Api() as api:
            await api.holds(A)
            await api.holds(A1)
            return (await api.get("/overview"))[1]

    answer = run(body())

    assert (answer["left_out"], [rank["state"] for rank in answer["ranks"]]) == (1, ["live", "waiting"])
    assert answer["models"][0]["ranks"] == 3


def test_of_many_candidates_the_cheapest_are_shown_and_always_the_chosen_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(overview, "MAX_CANDIDATES", 1)

    class Chooses:
        def score(self, *_: Any) -> dict[Any, float]:
            return {}

        def select_worker(self, *_: Any) -> Any:
            return B

    async def body() -> Any:
        async with Api(hooks=Chooses()) as api:
            await api.all_live()
            await api.holds(A, stored(sliding=range(8), whole=range(8)))
            await api.post("/select", token_ids=PROMPT)
            return (await api.get("/overview"))[1]["choices"][0]

    choice = run(body())

    assert ([each["worker_id"] for each in choice["candidates"]], choice["of"]) == (["2"], 3)


def test_the_page_has_no_outside_parts_and_its_policy_allows_none() -> None:
    async def body() -> Any:
        async with Api() as api, aiohttp.ClientSession() as session, session.get(api.url + "/") as answer:
            return answer.status, answer.content_type, answer.headers, await answer.text()

    status, kind, headers, text = run(body())
    policy = headers["Content-Security-Policy"]

    assert (status, kind) == (200, "text/html")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", text)
    assert "/* page" not in text and len(text.encode()) < 32_000
    assert document() is document()


def test_a_prompt_in_words_without_a_tokenizer_is_refused_with_what_to_do() -> None:
    async def body() -> Any:
        async with Api() as api:
            return await asyncio.gather(
                api.post("/explain", prompt="Once"),
                api.post("/explain"),
                api.post("/explain", prompt="Once", model_name="none"),
            )

    (words, neither, unknown) = run(body())

    assert words[0] == 400
    assert (
        "prompt: expected the model's tokenizer at /models/m/tokenizer.json, got nothing" in words[1]["error"]
    )
    assert words[1]["error"].endswith("give token_ids")
    assert (neither[0], unknown[0]) == (400, 404)
