"""Counts of KV events and requests as Prometheus metrics; see README.md for the list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

from .collector import Collector

if TYPE_CHECKING:
    from vswa_plugin.engine import RequestRecord
    from vswa_plugin.hookspecs import WorkerContext
    from vswa_plugin.wire import Batch, Source


class Prometheus:
    """The hooks of one host, with counters of its own."""

    def __init__(self) -> None:
        self._collector = Collector()

    @hookimpl
    def vswa_worker_connected(self, worker: WorkerContext) -> None:
        self._collector.mode = worker.settings.mode

    @hookimpl
    def vswa_kv_batch(self, source: Source, batch: Batch) -> None:
        self._collector.count_batch(source, batch)

    @hookimpl
    def vswa_request_finished(self, record: RequestRecord) -> None:
        self._collector.count_request(record)

    @hookimpl
    def vswa_metrics(self) -> str | None:
        return self._collector.text() if self._collector.used else None
