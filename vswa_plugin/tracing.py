"""Which request is served here and now, and spans of OpenTelemetry about it.

The ids are those of Dynamo, which has those of a trace where DYN_LOGGING_JSONL is set. Spans join Dynamo's
trace; they are exported where OTEL_EXPORT_ENABLED is set, as Dynamo's are, and the extra ``otel`` is
installed: :func:`export_spans`. OpenTelemetry is imported there and nowhere else. It reads its own variables:
OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES and so on.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

EXPORT_ENV, SERVICE_ENV = "OTEL_EXPORT_ENABLED", "OTEL_SERVICE_NAME"
PROTOCOL_ENVS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TRUE = frozenset(("1", "true", "yes", "on"))
#: How long the end of a process waits until its last spans are written.
FLUSH_MS = 2_000


class RequestIds(NamedTuple):
    """:param traceparent: of W3C's trace context, where the request belongs to a trace.
    :param span_id: of Dynamo's span around us.
    """

    request_id: str
    trace_id: str | None = None
    span_id: str | None = None
    traceparent: str | None = None


#: The request that is served here, for whoever writes a line about it.
REQUEST: ContextVar[RequestIds | None] = ContextVar("vswa_request", default=None)


def is_on(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable of Dynamo's switches something on."""
    return environ.get(name, "").strip().lower() in _TRUE


class Span:
    """Something that happens to a request, from now until :meth:`end`. This one is not recorded."""

    def child(self, name: str, start_ns: int | None = None, **attributes: object) -> Span:
        """A part of it; ``start_ns``: since 1970, where it has begun before."""
        return self

    def set(self, **attributes: object) -> None:
        """Add attributes; None adds nothing."""

    def event(self, name: str) -> None:
        """Note that something has happened just now."""

    def end(self, error: str | None = None, at_ns: int | None = None) -> None:
        """It is over; ``error``: it failed. A second call does nothing."""


#: What is not recorded.
NO_SPAN = Span()


class _Recorded(Span):
    def __init__(
        self, name: str, parent: Any, start_ns: int | None, attributes: Mapping[str, object]
    ) -> None:
        self._span = _tracer.start_span(name, context=parent, start_time=start_ns)
        self.set(**attributes)

    def child(self, name: str, start_ns: int | None = None, **attributes: object) -> Span:
        from opentelemetry.trace import set_span_in_context

        return _Recorded(name, set_span_in_context(self._span), start_ns, attributes)

    def set(self, **attributes: object) -> None:
        for name, value in attributes.items():
            if value is not None:
                # Ids of workers are beyond the 64 bits with sign of an attribute.
                fits = not isinstance(value, int) or -(1 << 63) <= value < 1 << 63
                self._span.set_attribute(f"vswa.{name}", value if fits else str(value))

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def end(self, error: str | None = None, at_ns: int | None = None) -> None:
        if error is not None and self._span.is_recording():
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, error))
        if self._span.is_recording():
            self._span.end(end_time=at_ns)


_tracer: Any = None


def request_span(name: str, **attributes: object) -> Span:
    """A span of the request that is served here, below Dynamo's own."""
    if _tracer is None:
        return NO_SPAN
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    ids = REQUEST.get()
    carrier = {"traceparent": ids.traceparent} if ids is not None and ids.traceparent else {}
    parent = TraceContextTextMapPropagator().extract(carrier)
    return _Recorded(name, parent, None, {"request_id": ids and ids.request_id, **attributes})


def export_spans(program: str, environ: Mapping[str, str]) -> None:
    """Export spans from now on, where ``environ`` asks for it, as those of the service ``program``."""
    if not is_on(environ, EXPORT_ENV):
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        protocol = next((environ[name] for name in PROTOCOL_ENVS if environ.get(name)), "grpc")
        exporter = _exporter(protocol)
    except ImportError as error:
        logger.warning(
            "%s: expected OpenTelemetry, got %s: no spans of ours are exported; "
            "pip install 'vswa-plugin[otel]'",
            EXPORT_ENV,
            error,
        )
        return
    service = environ.get(SERVICE_ENV) or program
    provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    atexit.register(provider.force_flush, FLUSH_MS)
    use_provider(provider)


def use_provider(provider: Any) -> None:
    """Record spans with a tracer of ``provider``, an ``opentelemetry.trace.TracerProvider``; None: none."""
    global _tracer
    _tracer = None if provider is None else provider.get_tracer("vswa_plugin")


def _exporter(protocol: str) -> Any:
    if protocol.startswith("http/"):
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

        return over_http.OTLPSpanExporter()
    from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as over_grpc

    return over_grpc.OTLPSpanExporter()
