"""Questions over HTTP: what every worker would reuse, who they are, all that the index holds."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.router_http_helpers import A1, HASHES, PROMPT, A, Api, B, entry_of, run, stored
from vswa_plugin.blocks.hashing import block_hashes
from vswa_plugin.index import WindowIndex
from vswa_plugin.router.http import answers, messages
from vswa_plugin.router.http.answers import global_only
from vswa_plugin.router.http.messages import ExplanationAnswer


def test_a_query_answers_exact_tokens_per_rank_and_tier_beside_what_global_only_would_promise() -> None:
    async def body() -> Any:
        async with Api() as api:
            await api.holds(A, stored(sliding=[0, 1], whole=range(8)))
            await api.holds(A1, stored(sliding=[3], whole=range(5)) + stored(sliding=[4], tier="host"))
            await api.holds(B)
            return await api.post("/query", token_ids=PROMPT, model_name="m")

    status, answer = run(body())
    first, second = answer["instances"]["1"]["ranks"]["0"], answer["instances"]["1"]["ranks"]["1"]

    assert status == 200
    assert first == {
        "cached_tokens": 32,
        "cached_blocks": 2,
        "tiers": {"device": 2},
        "global_only_tokens": 128,
        "state": "live",
        "scored": True,
    }
    assert second == {**first, "cached_tokens": 80, "cached_blocks": 5, "global_only_tokens": 80} | {
        "tiers": {"device": 4, "host": 1}
    }
    assert answer["scores"] == {"1": {"0": 32, "1": 64}, "2": {"0": 0}}
    summary = {
        name: answer["instances"]["1"][name] for name in ("longest_matched", "gpu", "dp", "cpu", "disk")
    }
    assert summary == {"longest_matched": 80, "gpu": 64, "dp": {"0": 32, "1": 64}, "cpu": 80, "disk": 80}
    assert answer["frequencies"] == [2, 2, 1, 1, 1]
    assert (answer["block_size"], answer["prompt_tokens"], answer["assumed"]) == (16, 130, None)


def test_the_same_blocks_asked_for_by_hash_are_taken_as_one_token_longer_and_the_answer_says_so() -> None:
    whole_blocks = PROMPT[:128]

    async def body() -> list[Any]:
        async with Api() as api:
            await api.all_live()
            await api.holds(A, stored(sliding=range(8), whole=range(8)))
            asked: list[dict[str, Any]] = [
                {"sequence_hashes": HASHES},
                {"block_hashes": block_hashes(whole_blocks, 16)},
                {"sequence_hashes": HASHES, "isl_tokens": 128},
                {"sequence_hashes": HASHES, "isl_tokens": 100},
            ]
            found = [(await api.post("/query_by_hash", model="m", **each))[1] for each in asked]
            return [*found, (await api.post("/query", token_ids=whole_blocks))[1]]

    found = run(body())
    cached = [each["instances"]["1"]["longest_matched"] for each in found]

    assert cached == [128, 128, 127, 96, 127], "of 128 tokens the last one is always computed"
    assert [each["prompt_tokens"] for each in found] == [129, 129, 128, 100, 128]
    assert ["one token longer" in (each["assumed"] or "") for each in found] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_salted_prompts_do_not_match_plain_blocks() -> None:
    async def body() -> list[int]:
        async with Api() as api:
            await api.holds(A, stored(sliding=range(8), whole=range(8)))
            asked = [{}, {"cache_salt": "s"}, {"lora_name": "l"}]
            return [
                (await api.post("/query", token_ids=PROMPT, **each))[1]["instances"]["1"]["longest_matched"]
                for each in asked
            ]

    assert run(body()) == [128, 0, 0]


def test_what_global_only_would_promise_is_the_unbroken_start_of_the_widest_group() -> None:
    index = WindowIndex()

    async def body() -> dict[Any, int]:
        async with Api() as api:
            await api.holds(A, stored(whole=[0, 1, 2, 4, 5]))
            await api.holds(A1, stored(whole=[1, 2]))
            await api.holds(B, stored(whole=range(8)))
            explained = api.fleet.index.explain(HASHES, 130)
            by_hand = {each.rank: each.groups[1].held[:1] for each in explained}
            assert by_hand == {A: ((0, 3),), A1: ((1, 3),), B: ((0, 8),)}
            return global_only(api.fleet.index, HASHES, "m")

    assert run(body()) == {A: 48, B: 128}
    assert global_only(index, HASHES, "m") == {}


def test_explain_is_what_the_command_line_says() -> None:
    async def body() -> tuple[Any, bytes]:
        async with Api() as api:
            await api.holds(A, stored(sliding=[0, 1], whole=range(8)))
            _, answer = await api.post("/explain", token_ids=PROMPT)
            return answer, msgspec.json.encode(
                [ExplanationAnswer.of(each) for each in api.fleet.index.explain(HASHES, 130, "m")]
            )

    answer, expected = run(body())

    assert answer == json.loads(expected)
    assert answer[0]["groups"][0]["spoilt"] == 2
    assert answer[0]["rank"] == [str(A.worker_id), A.dp_rank]


def test_an_explanation_that_would_hold_up_routing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_EXPLAINED", 40)

    async def body() -> Any:
        async with Api() as api:
            await api.all_live()
            return await api.post("/explain", token_ids=PROMPT)

    status, answer = run(body())

    assert status == 413
    assert "expected a prompt of at most 6 blocks for 3 ranks with 2 groups, got 8" in answer["error"]


def test_workers_are_listed_with_what_is_heard_of_them() -> None:
    async def body() -> tuple[Any, Any]:
        async with Api() as api:
            api.enter(entry_of(7, model="other"))
            await api.holds(A, stored(sliding=[0], whole=range(3)))
            await api.holds(A1)
            return (await api.get("/workers?model_name=m"))[1], (await api.get("/workers"))[1]

    of_model, everyone = run(body())
    first, second = of_model

    assert [each["instance_id"] for each in everyone] == ["1", "2", "7"]
    assert (first["status"], second["status"]) == ("active", "pending")
    assert first["endpoints"]["1"] == "vswa.v1.ns.backend.1.1.events"
    assert first["listeners"]["0"]["blocks"] == {"32": {"device": 1}, "global": {"device": 3}}
    assert first["endpoint"] == "dyn://ns.backend.generate"
    assert second["listeners"]["0"]["state"] == "waiting"


def test_ready_once_a_worker_is_known_and_not_before_or_while_draining() -> None:
    async def body() -> list[tuple[int, bool]]:
        async with Api() as api:
            found = [await api.get("/ready")]
            await api.all_live()
            found.append(await api.get("/ready"))
            api.status.ready = False
            found.append(await api.get("/ready"))
            assert found[1][1]["models"] == {"m": 3}
            return [(status, answer["ready"]) for status, answer in found]

    assert run(body()) == [(503, False), (200, True), (503, False)]


def test_health_fails_with_the_reason() -> None:
    async def body() -> list[Any]:
        async with Api() as api:
            fine = await api.get("/health")
            api.status.failure = "Dynamo's runtime ended"
            return [fine, await api.get("/health")]

    fine, failed = run(body())

    assert fine == (200, {"status": "healthy", "reason": None})
    assert failed == (503, {"status": "failed", "reason": "Dynamo's runtime ended"})


@pytest.mark.parametrize(
    ("path", "data", "status", "message"),
    [
        ("/query", b"", 400, "expected Query as in /openapi.json, got 0 bytes"),
        ("/query", b"[1]", 400, "Expected `object`, got `array`"),
        ("/query", b'{"token_ids": []}', 400, "length >= 1 - at `$.token_ids`"),
        ("/query", b'{"token_ids": [-1]}', 400, "at `$.token_ids[0]`"),
        ("/query", b'{"token_ids": [4294967296]}', 400, "at `$.token_ids[0]`"),
        ("/query", b'{"token_ids": ["1"]}', 400, "Expected `int`, got `str`"),
        ("/query", b'{"token_ids": ' + b"[" * 50_000, 400, "expected Query"),
        ("/query", b'{"token_ids": [1], "model_name": "mm"}', 404, "unknown model 'mm': did you mean 'm'?"),
        ("/query", b'{"token_ids": [1], "routing_group": "default", "tenant_id": "x"}', 200, ""),
        ("/query_by_hash", b'{"model": "m"}', 400, "expected block_hashes or sequence_hashes, got neither"),
        ("/query_by_hash", b'{"block_hashes": [18446744073709551616]}', 400, "hashes below 2**64"),
        ("/query_by_hash", b'{"block_hashes": [1], "cache_salt": ""}', 400, "$.cache_salt"),
        ("/query_by_hash", b'{"block_hashes": [1], "isl_tokens": 0}', 400, "$.isl_tokens"),
        ("/select", b'{"token_ids": [1], "ttl_s": 0}', 400, "$.ttl_s"),
        ("/select", b'{"token_ids": [1], "dp_rank": 9}', 400, "dp_rank: expected a rank of this model"),
        ("/select", b'{"token_ids": [1], "allowed_worker_ids": [9]}', 503, "allowed_worker_ids"),
        ("/select", b'{"token_ids": [1], "router_config_override": {"assume_kv_reuse": 3}}', 400, "bool"),
        ("/release", b'{"selection_id": "none"}', 404, "expected an active reservation of this router"),
        ("/nothing", b"{}", 404, "expected one of /query, /query_by_hash"),
        ("/workers", b"{}", 405, "/workers: expected GET, got POST"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_says_what_was_expected_and_what_came(
    path: str, data: bytes, status: int, message: str
) -> None:
    async def body() -> tuple[int, Any]:
        async with Api() as api:
            await api.all_live()
            return await api.send("POST", path, data)

    got, answer = run(body())

    assert got == status, answer
    if status != 200:
        assert message in answer["error"]
        assert answer["code"] == status


def test_a_wrong_method_is_told_the_right_one() -> None:
    async def body() -> str:
        async with (
            Api() as api,
            aiohttp.ClientSession() as session,
            session.get(f"{api.url}/query") as answer,
        ):
            return answer.headers["Allow"]

    assert run(body()) == "POST"


def test_several_models_need_a_name_and_none_is_not_found() -> None:
    async def body() -> list[Any]:
        async with Api() as api:
            api.enter(entry_of(7, model="other"))
            several = await api.post("/query", token_ids=[1])
            api.fleet.entries.clear()
            return [several, await api.post("/query", token_ids=[1])]

    (several, said), (none, _) = run(body())

    assert (several, none) == (400, 404)
    assert "Known: m, other" in said["error"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_refused_and_the_server_lives(chunked: bool) -> None:
    async def large() -> Any:
        for _ in range(messages.MAX_BODY_BYTES // 65_536 + 2):
            yield b" " * 65_536

    async def body() -> tuple[int, Any]:
        async with Api() as api:
            data: Any = large() if chunked else b" " * (messages.MAX_BODY_BYTES + 1)
            status, answer = await api.send("POST", "/query", data)
            assert (await api.get("/health"))[0] == 200
            return status, answer

    status, answer = run(body())

    assert status == 413
    assert "expected a body of at most 4194304 bytes" in answer["error"]


def test_the_longest_lists_fit_into_the_body_and_one_more_is_refused() -> None:
    async def body() -> list[int]:
        async with Api() as api:
            await api.all_live()
            tokens = [4_294_967_295] * messages.MAX_TOKENS
            hashes = [2**64 - 1] * messages.MAX_HASHES
            return [
                (await api.post("/query", token_ids=tokens))[0],
                (await api.post("/query", token_ids=[*tokens, 1]))[0],
                (await api.post("/query_by_hash", block_hashes=hashes, sequence_hashes=hashes))[0],
                (await api.post("/query_by_hash", block_hashes=[*hashes, 1]))[0],
            ]

    assert run(body()) == [200, 400, 200, 400]


def test_a_failure_of_ours_is_no_hang_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> Any:
        async with Api() as api:
            monkeypatch.setattr(api.fleet.index, "score", lambda *_: 1 / 0)
            await api.all_live()
            return await api.post("/query", token_ids=PROMPT)

    status, answer = run(body())

    assert status == 500
    assert "its log" in answer["error"]


def test_metrics_tell_of_fleet_choices_load_accuracy_and_requests() -> None:
    async def body() -> str:
        async with Api() as api:
            await api.all_live()
            await api.holds(A, stored(sliding=range(8), whole=range(8)))
            for cached in (128, 96, 128):
                _, answer = await api.post("/select", token_ids=PROMPT)
                await api.post("/release", selection_id=answer["selection_id"], cached_tokens=cached)
            await api.post("/select", token_ids=PROMPT)
            await api.get("/nothing")
            status, text = await api.get("/metrics")
            assert status == 200
            return str(text)

    lines = set(run(body()).splitlines())

    assert {
        'vswa_router_decision_seconds_count{model="m",phase="agg"} 4.0',
        'vswa_router_load_requests{dp_rank="0",model="m",worker="1"} 1.0',
        'vswa_router_predictions_total{dp_rank="0",model="m",result="exact",worker="1"} 2.0',
        'vswa_router_predictions_total{dp_rank="0",model="m",result="over",worker="1"} 1.0',
        'vswa_router_prediction_error_blocks_bucket{direction="over",le="1",model="m"} 0.0',
        'vswa_router_prediction_error_blocks_bucket{direction="over",le="2",model="m"} 1.0',
        'vswa_router_prediction_error_blocks_sum{direction="over",model="m"} 2.0',
        'vswa_router_reported_cached_tokens_total{dp_rank="0",model="m",worker="1"} 352.0',
        'vswa_router_predicted_cached_tokens_total{dp_rank="0",model="m",worker="1"} 384.0',
        'vswa_router_reservations_made_total{model="m"} 4.0',
        'vswa_router_reservations{model="m"} 1.0',
        'vswa_router_reservations_ended_total{by="release",model="m"} 3.0',
        'vswa_router_reservations_ended_total{by="ttl",model="m"} 0.0',
        'vswa_router_http_request_seconds_count{endpoint="/select",status="200"} 4.0',
        'vswa_router_http_request_seconds_count{endpoint="other",status="404"} 1.0',
        'vswa_rank_state{dp_rank="0",model="m",state="live",worker="2"} 1.0',
    } <= lines


def test_questions_do_not_change_the_load_or_the_index() -> None:
    async def body() -> None:
        async with Api() as api:
            await api.holds(A, stored(sliding=range(8), whole=range(8)))
            before = api.fleet.index.dump()
            await asyncio.gather(
                api.post("/query", token_ids=PROMPT),
                api.post("/explain", token_ids=PROMPT),
                api.get("/dump"),
                api.get("/workers"),
            )
            api.fleet.index.check()
            assert api.fleet.index.dump() == before
            assert len(api.book) == 0

    run(body())
