"""Spans: what is recorded, where it joins, and that nothing happens where nothing is exported."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.tracing_helpers import recorded
from vswa_plugin import tracing
from vswa_plugin.tracing import NO_SPAN, REQUEST, RequestIds, export_spans, is_on, request_span

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    with recorded() as exporter:
        yield exporter


def test_without_an_exporter_nothing_is_recorded() -> None:
    span = request_span("vswa.route", model="m")

    assert NO_SPAN is span
    assert NO_SPAN is span.child("vswa.choose")
    span.end("failed")


def test_a_span_of_a_request_joins_its_trace(spans: InMemorySpanExporter) -> None:
    token = REQUEST.set(RequestIds("r-1", TRACE, PARENT, f"00-{TRACE}-{PARENT}-01"))
    span = request_span("vswa.route", model="m")
    span.child("vswa.choose", 1_000, cost=1.5).end(at_ns=3_000)
    span.end()
    REQUEST.reset(token)
    choose, route = spans.get_finished_spans()

    assert (int(TRACE, 16), int(PARENT, 16)) == (route.context.trace_id, route.parent.span_id)  # type: ignore[union-attr]
    assert {"vswa.model": "m", "vswa.request_id": "r-1"} == dict(route.attributes or {})
    assert route.context == choose.parent
    assert (1_000, 3_000) == (choose.start_time, choose.end_time)


def test_a_request_without_a_trace_gets_one_of_its_own(spans: InMemorySpanExporter) -> None:
    request_span("vswa.route").end()
    (route,) = spans.get_finished_spans()

    assert route.parent is None


def test_a_request_that_was_not_sampled_is_not_recorded(spans: InMemorySpanExporter) -> None:
    token = REQUEST.set(RequestIds("r-1", TRACE, PARENT, f"00-{TRACE}-{PARENT}-00"))
    span = request_span("vswa.route")
    span.child("vswa.choose").end("failed")
    span.end()
    REQUEST.reset(token)

    assert () == spans.get_finished_spans()


def test_an_end_is_final_and_says_why(spans: InMemorySpanExporter) -> None:
    span = request_span("vswa.route")
    span.end("no worker")
    span.end()
    (route,) = spans.get_finished_spans()

    assert ("ERROR", "no worker") == (route.status.status_code.name, route.status.description)


def test_ids_of_workers_that_no_attribute_holds_become_text(spans: InMemorySpanExporter) -> None:
    request_span("vswa.route", worker_id=(1 << 64) - 1, dp_rank=0, nothing=None).end()
    (route,) = spans.get_finished_spans()

    assert {"vswa.worker_id": str((1 << 64) - 1), "vswa.dp_rank": 0} == dict(route.attributes or {})


@pytest.mark.parametrize(
    ("text", "on"), [("1", True), ("TRUE", True), (" on ", True), ("0", False), ("", False)]
)
def test_variables_are_read_as_dynamo_reads_them(text: str, on: bool) -> None:
    assert on == is_on({"X": text}, "X")


def test_without_the_extra_a_worker_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with caplog.at_level(logging.WARNING):
        export_spans("vswa-worker", {"OTEL_EXPORT_ENABLED": "1"})

    assert "pip install 'vswa-plugin[otel]'" in caplog.text
    assert tracing._tracer is None


def test_nothing_is_imported_where_nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *rest: Any) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(tracing, "_exporter", refuse)
    export_spans("vswa-worker", {})
    export_spans("vswa-worker", {"OTEL_EXPORT_ENABLED": "false"})
