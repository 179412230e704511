"""Metrics of a fleet: its readers, its ranks and its window index."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.view import View
from vswa_plugin.wire.events import Rank, id_text

_Family = TypeVar("_Family", CounterMetricFamily, GaugeMetricFamily)
_Item = TypeVar("_Item")

#: Ranks in one piece of a family, which is written without a pause: a millisecond or less.
PIECE = 64
#: Ranks, and models in the index, that are shown one by one; what else publishes, be it forged, is shown
#: together as :data:`OTHER`.
MAX_RANKS, MAX_MODELS = 4_096, 64
OTHER = "other"
_RANK = ("worker", "dp_rank")

_READER = {
    "batches": ("batches", "Batches with events that arrived."),
    "events": ("events", "Events applied."),
    "heartbeats": ("heartbeats", "Heartbeats that arrived."),
    "duplicates": ("duplicate_batches", "Batches that had been applied already."),
    "foreign_epochs": ("outdated_batches", "Batches of an epoch that is over."),
    "malformed": ("malformed_messages", "Messages that could not be read."),
    "epochs": ("epochs", "Epochs that were begun: starts of the publisher, and restarts of its stream."),
    "gaps": ("gaps", "Times that events were missing."),
    "replays": ("replays", "Replays received."),
    "snapshots": ("snapshots", "Snapshots received."),
    "failures": ("failed_repairs", "Repairs that failed and were tried again."),
}
_SUBSCRIBER = {
    "messages": ("messages", "Messages that arrived on subjects of events."),
    "malformed": ("malformed_messages", "Messages that could not be read."),
    "foreign_subjects": ("foreign_messages", "Messages on subjects that are not those of a followed rank."),
    "unregistered": ("unregistered_messages", "Messages of ranks that the registry does not list."),
    "implausible_epochs": (
        "implausible_epochs",
        "Messages of epochs that lie too far ahead to be anybody's.",
    ),
    "requests": ("repair_requests", "Requests for a replay or a part of a snapshot."),
    "errors": ("given_up_ranks", "Times that a rank was given up until its next epoch after a failure here."),
}


def in_pieces(
    new: Callable[[], _Family], items: Sequence[_Item], add: Callable[[_Family, _Item], None]
) -> Iterator[_Family]:
    """A family with the samples that ``add`` adds for each of ``items``, :data:`PIECE` items at a time."""
    for at in range(0, max(len(items), 1), PIECE):
        family = new()
        for item in items[at : at + PIECE]:
            add(family, item)
        yield family


def fleet_families(fleet: Fleet) -> Iterator[Metric]:
    """All families of readers and index, in pieces."""
    yield from _subscriber(fleet)
    yield from _index(fleet)
    views = sorted(fleet.subscriber.views(), key=lambda view: not view.registered)
    shown, others = views[:MAX_RANKS], views[MAX_RANKS:]
    yield from _readers(shown, others)
    yield from _ranks(fleet, shown, others)


def _subscriber(fleet: Fleet) -> Iterator[Metric]:
    stats = fleet.subscriber.stats
    for field, (name, text) in _SUBSCRIBER.items():
        yield CounterMetricFamily(f"vswa_subscriber_{name}", text, value=getattr(stats, field))


def _index(fleet: Fleet) -> Iterable[Metric]:
    index = fleet.index
    ranks: Counter[str] = Counter()
    scored: Counter[str] = Counter()
    held: Counter[tuple[str, str]] = Counter()
    # Models of the registry first, then those that were there first.
    known = [entry.served_model_name for entry in fleet.entries.values()]
    models = [*known, *(part.layout.model for part in index.parts())]
    named = set(list(dict.fromkeys(models))[:MAX_MODELS])
    for part in index.parts():
        model = part.layout.model if part.layout.model in named else OTHER
        ranks[model] += len(part.members)
        scored[model] += sum(member.scored for member in part.members.values())
        for group, count in zip(part.layout.groups, part.table.resident(), strict=True):
            held[model, group.label] += count
    labels = ["model"]
    of_ranks = GaugeMetricFamily("vswa_index_ranks", "Ranks in the index.", labels=labels)
    of_scored = GaugeMetricFamily("vswa_index_scored_ranks", "Ranks that are scored.", labels=labels)
    for model, count in ranks.items():
        of_ranks.add_metric([model], count)
        of_scored.add_metric([model], scored[model])
    blocks = GaugeMetricFamily(
        "vswa_index_blocks", "Distinct blocks in the index, shared ones once.", labels=[*labels, "window"]
    )
    for key, count in held.items():
        blocks.add_metric(key, count)
    stats = index.stats()
    return (
        of_ranks,
        of_scored,
        blocks,
        GaugeMetricFamily("vswa_index_bytes", "Memory of the index, in bytes.", value=stats.nbytes),
        GaugeMetricFamily("vswa_index_kernel", "1: compiled kernel, 0: pure Python.", value=stats.kernel),
        CounterMetricFamily(
            "vswa_index_left_out_blocks", "Stored blocks left out for lack of room.", value=stats.left_out
        ),
    )


def rank_labels(rank: Rank) -> tuple[str, str]:
    """Of the labels ``worker`` and ``dp_rank``."""
    return id_text(rank.worker_id), str(rank.dp_rank)


def _readers(shown: Sequence[View], others: Sequence[View]) -> Iterator[Metric]:
    for field, (name, text) in _READER.items():

        def new(name: str = name, text: str = text) -> CounterMetricFamily:
            return CounterMetricFamily(f"vswa_reader_{name}", text, labels=_RANK)

        def add(family: CounterMetricFamily, view: View, field: str = field) -> None:
            family.add_metric(rank_labels(view.source.rank), getattr(view.reader.stats, field))

        yield from in_pieces(new, shown, add)
        if others:
            family = new()
            family.add_metric([OTHER, ""], sum(getattr(view.reader.stats, field) for view in others))
            yield family


def _ranks(fleet: Fleet, shown: Sequence[View], others: Sequence[View]) -> Iterator[Metric]:
    def states() -> GaugeMetricFamily:
        labels = [*_RANK, "model", "state"]
        return GaugeMetricFamily("vswa_rank_state", "Ranks in that state: 1 for each.", labels=labels)

    def lags() -> GaugeMetricFamily:
        text = "Age of the last message of the rank, by the clocks of both machines."
        return GaugeMetricFamily("vswa_rank_lag_seconds", text, labels=_RANK)

    def blocks() -> GaugeMetricFamily:
        labels = [*_RANK, "model", "window", "tier"]
        return GaugeMetricFamily("vswa_rank_blocks", "Blocks that a rank holds.", labels=labels)

    def model(view: View) -> str:
        return view.layout.model if view.layout is not None else ""

    def add_state(family: GaugeMetricFamily, view: View) -> None:
        family.add_metric([*rank_labels(view.source.rank), model(view), view.state], 1)

    def add_lag(family: GaugeMetricFamily, view: View) -> None:
        if (heard_ns := view.reader.last_published_at_ns) != 0:
            family.add_metric(rank_labels(view.source.rank), (time.time_ns() - heard_ns) / 1e9)

    def add_blocks(family: GaugeMetricFamily, view: View) -> None:
        for window, tiers in fleet.blocks(view).items():
            for tier, count in tiers.items():
                family.add_metric([*rank_labels(view.source.rank), model(view), window, tier], count)

    yield from in_pieces(states, shown, add_state)
    if others:
        family = states()
        for state, count in Counter(view.state for view in others).items():
            family.add_metric([OTHER, "", "", state], count)
        yield family
    yield from in_pieces(lags, shown, add_lag)
    yield from in_pieces(blocks, shown, add_blocks)
