"""From one worker's KV events to Dynamo's own publishers, one a rank."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vswa_plugin.engine import BlocksStored, Node
from vswa_plugin.wire import Batch, Source

from .projection import Changes, Projection, Run
from .tree import Block

logger = logging.getLogger(__name__)

#: Blocks in one of Dynamo's events, which must stay below the broker's max payload.
MAX_BLOCKS = 1024


class DynamoPublisher(Protocol):
    """What is used of Dynamo's ``KvEventPublisher``. It takes a list whole or not at all, without waiting."""

    def publish_batch(self, events: Sequence[Any]) -> None:
        """:raises ValueError: an event that it cannot read; or, closed, a plain Exception."""

    def shutdown(self) -> None:
        """End its background tasks, and take it out of Dynamo's discovery."""


class RankFeed:
    """One rank: its projection, told to its publisher after each batch."""

    def __init__(self, projection: Projection, publisher: DynamoPublisher) -> None:
        self.projection = projection
        self.batches = 0
        self.refused = 0
        self._publisher = publisher

    def batch(self, source: Source, batch: Batch) -> None:
        """Take one batch of the stream and publish what it changes.

        :raises ConfigError: a new layout cannot be projected; what was published is removed.
        """
        try:
            for event in batch.events:
                self.projection.apply(event)
        finally:
            self._tell(source)

    def close(self) -> None:
        self._publisher.shutdown()

    def _tell(self, source: Source) -> None:
        changes = self.projection.changes()
        if not changes:
            return
        try:
            self._publisher.publish_batch(list(as_dynamo(changes)))
        except Exception as error:  # Dynamo raises plain Exception
            self.refused += 1
            if self.refused == 1:
                logger.error(
                    "%s: Dynamo's event publisher refused a batch (further ones are only counted); what it "
                    "refuses is left out, the rest is offered again: %s",
                    source,
                    error,
                )
            if isinstance(error, ValueError | TypeError | OverflowError):
                self._tell_one_by_one(changes)
            return
        self.batches += 1
        self.projection.commit(changes)

    def _tell_one_by_one(self, changes: Changes) -> None:
        """Leave out the runs that are refused, with what hangs below them."""
        parts = [Changes(removed=changes.removed)] if changes.removed else []
        for part in [*parts, *(Changes(stored=[run]) for run in changes.stored)]:
            if any(run.parent is not None and not run.parent.published for run in part.stored):
                continue
            try:
                self._publisher.publish_batch(list(as_dynamo(part)))
            except Exception:
                for run in part.stored:
                    self.projection.refuse(run)
            else:
                self.projection.commit(part)


class Feed(Collector):
    """All ranks of one worker."""

    def __init__(self, ranks: Mapping[int, RankFeed]) -> None:
        self._ranks = ranks
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def stored(self, source: Source, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        self._ranks[source.dp_rank].projection.learn(stored, nodes)

    def batch(self, source: Source, batch: Batch) -> None:
        self._ranks[source.dp_rank].batch(source, batch)

    def close(self) -> None:
        """End the publishers of all ranks, the others too where one of them fails."""
        with ExitStack() as closing:
            for rank in self._ranks.values():
                closing.callback(rank.close)

    def text(self) -> str:
        """All metrics in Prometheus text format."""
        return generate_latest(self._registry).decode()

    def collect(self) -> Iterator[Metric]:
        def of_all(family: CounterMetricFamily | GaugeMetricFamily, values: Iterable[float]) -> Metric:
            for rank, value in zip(self._ranks, values, strict=True):
                family.add_metric([str(rank)], value)
            return family

        ranks, labels, prefix = self._ranks.values(), ["dp_rank"], "vswa_dynamo_events"
        yield of_all(
            GaugeMetricFamily(f"{prefix}_nodes", "Blocks remembered.", labels=labels),
            (rank.projection.blocks for rank in ranks),
        )
        yield of_all(
            GaugeMetricFamily(f"{prefix}_published_blocks", "Blocks published to Dynamo.", labels=labels),
            (rank.projection.published for rank in ranks),
        )
        yield of_all(
            CounterMetricFamily(f"{prefix}_batches", "Batches given to Dynamo's publisher.", labels=labels),
            (rank.batches for rank in ranks),
        )
        yield of_all(
            CounterMetricFamily(f"{prefix}_refused_batches", "Batches that it refused.", labels=labels),
            (rank.refused for rank in ranks),
        )


def as_dynamo(changes: Changes) -> Iterator[dict[str, Any]]:
    """Events as ``publish_batch`` takes them; block hashes are signed there."""
    for at in range(0, len(changes.removed), MAX_BLOCKS):
        gone = changes.removed[at : at + MAX_BLOCKS]
        yield {"type": "removed", "block_hashes": _hashes(gone)}
    for run in changes.stored:
        for at in range(0, len(run.blocks), MAX_BLOCKS):
            yield _stored(Run(run.blocks[at : at + MAX_BLOCKS], run.steps))


def _stored(run: Run) -> dict[str, Any]:
    token_ids = run.token_ids()
    event = {
        "type": "stored",
        "token_ids": token_ids,
        "num_block_tokens": [len(token_ids) // len(run.blocks)] * len(run.blocks),  # all are full
        "block_hashes": _hashes(run.blocks),
        "parent_hash": None if run.parent is None else _signed(run.parent.sequence_hash),
    }
    if run.blocks[0].space is not None:
        event["cache_salt"], event["lora_name"] = run.blocks[0].space
    return event


def _hashes(blocks: Iterable[Block]) -> list[int]:
    return [_signed(block.sequence_hash) for block in blocks]


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
