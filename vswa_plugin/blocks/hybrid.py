"""How vLLM's hybrid cache manager resumes a prompt over groups of any kind and block size. Pure.

Positions are counted in tokens from the start of the prompt. A prefix that ends at a multiple of the layout's
``hash_block_size`` has a name, the same in every group; a block is named by the position at which it ends.
"""

from __future__ import annotations

from typing import NamedTuple

from vswa_plugin.blocks.layout import (
    CHUNKED,
    FULL,
    KINDS,
    RECURRENT,
    SLIDING,
    CacheGroup,
    CacheLayout,
    Resumption,
)
from vswa_plugin.blocks.search import Holds, found_by_turns, looks_once, searches
from vswa_plugin.errors import ConfigError


class Need(NamedTuple):
    """What one group must hold so that a prompt can be resumed at a boundary.

    :param all_of: positions at each of which the group must hold a block.
    :param any_of: positions at one of which it must hold an entry; None: nothing more is needed.
    """

    all_of: range
    any_of: range | None = None


def resumption_of(layout: CacheLayout) -> Resumption:
    """Where prefixes end, stated or implied."""
    return layout.resumption or Resumption(layout.block_size, layout.hash_block_size)


def deepest(layout: CacheLayout, prompt_len: int) -> int:
    """The deepest boundary, in multiples of the alignment: at least one token is left to compute."""
    where = resumption_of(layout)
    boundary = max(0, min(prompt_len - 1, prompt_len - where.lookahead) // where.alignment)
    while boundary > 0 and not _fits(layout, boundary * where.alignment, prompt_len):
        boundary -= 1
    return boundary


def _fits(layout: CacheLayout, length: int, prompt_len: int) -> bool:
    """Whether the prompt has the blocks that must be held behind its first ``length`` tokens."""
    for group in layout.groups:
        reach = _reach(layout, group, length)
        if reach > length and reach > _peek(layout, prompt_len):
            return False
    return True


def _peek(layout: CacheLayout, prompt_len: int) -> int:
    """The last position at which a block that is given up may end."""
    where = resumption_of(layout)
    return prompt_len - 1 if where.spare_last else prompt_len // where.hash_block_size * where.hash_block_size


def _reach(layout: CacheLayout, group: CacheGroup, length: int) -> int:
    """The position up to which a group must hold what it needs at ``length``."""
    if not blocks_after(group):
        return length
    where = resumption_of(layout)
    fine = where.partial and group.kind == FULL
    return length + (where.hash_block_size if fine else group.block_size)


def need(layout: CacheLayout, group: CacheGroup, boundary: int, prompt_len: int) -> Need:
    """What ``group`` must hold so that ``boundary`` multiples of the alignment can be reused."""
    where = resumption_of(layout)
    length, size = boundary * where.alignment, group.block_size
    reach = _reach(layout, group, length)
    match group.kind:
        case "recurrent":  # one state, and nothing before it
            return Need(range(length, length + 1))
        case "sliding":
            return _sliding(layout, group, length, reach)
        case "chunked":
            assert group.chunk_size is not None
            return Need(_ends(length // group.chunk_size * group.chunk_size, reach, size))
        case "full" if where.partial:
            whole = reach // size * size
            last = _peek(layout, prompt_len) if group.drops_last else prompt_len - 1
            inside = range(reach, min(whole + size, last) + 1, where.hash_block_size)
            return Need(_ends(0, whole, size), inside if whole < reach else None)
        case (
            _
        ):  # full, or a kind of a later version: none needs more than all blocks and one that is given up
            return Need(_ends(0, reach, size))


def _sliding(layout: CacheLayout, group: CacheGroup, length: int, reach: int) -> Need:
    first = max(0, length // group.block_size - window_blocks(layout, group))
    return Need(_ends(first * group.block_size, reach, group.block_size))


def _ends(start: int, end: int, size: int) -> range:
    """The positions at which the blocks between ``start`` and ``end`` end."""
    return range(start + size, end + 1, size)


def blocks_after(group: CacheGroup) -> int:
    """Blocks behind a boundary that the group must hold too, where prefixes end at edges of blocks."""
    if group.kind == RECURRENT:
        return 0
    return int(group.drops_last or group.kind not in KINDS)


def window_blocks(layout: CacheLayout, group: CacheGroup) -> int:
    """Blocks before a block's edge that must be held: those that the token after it can see.

    A window of one token sees none. One block is needed all the same, as a proof, but where the one behind
    the edge is that proof.
    """
    assert group.window_size is not None
    least = 0 if group.drops_last and looks_once(layout) else 1
    return max(least, -(-(group.window_size - 1) // group.block_size))


def trailing_blocks(layout: CacheLayout, group: CacheGroup) -> int | None:
    """Blocks that must be held before any boundary that is an edge of a block; None: all from block 0."""
    if group.kind == SLIDING:
        return window_blocks(layout, group)
    return 1 if group.kind == RECURRENT else None


def chunk_blocks(group: CacheGroup) -> int | None:
    """Blocks of a chunk; None: the group has no chunks."""
    if group.kind != CHUNKED:
        return None
    assert group.chunk_size is not None
    return group.chunk_size // group.block_size


def reused(layout: CacheLayout, boundary: int) -> int:
    """Tokens that are reused where ``boundary`` is the deepest at which all groups hold what they need."""
    where = resumption_of(layout)
    length = boundary * where.alignment
    if not searches(layout) and any(_gives_up_twice(layout, group, length) for group in layout.groups):
        length -= where.alignment
    return length if length > where.least_tokens else 0


def searched(layout: CacheLayout, holds: Holds, prompt_len: int) -> int:
    """The boundary that the engine's search comes to, in layouts where that is no matter of needs alone."""
    where = resumption_of(layout)
    return found_by_turns(layout, where, holds, prompt_len) // where.alignment


def shortens(layout: CacheLayout) -> bool:
    """Whether :func:`reused` may be less than the boundary has tokens."""
    where = resumption_of(layout)
    return where.least_tokens > 0 or any(_may_give_up_twice(group, where) for group in layout.groups)


def _may_give_up_twice(group: CacheGroup, where: Resumption) -> bool:
    return group.drops_last and group.kind == SLIDING and group.block_size != where.alignment


def _gives_up_twice(layout: CacheLayout, group: CacheGroup, length: int) -> bool:
    """Near the start of a prompt the engine shortens such a group's prefix a second time."""
    blocks = length // group.block_size
    return _may_give_up_twice(group, resumption_of(layout)) and 0 < blocks < window_blocks(layout, group)


def check_kinds(layout: CacheLayout) -> None:
    """:raises ConfigError: the layout combines what no engine does, so that its rule is not known."""
    where = resumption_of(layout)
    unit = where.hash_block_size
    odd = [each for each in layout.groups if each.kind in (SLIDING, CHUNKED) and each.block_size != unit]
    if where.partial and odd:
        shown = ", ".join(f"{group.group_id} ({group.kind} of {group.block_size} tokens)" for group in odd)
        raise ConfigError(
            f"expected only {FULL} and {RECURRENT} groups where prefixes end inside blocks, and others whose "
            f"blocks are hash units ({unit} tokens), got {shown}"
        )
