"""A collector of OpenTelemetry: a gRPC server to which programs export their spans."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vswa_plugin.tracing import use_provider


class Seen(NamedTuple):
    """One span; ids in hexadecimal, ``failed``: it has the status of an error."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    seconds: float
    failed: bool


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.spans: list[Seen] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, _: Any) -> Any:
        with self._lock:
            for group in request.resource_spans:
                resource = {each.key: each.value.string_value for each in group.resource.attributes}
                for scope in group.scope_spans:
                    self.spans += [_seen(resource.get("service.name", ""), span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Seen]:
        with self._lock:
            return [span for span in self.spans if span.name == name]


def _seen(service: str, span: Any) -> Seen:
    attributes = {}
    for each in span.attributes:
        attributes[each.key] = getattr(each.value, each.value.WhichOneof("value"))
    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    return Seen(service, span.name, *ids, attributes, seconds, span.status.code == 2)


@contextmanager
def collector() -> Iterator[tuple[Collector, str]]:
    """A running collector and its endpoint."""
    made = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield made, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def recorded() -> Iterator[InMemorySpanExporter]:
    """The spans of this process, as they end."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    use_provider(provider)
    try:
        yield exporter
    finally:
        use_provider(None)
