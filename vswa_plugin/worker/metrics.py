"""The worker's own metrics: its requests, its publishers and its engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vswa_plugin.engine.contract import Engine
from vswa_plugin.engine.outcomes import COMPLETED, OUTCOMES
from vswa_plugin.publishing.publisher import Publisher
from vswa_plugin.worker.counts import FINISH_REASONS, OTHER, RequestCounts

#: Name, help, and where the number is.
_COUNTERS: tuple[tuple[str, str, Callable[[Publisher], int]], ...] = (
    ("batches", "Batches with events that were numbered.", lambda each: each.ledger.stats.batches),
    ("events", "Events in those batches.", lambda each: each.ledger.stats.events),
    ("heartbeats", "Heartbeats sent.", lambda each: each.stats.heartbeats),
    ("sent_bytes", "Bytes handed to the broker.", lambda each: each.stats.bytes),
    (
        "dropped_batches",
        "Batches dropped because the queue towards the broker was full.",
        lambda each: each.stats.dropped_batches,
    ),
    (
        "rejected_events",
        "Engine events that could not be used.",
        lambda each: each.ledger.stats.rejected_events,
    ),
    (
        "restarts",
        "Epochs begun anew because the engine's events were lost or contradicted.",
        lambda each: each.ledger.stats.restarts,
    ),
    ("send_errors", "Messages that the broker did not take.", lambda each: each.stats.send_errors),
    ("replays", "Replays that readers asked for.", lambda each: each.ledger.history.replays),
    (
        "snapshots",
        "Snapshots that were frozen for readers.",
        lambda each: each.ledger.history.snapshots_made,
    ),
    (
        "healed_blocks",
        "Blocks that finished requests proved resident.",
        lambda each: each.ledger.healing.blocks_healed,
    ),
    (
        "unattributed_blocks",
        "Blocks that are not published because their parent was never announced.",
        lambda each: each.ledger.residency.unattributed,
    ),
)
_OF_RANK = re.compile(r"(.+)_rank_(\d+)")


def request_families(counts: RequestCounts, in_flight: int, model: str, mode: str) -> list[Metric]:
    """Requests of the worker, made at once: those received are those that ended and those in flight."""
    name, labels = "vswa_worker_requests", ["model", "mode"]
    received = CounterMetricFamily(f"{name}_received", "Requests that came.", labels=labels)
    received.add_metric([model, mode], counts.received)
    ended = CounterMetricFamily(
        name, "Requests that ended, each once.", labels=[*labels, "outcome", "finish_reason"]
    )
    usual = [(COMPLETED, reason) for reason in (*FINISH_REASONS, OTHER)]
    usual += [(outcome, "") for outcome in OUTCOMES if outcome != COMPLETED]
    for key in usual:
        ended.add_metric([model, mode, *key], counts.ended[key])
    now = GaugeMetricFamily(f"{name}_in_flight", "Requests under way.", labels=labels)
    now.add_metric([model, mode], in_flight)
    return [received, ended, now]


def publisher_families(publishers: Mapping[int, Publisher]) -> Iterator[Metric]:
    """What the publishers of all ranks have sent, and what is resident."""
    for name, text, read in _COUNTERS:
        family = CounterMetricFamily(f"vswa_publisher_{name}", text, labels=["dp_rank"])
        for rank, publisher in publishers.items():
            family.add_metric([str(rank)], read(publisher))
        yield family
    epoch = GaugeMetricFamily(
        "vswa_publisher_epoch_start_timestamp_seconds",
        "When the current epoch began, in seconds since 1970.",
        labels=["dp_rank"],
    )
    resident = GaugeMetricFamily(
        "vswa_resident_blocks", "Blocks announced and not removed.", labels=["dp_rank", "window"]
    )
    for rank, publisher in publishers.items():
        ledger = publisher.ledger
        epoch.add_metric([str(rank)], ledger.epoch / 1e9)
        for group_id, count in ledger.residency.counts().items():
            resident.add_metric([str(rank), ledger.layout.group(group_id).label], count)
    yield from (epoch, resident)


def engine_families(engine: Engine) -> Iterator[Metric]:
    """What the engine states of itself, see :meth:`Engine.stats`: a family for each name.

    A sum over ranks is left out where the ranks are there, so that a sum over the family is right.
    """
    info, stats = engine.info, engine.stats()
    of_ranks = {match[1] for match in map(_OF_RANK.fullmatch, stats) if match}
    samples: dict[str, dict[tuple[str, str], float]] = {}
    for name, value in stats.items():
        if name in of_ranks:
            continue
        match = _OF_RANK.fullmatch(name)
        name, rank = (match[1], match[2]) if match else (name, "0" if info.data_parallel_size == 1 else "")
        windows = (group.label for group in info.layout.groups)
        window = next((each for each in windows if name.endswith(f"_{each}")), "")
        if window:
            name = name.removesuffix(f"_{window}")
        samples.setdefault(name, {})[rank, window] = value
    for name, values in samples.items():
        kind = CounterMetricFamily if name in info.totals else GaugeMetricFamily
        labels = ["dp_rank", "window"] if any(window for _, window in values) else ["dp_rank"]
        family = kind(f"vswa_engine_{name}", f"Of the engine: {name}.", labels=labels)
        for of, value in values.items():
            family.add_metric(of[: len(labels)], value)
        yield family
