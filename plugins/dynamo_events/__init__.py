"""Dynamo's own KV events, projected from those of all windows; see README.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from vswa_plugin.engine import ROUTER_ENV, ROUTERS
from vswa_plugin.errors import ConfigError
from vswa_plugin.hookspecs import hookimpl

from .feed import Feed, RankFeed
from .grid import MODES
from .projection import Projection
from .units import unit_hashes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vswa_plugin.blocks import CacheLayout, ReuseRule
    from vswa_plugin.engine import BlocksStored, Node, Section
    from vswa_plugin.hookspecs import WorkerContext
    from vswa_plugin.wire import Batch, Source

    from .scorer import BoundaryProjection

#: What is called only to feed Dynamo's events.
FEEDING = ("vswa_worker_connected", "vswa_kv_stored", "vswa_kv_batch", "vswa_metrics", "vswa_stopping")


class DynamoEvents:
    """The hooks of one worker, and its feed unless that is off."""

    #: The launcher says in VSWA_ROUTER which router a worker works behind; ``stock`` is Dynamo's own.
    option_variables: ClassVar[Mapping[str, str]] = {"VSWA_DYNAMO_EVENTS": "mode", ROUTER_ENV: "router"}

    def __init__(self) -> None:
        self._mode = "off"
        self._feed: Feed | None = None

    @hookimpl
    def vswa_options(self, options: Section) -> Sequence[str] | None:
        self._mode = mode_from(options)
        return FEEDING if self._mode == "off" else None

    @hookimpl
    def vswa_worker_connected(self, worker: WorkerContext) -> None:
        self._feed = None if self._mode == "off" else connect(self._mode, worker)

    @hookimpl
    def vswa_kv_stored(self, source: Source, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        if self._feed is not None:
            self._feed.stored(source, stored, nodes)

    @hookimpl
    def vswa_kv_batch(self, source: Source, batch: Batch) -> None:
        if self._feed is not None:
            self._feed.batch(source, batch)

    @hookimpl
    def vswa_accuracy_scorers(
        self, layout: CacheLayout, rules: Mapping[str, ReuseRule]
    ) -> list[BoundaryProjection] | None:
        from .scorer import BoundaryProjection

        try:
            return [BoundaryProjection(layout, rules)]
        except ConfigError:  # no such projection of this rule, or no such rule: the replay says which
            return None

    @hookimpl
    def vswa_metrics(self) -> str | None:
        return None if self._feed is None else self._feed.text()

    @hookimpl
    def vswa_stopping(self) -> None:
        """Let Dynamo's publishers go while its runtime is still there."""
        feed, self._feed = self._feed, None
        if feed is not None:
            feed.close()


def mode_from(options: Section) -> str:
    """The projection that is asked for; ``boundary`` by default behind Dynamo's own router.

    :raises ConfigError: there is no such projection, router or option.
    """
    options.check({"mode", "router"})
    router = options.choice("router", ROUTERS, ROUTERS[0])
    if options.data.get("mode") is False:  # what YAML reads where somebody writes off
        return "off"
    return options.choice("mode", ("off", *MODES), "boundary" if router == "stock" else "off")


def connect(mode: str, worker: WorkerContext) -> Feed:
    """A feed with a publisher of Dynamo's for each rank of ``worker``.

    :raises ConfigError: the worker's reuse rule cannot be projected.
    """
    layout = worker.info.layout
    ranks = range(worker.info.data_parallel_size)
    projections = [Projection(mode, layout, worker.rules, hasher=unit_hashes) for _ in ranks]

    from dynamo.llm import KvEventPublisher

    return Feed(
        {
            rank: RankFeed(
                projections[rank],
                KvEventPublisher(
                    endpoint=worker.endpoint,
                    kv_block_size=layout.block_size,
                    dp_rank=rank,
                    enable_local_indexer=True,
                ),
            )
            for rank in ranks
        }
    )
