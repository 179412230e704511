"""Counts of KV events and requests as Prometheus metrics; see README.md for the list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

from .collector import Collector

if TYPE_CHECKING:
    from vswa_plugin.engine.records import RequestRecord
    from vswa_plugin.wire.events import Batch, Source

# One per process: a worker has one page of metrics, whatever number of hosts it makes.
_collector = Collector()


@hookimpl
def vswa_kv_batch(source: Source, batch: Batch) -> None:
    _collector.count_batch(source, batch)


@hookimpl
def vswa_request_finished(record: RequestRecord) -> None:
    _collector.count_request(record)


@hookimpl
def vswa_metrics() -> str:
    return _collector.text()
