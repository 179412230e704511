"""What is traced of a request on its worker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.tracing_helpers import recorded
from tests.worker.test_handler import USAGE, Scripted, Served
from vswa_plugin.engine import WORKER_ONLY
from vswa_plugin.errors import Overloaded


def spans_of(*steps: Any) -> dict[str, Any]:
    with recorded() as exporter:
        try:
            asyncio.run(Served(Scripted(*steps)).request())
        finally:
            found = {span.name: span for span in exporter.get_finished_spans()}
    return found


def test_the_span_of_a_request_says_what_came_of_it() -> None:
    spans = spans_of(
        {"token_ids": [5]}, {"token_ids": [6], "finish_reason": "stop", "completion_usage": USAGE}
    )
    serve = spans.pop("vswa.serve")

    assert {} == spans, "this engine says nothing of its phases"
    assert {
        "vswa.model": "m",
        "vswa.worker_id": 7,
        "vswa.dp_rank": 3,
        "vswa.prompt_tokens": 4,
        "vswa.cached_tokens": 2,
        "vswa.output_tokens": 2,
        "vswa.finish_reason": "stop",
    } == dict(serve.attributes)
    assert ["first token"] == [event.name for event in serve.events]


def test_phases_that_the_engine_states_follow_each_other() -> None:
    first = {"token_ids": [5], WORKER_ONLY: {"queue_s": 0.25, "transfer_s": 0.5, "transferred_tokens": 3}}
    spans = spans_of(first, {"token_ids": [6], "finish_reason": "stop", "completion_usage": USAGE})
    admission, transfer, serve = (spans[f"vswa.{name}"] for name in ("admission", "transfer", "serve"))

    assert serve.context == admission.parent == transfer.parent
    assert (250_000_000, 500_000_000) == tuple(
        span.end_time - span.start_time for span in (admission, transfer)
    )
    assert admission.end_time == transfer.start_time
    assert 3 == transfer.attributes["vswa.tokens"]


def test_a_request_that_fails_says_why() -> None:
    with recorded() as exporter:
        with pytest.raises(Overloaded):
            asyncio.run(Served(Scripted(Overloaded("the queue is full"))).request())
        (serve,) = exporter.get_finished_spans()

    assert ("ERROR", "the queue is full") == (serve.status.status_code.name, serve.status.description)


def test_a_request_that_is_not_begun_says_why() -> None:
    engine = Scripted()
    engine.failed = "out of memory"
    with recorded() as exporter:
        with pytest.raises(Exception, match="out of memory"):
            asyncio.run(Served(engine).request())
        (serve,) = exporter.get_finished_spans()

    assert "out of memory" == serve.status.description
