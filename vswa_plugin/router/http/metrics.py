"""Metrics of a router: its choices, what they were worth, its load, replicas, HTTP API and plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

import msgspec
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.metrics import FleetCollector
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.pools import Pool
from vswa_plugin.router.promises import BOUNDS, Accuracy
from vswa_plugin.router.replicas.load import SharedLoad
from vswa_plugin.router.reservations import Reservations

_RANK = ("worker", "dp_rank")


class Counted(msgspec.Struct, frozen=True):
    """Where the numbers are.

    :param pools: of all models.
    :param requests: outcome -> requests, where this router forwards them.
    """

    decider: Decider
    accuracy: Accuracy
    pools: Callable[[], Iterable[Pool]]
    requests: Callable[[], Mapping[str, int]] = dict
    reservations: Reservations | None = None
    replicas: SharedLoad | None = None


class RouterCollector(Collector):
    """Reads the counters when asked."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    def collect(self) -> Iterable[Metric]:
        stats = self._counted.decider.stats
        yield SummaryMetricFamily(
            "vswa_router_decision_seconds",
            "time to score, choose and book",
            count_value=stats.decisions,
            sum_value=stats.seconds,
        )
        requests = CounterMetricFamily("vswa_router_requests", "forwarded requests", labels=["outcome"])
        for outcome, count in self._counted.requests().items():
            requests.add_metric([outcome], count)
        yield requests
        yield from self._load()
        yield from self._accuracy()
        yield from self._shared()

    def _load(self) -> Iterable[Metric]:
        labels = ["model", *_RANK]
        families = {
            "blocks": GaugeMetricFamily(
                "vswa_router_load_blocks", "blocks of active requests, shared ones once", labels=labels
            ),
            "prefill_tokens": GaugeMetricFamily(
                "vswa_router_load_prefill_tokens", "prompt tokens that wait for a first token", labels=labels
            ),
            "requests": GaugeMetricFamily("vswa_router_load_requests", "active requests", labels=labels),
        }
        for pool in self._counted.pools():
            for rank in pool.ranks:
                load = pool.book.load(rank)
                for field, family in families.items():
                    values = [pool.model, f"{rank.worker_id:x}", str(rank.dp_rank)]
                    family.add_metric(values, getattr(load, field))
        yield from families.values()

    def _accuracy(self) -> Iterable[Metric]:
        results = CounterMetricFamily(
            "vswa_router_predictions",
            "finished requests, by predicted against reported cached blocks",
            labels=[*_RANK, "result"],
        )
        tokens = CounterMetricFamily(
            "vswa_router_cached_tokens", "cached tokens, predicted and reported", labels=[*_RANK, "which"]
        )
        errors = HistogramMetricFamily(
            "vswa_router_prediction_error_blocks",
            "predicted minus reported, in whole blocks",
            labels=[*_RANK],
        )
        systematic = GaugeMetricFamily(
            "vswa_router_systematic_error",
            "1: the worker's last predictions were often wrong",
            labels=_RANK[:1],
        )
        workers = set()
        for rank, found in self._counted.accuracy.ranks.items():
            values = [f"{rank.worker_id:x}", str(rank.dp_rank)]
            for result in ("exact", "over", "under", "unreported"):
                results.add_metric([*values, result], getattr(found, result))
            tokens.add_metric([*values, "predicted"], found.predicted_tokens)
            tokens.add_metric([*values, "reported"], found.actual_tokens)
            edges = [*map(str, BOUNDS), "+Inf"]
            errors.add_metric(values, list(zip(edges, accumulate(found.errors), strict=True)), sum_value=None)
            workers.add(rank.worker_id)
        for worker_id in workers:
            systematic.add_metric([f"{worker_id:x}"], self._counted.accuracy.systematic(worker_id))
        yield from (results, tokens, errors, systematic)

    def _shared(self) -> Iterable[Metric]:
        reservations, replicas = self._counted.reservations, self._counted.replicas
        if reservations is not None:
            yield GaugeMetricFamily(
                "vswa_router_reservations", "active reservations", value=len(reservations)
            )
            ended = CounterMetricFamily(
                "vswa_router_reservations_ended", "reservations, by what ended them", labels=["by"]
            )
            ended.add_metric(["release"], reservations.stats.released)
            ended.add_metric(["ttl"], reservations.stats.expired)
            yield ended
        if replicas is not None:
            yield GaugeMetricFamily(
                "vswa_router_replicas", "other routers that share their load", value=len(replicas.others)
            )
            yield GaugeMetricFamily(
                "vswa_router_replica_requests",
                "requests that other routers have under way",
                value=sum(len(other.requests) for other in replicas.others.values()),
            )
            messages = CounterMetricFamily(
                "vswa_router_replica_messages", "messages of and to other routers", labels=["what"]
            )
            for what, count in msgspec.structs.asdict(replicas.stats).items():
                messages.add_metric([what], count)
            yield messages


def _no_plugins(_: str) -> str:
    return ""


class RouterMetrics:
    """All metrics of one router, rendered on demand.

    :param plugins: from the router's own page to the text that plugins add to it: ``PluginHost.metrics``.
    """

    def __init__(self, fleet: Fleet, counted: Counted, plugins: Callable[[str], str] = _no_plugins) -> None:
        self._plugins = plugins
        self._registry = CollectorRegistry()
        self._registry.register(FleetCollector(fleet))
        self._registry.register(RouterCollector(counted))
        self._seconds = Histogram(
            "vswa_router_http_request_seconds",
            "time to answer over HTTP",
            ["endpoint", "status"],
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
            registry=self._registry,
        )

    def observe(self, endpoint: str, status: int, seconds: float) -> None:
        """One HTTP request was answered."""
        self._seconds.labels(endpoint, str(status)).observe(seconds)

    def render(self) -> str:
        page = generate_latest(self._registry).decode()
        return page + self._plugins(page)
