"""Why a rank scores what it does: which blocks each group holds, and which spoilt the next boundary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.errors import VswaError
from vswa_plugin.index.boundaries import Boundaries, Masks, boundaries_for
from vswa_plugin.index.part import Part
from vswa_plugin.wire.events import Rank

_Held: TypeAlias = list[list[bool]]


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
    masks = part.masks(hashes)
    bits = {rank: part.members[rank].bit for rank in sorted(part.members)}
    try:
        part.rule.needs(part.layout, prompt_len)  # of no use here, but where it fails there is no score
        boundaries = boundaries_for(part.rule, part.layout, prompt_len, len(hashes))
        deepest = boundaries.deepest(masks, sum(1 << bit for bit in bits.values()))
        return [
            _explain_rank(part, rank, _held(part.layout, masks, bit), boundaries, deepest.get(bit, 0))
            for rank, bit in bits.items()
        ]
    except VswaError as error:
        return [
            _without_rule(part, rank, _held(part.layout, masks, bit), str(error))
            for rank, bit in bits.items()
        ]


def _without_rule(part: Part, rank: Rank, held: _Held, failed: str) -> Explanation:
    return Explanation(
        rank=rank,
        model=part.layout.model,
        rule=part.rule.name,
        scored=part.members[rank].scored,
        boundaries=0,
        boundary=0,
        cached_tokens=0,
        groups=tuple(
            GroupExplanation(group, _runs(blocks), None, None)
            for group, blocks in zip(part.layout.groups, held, strict=True)
        ),
        failed=failed,
    )


def _explain_rank(part: Part, rank: Rank, held: _Held, boundaries: Boundaries, boundary: int) -> Explanation:
    return Explanation(
        rank=rank,
        model=part.layout.model,
        rule=part.rule.name,
        scored=part.members[rank].scored,
        boundaries=boundaries.count,
        boundary=boundary,
        cached_tokens=part.rule.tokens(part.layout, boundary, boundaries.prompt_len) if boundary else 0,
        groups=tuple(
            _explain_group(group, blocks, boundaries, boundary)
            for group, blocks in zip(part.layout.groups, held, strict=True)
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


def _held(layout: CacheLayout, masks: Masks, bit: int) -> _Held:
    """Per group, which of its whole blocks the rank of that bit holds."""
    strides = [group.block_size // layout.hash_block_size for group in layout.groups]
    return [
        [bool(mask >> bit & 1) for mask in of_group[stride - 1 :: stride]]
        for of_group, stride in zip(masks, strides, strict=True)
    ]


def _runs(held: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    edges = [
        block
        for block, (before, here) in enumerate(zip([False, *held], [*held, False], strict=True))
        if before != here
    ]
    return tuple(zip(edges[::2], edges[1::2], strict=True))
