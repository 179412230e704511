"""Why a rank scores what it does: which blocks each group holds, and which spoilt the next boundary."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.errors import VswaError
from vswa_plugin.index.part import Part
from vswa_plugin.index.plans import Boundaries, boundaries_for, run_starts
from vswa_plugin.wire.events import Rank


class GroupExplanation(msgspec.Struct, frozen=True):
    """One cache group. Blocks are positions in the prompt, ranges of them half open.

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
    :param boundaries: the deepest boundary of the prompt, in blocks.
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
        part.rule.needs(part.layout, prompt_len)  # of no use here, but where it fails there is no score
        boundaries = boundaries_for(part.rule, part.layout, prompt_len, len(hashes))
        return [_explain_rank(part, rank, hashes, prompt_len, boundaries) for rank in ranks]
    except VswaError as error:
        return [_without_rule(part, rank, hashes, str(error)) for rank in ranks]


def _without_rule(part: Part, rank: Rank, hashes: Sequence[int], failed: str) -> Explanation:
    held = zip(part.layout.groups, part.held(rank, hashes), strict=True)
    return Explanation(
        rank=rank,
        model=part.layout.model,
        rule=part.rule.name,
        scored=part.members[rank].scored,
        boundaries=0,
        boundary=0,
        cached_tokens=0,
        groups=tuple(GroupExplanation(group, _runs(blocks), None, None) for group, blocks in held),
        failed=failed,
    )


def _explain_rank(
    part: Part, rank: Rank, hashes: Sequence[int], prompt_len: int, boundaries: Boundaries
) -> Explanation:
    held = part.held(rank, hashes)
    boundary = boundaries.deepest([run_starts(blocks) for blocks in held])
    return Explanation(
        rank=rank,
        model=part.layout.model,
        rule=part.rule.name,
        scored=part.members[rank].scored,
        boundaries=boundaries.count,
        boundary=boundary,
        cached_tokens=part.rule.tokens(part.layout, boundary, prompt_len) if boundary else 0,
        groups=tuple(
            GroupExplanation(
                group,
                _runs(held[index]),
                (boundaries.first_needed[index][boundary], boundary) if boundary else None,
                _spoilt(held[index], boundaries.first_needed[index], boundary + 1),
            )
            for index, group in enumerate(part.layout.groups)
        ),
    )


def _spoilt(held: Sequence[bool], first_needed: Sequence[int], boundary: int) -> int | None:
    if boundary >= len(first_needed):
        return None
    return next((block for block in range(first_needed[boundary], boundary) if not held[block]), None)


def _runs(held: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    edges = [
        block
        for block, (before, here) in enumerate(zip([False, *held], [*held, False], strict=True))
        if before != here
    ]
    return tuple(zip(edges[::2], edges[1::2], strict=True))
