"""What the relay counts, by worker."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vswa_plugin.relay.worker import STATES, RelayedWorker

#: Of a source -> name and help.
_COUNTED = {
    "events": ("events", "KV events read from the worker."),
    "batches": ("batches", "Batches of events read from it."),
    "repaired_batches": ("repaired_batches", "Of these, batches that had to be asked for again."),
    "lost_batches": ("lost_batches", "Batches that the worker did not keep any more."),
    "unreadable_messages": ("unreadable_messages", "Messages that are none of the engine's."),
}


def families(workers: Collection[RelayedWorker]) -> Iterator[Metric]:
    """All families, for the workers that are relayed now or are waited for."""
    states = GaugeMetricFamily("vswa_relay_workers", "Workers by state.", labels=["state"])
    for state in STATES:
        states.add_metric([state], sum(each.state == state for each in workers))
    yield states
    by_id = {str(each.worker_id): each for each in workers if each.worker_id is not None}
    connections = CounterMetricFamily(
        "vswa_relay_connections", "Times that the worker was connected and registered.", labels=["worker"]
    )
    for number, each in by_id.items():
        connections.add_metric([number], each.connections)
    yield connections
    totals = {number: each.totals() for number, each in by_id.items()}
    for counted, (name, text) in _COUNTED.items():
        family = CounterMetricFamily(f"vswa_relay_{name}", text, labels=["worker"])
        for number, counts in totals.items():
            family.add_metric([number], counts[counted])
        yield family
    yield from _of_publishers(by_id)


def _of_publishers(by_id: dict[str, RelayedWorker]) -> Iterator[Metric]:
    labels = ["worker", "dp_rank"]
    epoch = GaugeMetricFamily(
        "vswa_relay_epoch_start_timestamp_seconds",
        "When the current epoch began, in seconds since 1970.",
        labels=labels,
    )
    unattributed = GaugeMetricFamily(
        "vswa_relay_unattributed_blocks",
        "Blocks of this connection that are not published because their parent was never announced.",
        labels=labels,
    )
    resident = GaugeMetricFamily(
        "vswa_relay_resident_blocks", "Blocks announced and not removed.", labels=[*labels, "window"]
    )
    for number, each in by_id.items():
        for rank, publisher in (each.ranks.publishers if each.ranks is not None else {}).items():
            ledger, of = publisher.ledger, [number, str(rank)]
            epoch.add_metric(of, ledger.epoch / 1e9)
            unattributed.add_metric(of, ledger.residency.unattributed)
            windows: dict[str, int] = {}
            for group_id, count in ledger.residency.counts().items():
                label = ledger.layout.group(group_id).label
                windows[label] = windows.get(label, 0) + count
            for label, count in windows.items():
                resident.add_metric([*of, label], count)
    yield from (epoch, unattributed, resident)
