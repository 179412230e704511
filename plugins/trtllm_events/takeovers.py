"""Which blocks manager V1 takes over, without an event, for a prompt that goes on differently. Pure.

A block on which nothing hangs, and which no sequence holds, is not copied where its beginning is reused but
taken over: it is gone from its window then.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from .held import Held
from .prefixes import Prefix
from .searches import MAX_SEARCHED


def taken_over(
    prefix: Prefix,
    siblings: dict[Prefix, None],
    windows: Mapping[int, tuple[int | None, Held]],
    block_size: int,
) -> list[tuple[int, Prefix]]:
    """Blocks that seem to be taken over for ``prefix``, which is new, each with its group.

    That takes a sibling in every window, and all that each window needs before it: else the prompt was
    resumed at an earlier block, or at the edge before the siblings.

    :param siblings: behind the same block, ``prefix`` included, the youngest last.
    :param windows: by group, in tokens, None for the global one, each with what it holds.
    """
    closest = {group_id: _closest(prefix, siblings, held) for group_id, (_, held) in windows.items()}
    shared = min(most for _, most in closest.values())
    if not shared:
        return []
    *path, _ = prefix.path()
    resumed_at = len(path) * block_size + shared
    for window, held in windows.values():
        first = 0 if window is None else max(0, resumed_at - window) // block_size
        if any(held.name_of(each) is None for each in path[first:]):
            return []
    return [
        (group_id, sibling)
        for group_id, (sibling, _) in closest.items()
        if sibling is not None and not sibling.children
    ]


def _closest(prefix: Prefix, siblings: dict[Prefix, None], held: Held) -> tuple[Prefix | None, int]:
    """The sibling in a window that shares most leading tokens, the youngest of those, and how many."""
    closest, most = None, 0
    for sibling in islice(reversed(siblings), MAX_SEARCHED):
        if sibling is prefix or held.name_of(sibling) is None:
            continue
        shared = sibling.shared_tokens(prefix)
        if shared > most:
            closest, most = sibling, shared
    return closest, most
