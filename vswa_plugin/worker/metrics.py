"""The worker's own metrics: its publishers and its engine, as Prometheus text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vswa_plugin.engine.contract import Engine
from vswa_plugin.publishing.publisher import Publisher

#: Name, help, and where the number is.
_COUNTERS: tuple[tuple[str, str, Callable[[Publisher], int]], ...] = (
    ("batches", "batches with events that were numbered", lambda each: each.ledger.stats.batches),
    ("events", "events in those batches", lambda each: each.ledger.stats.events),
    ("heartbeats", "heartbeats sent", lambda each: each.stats.heartbeats),
    ("bytes", "bytes handed to the broker", lambda each: each.stats.bytes),
    (
        "dropped_batches",
        "batches dropped because the queue towards the broker was full",
        lambda each: each.stats.dropped_batches,
    ),
    (
        "rejected_events",
        "engine events that could not be used",
        lambda each: each.ledger.stats.rejected_events,
    ),
    (
        "restarts",
        "epochs begun anew because the engine's events were lost or contradicted",
        lambda each: each.ledger.stats.restarts,
    ),
    ("send_errors", "messages the broker did not take", lambda each: each.stats.send_errors),
    ("replays", "replays that readers asked for", lambda each: each.ledger.history.replays),
    (
        "snapshots",
        "snapshots that were frozen for readers",
        lambda each: each.ledger.history.snapshots_made,
    ),
    (
        "healed_blocks",
        "blocks that finished requests proved resident",
        lambda each: each.ledger.healing.blocks_healed,
    ),
    (
        "unattributed_blocks",
        "blocks that could not be named",
        lambda each: each.ledger.residency.unattributed,
    ),
)


class WorkerCollector(Collector):
    """Reads the counters when asked; nothing is counted twice."""

    def __init__(self, publishers: Mapping[int, Publisher], engine: Engine) -> None:
        self._publishers = publishers
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        for name, text, read in _COUNTERS:
            family = CounterMetricFamily(f"vswa_publisher_{name}", text, labels=["dp_rank"])
            for rank, publisher in self._publishers.items():
                family.add_metric([str(rank)], read(publisher))
            yield family
        resident = GaugeMetricFamily(
            "vswa_resident_blocks", "blocks announced and not removed", labels=["dp_rank", "window"]
        )
        for rank, publisher in self._publishers.items():
            layout = publisher.ledger.layout
            for group_id, count in publisher.ledger.residency.counts().items():
                resident.add_metric([str(rank), layout.group(group_id).label], count)
        yield resident
        engine = GaugeMetricFamily("vswa_engine", "gauges that the engine states", labels=["name"])
        for name, value in self._engine.stats().items():
            engine.add_metric([name], value)
        yield engine


def render(publishers: Mapping[int, Publisher], engine: Engine) -> str:
    """Prometheus text of the worker's own metrics."""
    registry = CollectorRegistry()
    registry.register(WorkerCollector(publishers, engine))
    return generate_latest(registry).decode()
