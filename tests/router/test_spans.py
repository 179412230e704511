"""What is traced of a request that a router forwards."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.router.test_forward import LAST, PROMPT, FakeCall, Served, run
from tests.tracing_helpers import recorded
from vswa_plugin.errors import InvalidRequest


def spans_of(body: Any) -> dict[str, Any]:
    with recorded() as exporter:
        run(body())
        found = exporter.get_finished_spans()
    assert len(found) == len({span.name for span in found})
    return {span.name: span for span in found}


def test_a_request_has_a_choice_with_its_scores_and_a_worker() -> None:
    async def body() -> None:
        await Served({"token_ids": [5]}, LAST).all()

    spans = spans_of(body)
    route, choose, score, worker = (spans[f"vswa.{name}"] for name in ("route", "choose", "score", "worker"))

    assert [route.context, choose.context, route.context] == [choose.parent, score.parent, worker.parent]
    assert {
        "vswa.phase": "agg",
        "vswa.ranks": 1,
        "vswa.prompt_tokens": len(PROMPT),
        "vswa.promised_tokens": 0,
    }.items() <= choose.attributes.items()
    assert "completed" == route.attributes["vswa.outcome"]
    assert ["first token"] == [event.name for event in worker.events]
    assert choose.start_time == score.start_time <= score.end_time <= choose.end_time
    assert choose.end_time <= worker.end_time <= route.end_time


def test_a_refused_request_says_why() -> None:
    async def body() -> None:
        with pytest.raises(InvalidRequest):
            await Served(InvalidRequest("n: expected 1")).all()

    route = spans_of(body)["vswa.route"]

    assert ("ERROR", "n: expected 1") == (route.status.status_code.name, route.status.description)
    assert "refused" == route.attributes["vswa.outcome"]


def test_a_request_whose_client_goes_ends() -> None:
    async def body() -> None:
        call = FakeCall()
        chunks = Served({"token_ids": [5]}, None).chunks(call)
        await anext(chunks)
        call.leave()
        await asyncio.sleep(0)  # the callbacks of the departure

    spans = spans_of(body)

    assert "cancelled" == spans["vswa.route"].attributes["vswa.outcome"]
    assert spans["vswa.worker"].end_time is not None
