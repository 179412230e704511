"""The two cases in which hashes cannot show what an engine reuses, apart from real mistakes. Pure.

Both come from engines that reuse parts of blocks (TensorRT-LLM), and move the first block that a sliding
window needs: one token before a block's edge it needs one block less at its start than at the edge below.
"""

from __future__ import annotations

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import ReuseRule, resumable
from vswa_plugin.index import Explanation

#: A part of some other block matched, up to one token short of its edge: promised less than reused.
PARTIAL_MATCH = "partial match"
#: A repeated prompt of whole blocks of which the engine did not match the last: promised more than reused.
LAST_BLOCK = "last block"
EXCEPTIONS = (PARTIAL_MATCH, LAST_BLOCK)
#: The cache changed between the request's arrival and the engine's match, or before, and its events came
#: later. In recordings of workers only.
LAG = "lag"


def exception_of(
    rule: ReuseRule, layout: CacheLayout, explanation: Explanation, prompt_len: int, actual: int
) -> str | None:
    """Which exception explains that ``actual`` tokens were reused; None: neither does.

    :param explanation: of our prediction, which differs from ``actual`` in whole blocks.
    """
    size, predicted = layout.block_size, explanation.cached_tokens
    if not _reuses_parts(rule, layout):
        return None
    held = {each.group.group_id: _flags(each.held) for each in explanation.groups}
    if predicted < actual:
        boundary, rest = divmod(actual + 1, size)
        if rest == 0 and all(_held_below(rule, group, held, boundary) for group in layout.groups):
            return PARTIAL_MATCH
    elif prompt_len % size == 0 and predicted == prompt_len - 1:
        last = prompt_len // size - 1
        without = {
            group_id: [f and i != last for i, f in enumerate(flags)] for group_id, flags in held.items()
        }
        if actual // size == resumable(rule, layout, without, prompt_len) // size:
            return LAST_BLOCK
    return None


def _reuses_parts(rule: ReuseRule, layout: CacheLayout) -> bool:
    """Whether a prompt of two whole blocks is resumed inside the second."""
    if not layout.plain:
        return False  # what is held there is not counted in such blocks
    prompt_len = 2 * layout.block_size
    boundary = rule.boundaries(layout, prompt_len)
    return rule.tokens(layout, boundary, prompt_len) % layout.block_size != 0


def _held_below(rule: ReuseRule, group: CacheGroup, held: dict[int, list[bool]], boundary: int) -> bool:
    """Whether the group holds all that is needed one token before ``boundary``, but the last block."""
    first = rule.first_needed(group, boundary, boundary * group.block_size)
    flags = held[group.group_id]
    return all(block < len(flags) and flags[block] for block in range(first, boundary - 1))


def _flags(runs: tuple[tuple[int, int], ...]) -> list[bool]:
    flags = [False] * (runs[-1][1] if runs else 0)
    for first, end in runs:
        flags[first:end] = [True] * (end - first)
    return flags
