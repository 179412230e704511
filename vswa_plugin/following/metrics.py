"""Metrics of a fleet: its readers and its window index, as Prometheus text."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vswa_plugin.following.fleet import Fleet

_READER = {
    "batches": "batches with events that arrived",
    "events": "events applied",
    "heartbeats": "heartbeats that arrived",
    "duplicates": "batches that had been applied already",
    "foreign_epochs": "batches of an epoch that is over",
    "malformed": "messages that could not be read",
    "gaps": "times that events were missing",
    "replays": "replays received",
    "snapshots": "snapshots received",
    "failures": "repairs that failed and were tried again",
}


class FleetCollector(Collector):
    """Reads the counters at each scrape."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        yield from self._readers()
        yield from self._ranks()
        stats = self._fleet.index.stats()
        blocks = GaugeMetricFamily("vswa_index_blocks", "distinct blocks in the index", labels=["window"])
        for window, count in stats.blocks.items():
            blocks.add_metric([window], count)
        yield blocks
        yield GaugeMetricFamily("vswa_index_ranks", "ranks in the index", value=stats.ranks)
        yield GaugeMetricFamily("vswa_index_scored_ranks", "ranks that are scored", value=stats.scored)
        yield GaugeMetricFamily("vswa_index_bytes", "memory of the index", value=stats.nbytes)
        yield GaugeMetricFamily("vswa_index_kernel", "1: compiled kernel, 0: pure Python", value=stats.kernel)
        yield CounterMetricFamily(
            "vswa_index_left_out_blocks", "blocks left out for lack of room", value=stats.left_out
        )

    def _readers(self) -> Iterable[Metric]:
        for name, text in _READER.items():
            family = CounterMetricFamily(f"vswa_reader_{name}", text, labels=["worker", "dp_rank"])
            for view in self._fleet.subscriber.views():
                labels = [f"{view.source.worker_id:x}", str(view.source.dp_rank)]
                family.add_metric(labels, getattr(view.reader.stats, name))
            yield family

    def _ranks(self) -> Iterable[Metric]:
        state = GaugeMetricFamily("vswa_rank_state", "1 for the state", labels=["worker", "dp_rank", "state"])
        lag = GaugeMetricFamily(
            "vswa_rank_lag_seconds", "age of the last message of the rank", labels=["worker", "dp_rank"]
        )
        held = GaugeMetricFamily(
            "vswa_rank_blocks", "blocks that a rank holds", labels=["worker", "dp_rank", "window", "tier"]
        )
        for status in self._fleet.statuses(time.time_ns()):
            labels = [f"{status.source.worker_id:x}", str(status.source.dp_rank)]
            state.add_metric([*labels, status.state], 1)
            if status.lag_ms is not None:
                lag.add_metric(labels, status.lag_ms / 1000)
            for window, tiers in status.blocks.items():
                for tier, count in tiers.items():
                    held.add_metric([*labels, window, tier], count)
        yield from (state, lag, held)


def render(fleet: Fleet) -> str:
    """Prometheus text of readers and index."""
    registry = CollectorRegistry()
    registry.register(FleetCollector(fleet))
    return generate_latest(registry).decode()
