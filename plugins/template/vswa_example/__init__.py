"""Counts the requests that reused no KV at all."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, generate_latest

from vswa_plugin.engine import RequestRecord
from vswa_plugin.hookspecs import hookimpl

_registry = CollectorRegistry()
_cold = Counter("example_cold_requests", "Finished requests that reused no KV.", registry=_registry)


@hookimpl
def vswa_request_finished(record: RequestRecord) -> None:
    finished = record.finish_reason not in ("cancelled", "error")
    if finished and record.cached_tokens == 0:
        _cold.inc()


@hookimpl
def vswa_metrics() -> str:
    return generate_latest(_registry).decode()
