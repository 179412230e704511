"""Which cache manager keeps the blocks, and which of its groups draw from one pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..cache.api import CacheManager, PageMover, no_pages
from ..cache.spec import GroupSpec
from ..cache.v1.manager import CacheManagerV1
from ..cache.v2 import CacheManager as CacheManagerV2
from ..cache.v2.pool import pool_of_groups
from .options import RULES, EngineOptions
from .pools import CachePlan

V2, V1, V1_CONTIGUOUS = RULES


def cache_groups(plan: CachePlan) -> list[GroupSpec]:
    """The plan's pools as a manager takes them."""
    return [
        GroupSpec(pool.group.group_id, pool.group.window_size, pool.num_blocks, pool.layers, pool.host_blocks)
        for pool in plan.pools
    ]


def shared_pools(plan: CachePlan, rule: str) -> list[list[int]]:
    """Indexes of cache groups, those together that share page numbers."""
    groups = cache_groups(plan)
    if rule != V2:
        return [[index] for index in range(len(groups))]
    pools: dict[int, list[int]] = {}
    for index, pool in enumerate(pool_of_groups(groups)):
        pools.setdefault(pool, []).append(index)
    return list(pools.values())


def make_manager(
    plan: CachePlan,
    options: EngineOptions,
    mover: PageMover = no_pages,
    dp_rank: int | None = None,
) -> CacheManager:
    """The cache manager of one rank, by ``options.reuse_rule``.

    :param dp_rank: where there are several, as events give it.
    """
    rule = options.reuse_rule
    build: Callable[..., CacheManager] = CacheManagerV2
    if rule != V2:
        build = partial(CacheManagerV1, contiguous=rule == V1_CONTIGUOUS)
    return build(
        cache_groups(plan),
        options.tokens_per_block,
        plan.context_length,
        event_buffer_max_size=options.event_buffer_max_size,
        enable_block_reuse=options.enable_block_reuse,
        enable_partial_reuse=options.enable_partial_reuse,
        max_chunk_tokens=options.max_chunk_tokens,
        dp_rank=dp_rank,
        mover=mover,
    )
