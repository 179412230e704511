"""Metrics of a router: its choices, what they were worth, its load, replicas and HTTP API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import TypeVar

import msgspec
from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from vswa_plugin.engine.outcomes import OUTCOMES
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.metrics import fleet_families, in_pieces, rank_labels
from vswa_plugin.program.metrics import About, Page, no_plugins
from vswa_plugin.router.counts import RequestCounts
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.picks import OUTCOMES as OF_REQUESTS
from vswa_plugin.router.picks import PickerCounts
from vswa_plugin.router.pools import Pool
from vswa_plugin.router.promises import Promises, RankPromises
from vswa_plugin.router.replicas.load import SharedLoad
from vswa_plugin.router.reservations import ENDED_BY, Reservations
from vswa_plugin.router.tallies import OTHER, Buckets
from vswa_plugin.selection import Load
from vswa_plugin.wire.events import Rank, id_text

#: ``tuple[str, ...]`` would not do: the keys of a mapping are invariant.
_Labels = TypeVar("_Labels", tuple[str], tuple[str, str])
_Series = TypeVar("_Series", tuple[()], tuple[str, str])
_T = TypeVar("_T", CounterMetricFamily, GaugeMetricFamily)
_MODEL = ("model",)
_RANK = ("model", "worker", "dp_rank")
_RESULTS = ("exact", "over", "under", "unreported")

_LOAD = {
    "blocks": "Blocks of active requests, shared ones once.",
    "prefill_tokens": "Prompt tokens that wait for a first token.",
    "requests": "Active requests.",
}
_REPLICAS = {
    "received": ("messages_received", "Messages of other routers."),
    "sent": ("messages_sent", "Messages to other routers."),
    "bytes_sent": ("sent_bytes", "Bytes of the messages to other routers."),
    "malformed": ("malformed_messages", "Messages of other routers that could not be read."),
    "foreign_subject": ("foreign_subject_messages", "Messages of a router on the subject of another one."),
    "foreign_version": ("foreign_version_messages", "Messages of routers of another protocol version."),
    "send_errors": ("send_errors", "Messages that the broker did not take."),
    "wanted": ("wanted_requests", "Requests of other routers that had to be fetched."),
    "left_out": ("left_out", "Routers or requests of them above the limits."),
    "expired": ("expired", "Other routers that fell silent."),
}


class Counted(msgspec.Struct, frozen=True):
    """Where the numbers are.

    :param pools: of all models.
    :param requests: of a router that forwards them.
    :param reservations: of a router that only selects.
    :param picker: of a picker.
    """

    decider: Decider
    promises: Promises
    pools: Callable[[], Iterable[Pool]]
    requests: RequestCounts | None = None
    reservations: Reservations | None = None
    replicas: SharedLoad | None = None
    picker: PickerCounts | None = None


def _by(family: _T, counts: Mapping[_Labels, int]) -> _T:
    for labels, count in counts.items():
        family.add_metric(labels, count)
    return family


def _histogram(name: str, text: str, labels: tuple[str, ...], buckets: Mapping[_Series, Buckets]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, each in buckets.items():
        family.add_metric(values, each.cumulative(), sum_value=each.sum)
    return family


def router_families(counted: Counted) -> Iterator[Metric]:
    """All families of a router but those of its fleet, in pieces."""
    yield _histogram(
        "vswa_router_decision_seconds",
        "Time to score, choose and book.",
        ("model", "phase"),
        counted.decider.durations,
    )
    # Made at once each, so that those of a page agree: what has come has ended or is under way.
    if counted.requests is not None:
        yield from _requests(counted.requests)
    if counted.reservations is not None:
        yield from _reservations(counted.reservations)
    if counted.picker is not None:
        yield from _picker(counted.picker)
    if counted.replicas is not None:
        yield from _replicas(counted.replicas)
    yield from _load(counted.pools())
    yield from _promises(counted.promises)


def _requests(counts: RequestCounts) -> list[Metric]:
    prefix = "vswa_router_requests"
    ended = {(model, outcome): 0 for model in counts.received for outcome in OUTCOMES} | counts.ended
    return [
        _by(
            CounterMetricFamily(f"{prefix}_received", "Requests that came.", labels=_MODEL),
            {(model,): count for model, count in counts.received.items()},
        ),
        _by(
            CounterMetricFamily(prefix, "Requests that ended, each once.", labels=("model", "outcome")), ended
        ),
        _by(
            GaugeMetricFamily(f"{prefix}_in_flight", "Requests under way.", labels=_MODEL),
            {(model,): counts.in_flight[model] for model in counts.received},
        ),
        *(
            _by(
                CounterMetricFamily(f"vswa_router_{name}", text, labels=_MODEL),
                {(model,): counted[model] for model in counts.received},
            )
            for name, text, counted in (
                (
                    "prefill_retries",
                    "Prompts given to another prefill worker because the first was lost.",
                    counts.prefill_retries,
                ),
                (
                    "decode_retries",
                    "Finished prompts given to another decode worker because the first was lost.",
                    counts.decode_retries,
                ),
                (
                    "released_prompts",
                    "Finished prompts that a prefill worker freed because no decode worker would come.",
                    counts.released_prompts,
                ),
            )
        ),
    ]


def _reservations(reservations: Reservations) -> list[Metric]:
    made, prefix = reservations.made, "vswa_router_reservations"
    return [
        _by(
            CounterMetricFamily(f"{prefix}_made", "Reservations made.", labels=_MODEL),
            {(model,): count for model, count in made.items()},
        ),
        _by(
            CounterMetricFamily(f"{prefix}_ended", "Reservations that ended.", labels=("model", "by")),
            {(model, by): 0 for model in made for by in ENDED_BY} | reservations.ended,
        ),
        _by(
            GaugeMetricFamily(prefix, "Active reservations.", labels=_MODEL),
            {(model,): reservations.active[model] for model in made},
        ),
    ]


def _picker(counts: PickerCounts) -> list[Metric]:
    models = {model for model, _ in counts.outcomes} | {OTHER}
    outcomes = {(model, outcome): 0 for model in models for outcome in OF_REQUESTS} | counts.outcomes
    durations = (
        ("preprocessing", "Time to make the tokens of a request.", counts.preprocessing),
        ("pick", "Time from a request's last byte to its choice.", counts.picking),
    )
    return [
        _by(
            CounterMetricFamily(
                "vswa_picker_requests", "What became of a gateway's requests.", labels=("model", "outcome")
            ),
            outcomes,
        ),
        GaugeMetricFamily(
            "vswa_picker_requests_in_flight", "Requests of the gateway under way.", value=counts.under_way
        ),
        *(_histogram(f"vswa_picker_{name}_seconds", text, (), {(): each}) for name, text, each in durations),
    ]


def _load(pools: Iterable[Pool]) -> Iterator[Metric]:
    ranks = [(pool, rank) for pool in pools for rank in pool.ranks]
    for field, text in _LOAD.items():

        def new(field: str = field, text: str = text) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"vswa_router_load_{field}", text, labels=_RANK)

        def add(family: GaugeMetricFamily, of: tuple[Pool, Rank], field: str = field) -> None:
            pool, rank = of
            load: Load = pool.book.load(rank)
            family.add_metric([pool.model, *rank_labels(rank)], getattr(load, field))

        yield from in_pieces(new, ranks, add)


def _promises(promises: Promises) -> Iterator[Metric]:
    of_gone = [((model, OTHER, ""), counts) for model, counts in promises.gone.items()]
    ranks = [((each.model, *rank_labels(rank)), each) for rank, each in promises.ranks.items()]
    counted = [*ranks, *of_gone]

    def predictions() -> CounterMetricFamily:
        text = "Finished requests, by predicted against reported cached blocks."
        return CounterMetricFamily("vswa_router_predictions", text, labels=(*_RANK, "result"))

    def add_results(family: CounterMetricFamily, of: tuple[tuple[str, str, str], RankPromises]) -> None:
        labels, counts = of
        for result in _RESULTS:
            family.add_metric([*labels, result], getattr(counts, result))

    yield from in_pieces(predictions, counted, add_results)
    for field, which in (("predicted_tokens", "predicted"), ("actual_tokens", "reported")):

        def tokens(which: str = which) -> CounterMetricFamily:
            name, text = f"vswa_router_{which}_cached_tokens", f"Cached tokens, as {which}."
            return CounterMetricFamily(name, text, labels=_RANK)

        def add_tokens(
            family: CounterMetricFamily, of: tuple[tuple[str, str, str], RankPromises], field: str = field
        ) -> None:
            family.add_metric(of[0], getattr(of[1], field))

        yield from in_pieces(tokens, counted, add_tokens)
    yield _histogram(
        "vswa_router_prediction_error_blocks",
        "Blocks promised too many (over) or too few (under), of wrong predictions.",
        ("model", "direction"),
        promises.errors,
    )

    yield _by(
        CounterMetricFamily(
            "vswa_router_promise_error_tokens",
            "Tokens promised and not reused, or reused and not promised, by the likely cause.",
            labels=("model", "cause"),
        ),
        promises.causes,
    )

    def systematic() -> GaugeMetricFamily:
        text = "1: the last predictions for the worker were often wrong."
        return GaugeMetricFamily("vswa_router_systematic_error", text, labels=("worker",))

    def add_worker(family: GaugeMetricFamily, worker_id: int) -> None:
        family.add_metric([id_text(worker_id)], promises.systematic(worker_id))

    workers = list({rank.worker_id: None for rank in promises.ranks})
    yield from in_pieces(systematic, workers, add_worker)


def _replicas(replicas: SharedLoad) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "vswa_router_replicas", "Other routers that share their load.", value=len(replicas.others)
    )
    yield GaugeMetricFamily(
        "vswa_router_replica_requests",
        "Requests that other routers have under way.",
        value=sum(len(other.requests) for other in replicas.others.values()),
    )
    for field, (name, text) in _REPLICAS.items():
        yield CounterMetricFamily(f"vswa_router_replica_{name}", text, value=getattr(replicas.stats, field))


class RouterMetrics:
    """All metrics of one router, rendered on demand.

    :param program: ``router``, ``selector`` or ``picker``.
    :param plugins: from the router's own page to the text that plugins add to it: ``PluginHost.metrics``.
    """

    def __init__(
        self, program: str, fleet: Fleet, counted: Counted, plugins: Callable[[str], str] = no_plugins
    ) -> None:
        self.program, self.counted = program, counted
        self._seconds = Histogram(
            "vswa_router_http_request_seconds",
            "Time to answer over HTTP.",
            ["endpoint", "status"],
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
            registry=None,
        )

        def families() -> Iterator[Metric]:
            return chain(router_families(counted), self._seconds.collect(), fleet_families(fleet))

        self._page = Page(lambda: About(program), families, plugins)

    def observe(self, endpoint: str, status: int, seconds: float) -> None:
        """One HTTP request was answered."""
        self._seconds.labels(endpoint, str(status)).observe(seconds)

    async def render(self) -> str:
        return await self._page.render()
