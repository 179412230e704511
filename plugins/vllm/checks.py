"""What vLLM says of its cache groups, compared with the layout that was declared before it started. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vswa_plugin.blocks import FULL, RECURRENT, CacheGroup, CacheLayout
from vswa_plugin.errors import shown

_SLIDING_KINDS = ("sliding_window", "sliding_window_mla")
_STATE_KIND = "mamba"
_WINDOW = "kv_cache_spec_sliding_window"


class LayoutCheck:
    """Compares stored blocks with the declared groups; each statement once, since all events repeat it."""

    def __init__(self, layout: CacheLayout) -> None:
        self._groups = {group.group_id: group for group in layout.groups}
        self._unit = layout.hash_block_size
        self._seen: set[tuple[Any, ...]] = set()

    def contradiction(self, event: object) -> str | None:
        """What ``event`` says against the layout; None where nothing, or where it cannot be read."""
        if not isinstance(event, Mapping) or event.get("type") != "BlockStored":
            return None
        kind = event.get("kv_cache_spec_kind")
        says = (event.get("group_idx"), kind, event.get(_WINDOW), event.get("block_size"))
        try:
            if says in self._seen:
                return None
        except TypeError:  # the adapter of events refuses what has such values
            return None
        wrong = self._compare(*says)
        if wrong is None:
            self._seen.add(says)
        return wrong

    def _compare(self, number: object, kind: object, window: object, block_size: object) -> str | None:
        if number is None and len(self._groups) == 1:
            number = next(iter(self._groups))
        group = self._groups.get(number) if isinstance(number, int) else None
        if group is None:
            return f"expected events of cache groups {sorted(self._groups)}, got some of {shown(number)}"
        if block_size != group.block_size and not self._is_end_of_prompt(group, block_size):
            return (
                f"cache group {number}: expected blocks of {group.block_size} tokens, got blocks of "
                f"{shown(block_size)}"
            )
        if kind is None:
            return None
        if (kind == _STATE_KIND) != (group.kind == RECURRENT):
            return f"cache group {number}: expected window {group.label}, got the kind {shown(kind)}"
        if kind not in _SLIDING_KINDS:
            # A layer with a window may be kept as if it had none, and still name its window.
            window = None
        if window != group.window_size:
            got = "global attention" if window is None else f"a window of {shown(window)} tokens"
            return f"cache group {number}: expected window {group.label}, got {got}"
        return None

    def _is_end_of_prompt(self, group: CacheGroup, block_size: object) -> bool:
        """A full group with larger blocks also stores the end of a prompt, as an entry of one hash unit."""
        return group.kind == FULL and block_size == self._unit
