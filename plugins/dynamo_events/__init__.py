"""Dynamo's own KV events, projected from those of all windows; see README.md."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.hookspecs import hookimpl

from .feed import Feed, RankFeed
from .projection import MODES, Projection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vswa_plugin.blocks.layout import CacheLayout
    from vswa_plugin.blocks.reuse import ReuseRule
    from vswa_plugin.engine.contract import BlocksStored, Node
    from vswa_plugin.hookspecs import WorkerContext
    from vswa_plugin.wire.events import Batch, Source

    from .scorer import BoundaryProjection

#: ``off``, ``global`` or ``boundary``; where it is not set, what the router in front needs.
MODE_ENV = "VSWA_DYNAMO_EVENTS"
#: Which router a worker works behind: ``stock`` is Dynamo's own.
ROUTER_ENV = "VSWA_ROUTER"

# One per process, as the worker is.
_feed: Feed | None = None


@hookimpl
def vswa_worker_connected(worker: WorkerContext) -> None:
    global _feed
    mode = mode_from(os.environ)
    _feed = None if mode == "off" else connect(mode, worker)


@hookimpl
def vswa_kv_stored(source: Source, stored: BlocksStored, nodes: Sequence[Node]) -> None:
    if _feed is not None:
        _feed.stored(source, stored, nodes)


@hookimpl
def vswa_kv_batch(source: Source, batch: Batch) -> None:
    if _feed is not None:
        _feed.batch(source, batch)


@hookimpl
def vswa_accuracy_scorers(
    layout: CacheLayout, rules: Mapping[str, ReuseRule]
) -> list[BoundaryProjection] | None:
    from .scorer import BoundaryProjection

    try:
        return [BoundaryProjection(layout, rules)]
    except ConfigError:  # no such projection of this rule, or no such rule: the replay says which
        return None


@hookimpl
def vswa_metrics() -> str | None:
    return None if _feed is None else _feed.text()


def mode_from(environ: Mapping[str, str]) -> str:
    """The projection that the environment asks for; ``boundary`` by default behind Dynamo's own router.

    :raises ConfigError: there is no such projection.
    """
    mode = environ.get(MODE_ENV) or ("boundary" if environ.get(ROUTER_ENV) == "stock" else "off")
    if mode not in (known := ("off", *MODES)):
        raise ConfigError(f"{MODE_ENV}: {unknown_choice('projection', mode, known)}")
    return mode


def connect(mode: str, worker: WorkerContext) -> Feed:
    """A feed with a publisher of Dynamo's for each rank of ``worker``.

    :raises ConfigError: the worker's reuse rule cannot be projected.
    """
    layout = worker.info.layout
    ranks = range(worker.info.data_parallel_size)
    projections = [Projection(mode, layout, worker.rules) for _ in ranks]

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
