"""Why a rank scores what it does: which blocks each group holds, and which spoilt the next boundary."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.errors import VswaError
from vswa_plugin.index.boundaries import Boundaries, boundaries_for
from vswa_plugin.index.part import Part
from vswa_plugin.wire.events import Rank


class GroupExplanation(msgspec.Struct, frozen=True):
    """One cache group. Blocks are those of the group, counted in the prompt, ranges of them half open.

    :param held: runs of blocks that the group holds.
    :param needed: what it had to hold at the boundary that won; None: no boundary won.
    :param spoilt: the first block that it lacks for the next deeper boundary; None: it lacks none, or there
        is no deeper boundary.
    """

    group: CacheGroup
    held: tuple[tuple[int, int], ...]
    needed: tuple[int, int] | None
    spoilt: int | None


class Explanation(msgspec.Struct, frozen=True):
    """One rank and one prompt.

    :param scored: False: the rank scores 0 whatever it holds, because its view is stale or silent.
    :param boundaries: the deepest boundary of the prompt, in blocks of the layout's ``block_size``.
    :param boundary: the deepest that the rank could resume at; 0: none.
    :param cached_tokens: what it would reuse.
    :param failed: the message of a reuse rule that failed: the rank scores 0, and of the groups only what
        they hold is known; None: it did not fail.
    """

    rank: Rank
    model: str
    rule: str
    scored: bool
    boundaries: int
    boundary: int
    cached_tokens: int
    groups: tuple[GroupExplanation, ...]
    failed: str | None = None


def explain_part(part: Part, hashes: Sequence[int], prompt_len: int) -> list[Explanation]:
    """All ranks of a part, in order."""
    ranks = sorted(part.members)
    try:
        boundaries = boundaries_for(part.rule, part.layout, prompt_len, len(hashes))
        return [_explain_rank(part, rank, part.masks_of(rank, hashes), boundaries) for rank in ranks]
    except VswaError as error:
        return [_without_rule(part, rank, hashes, str(error)) for rank in ranks]


def _without_rule(part: Part, rank: Rank, hashes: Sequence[int], failed: str) -> Explanation:
    return Explanation(
        rank=rank,
        model=part.layout.model,
        rule=part.rule.name,
        scored=part.members[rank].scored,
        boundaries=0,
        boundary=0,
        cached_tokens=0,
        groups=tuple(
            GroupExplanation(group, _runs(_blocks(group, masks, part.layout)), None, None)
            for group, masks in zip(part.layout.groups, part.masks_of(rank, hashes), strict=True)
        ),
        failed=failed,
    )


def _explain_rank(part: Part, rank: Rank, masks: list[list[int]], boundaries: Boundaries) -> Explanation:
    boundary = boundaries.deepest(masks, 1).get(0, 0)
    return Explanation(
        rank=rank,
        model=part.layout.model,
        rule=part.rule.name,
        scored=part.members[rank].scored,
        boundaries=boundaries.count,
        boundary=boundary,
        cached_tokens=part.rule.tokens(part.layout, boundary, boundaries.prompt_len) if boundary else 0,
        groups=tuple(
            _explain_group(group, _blocks(group, held, part.layout), boundaries, boundary)
            for group, held in zip(part.layout.groups, masks, strict=True)
        ),
    )


def _explain_group(
    group: CacheGroup, held: Sequence[bool], boundaries: Boundaries, boundary: int
) -> GroupExplanation:
    needed = _needed(group, boundaries, boundary) if boundary else None
    spoilt = None
    if boundary < boundaries.count:
        first, end = _needed(group, boundaries, boundary + 1)
        spoilt = next((block for block in range(first, end) if block >= len(held) or not held[block]), None)
    return GroupExplanation(group, _runs(held), needed, spoilt)


def _needed(group: CacheGroup, boundaries: Boundaries, boundary: int) -> tuple[int, int]:
    """The group's blocks that must be held at ``boundary``; an empty run at the boundary where none must."""
    positions = boundaries.need(group, boundary).all_of
    if not positions:
        at = boundary * boundaries.layout.block_size // group.block_size
        return at, at
    return (positions[0] - 1) // group.block_size, -(-positions[-1] // group.block_size)


def _blocks(group: CacheGroup, masks: Sequence[int], layout: CacheLayout) -> list[bool]:
    """Which whole blocks of the group are held, out of what is held at each name."""
    stride = group.block_size // layout.hash_block_size
    return [bool(mask) for mask in masks[stride - 1 :: stride]]


def _runs(held: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    edges = [
        block
        for block, (before, here) in enumerate(zip([False, *held], [*held, False], strict=True))
        if before != here
    ]
    return tuple(zip(edges[::2], edges[1::2], strict=True))
