"""KV cache events as TensorRT-LLM's manager V1 gives them out: they name groups by window.

The blocks that a window has lost are announced together: since spring 2026 right before its next ``stored``
event, at the latest at the end of the engine's step; in the 1.2 line each at once, but joined to the event
before it if that is of the same kind and window. There is no event when a block leaves its window, is copied
from or is taken over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..buffer import EventBuffer, stored_block, updated
from .tree import Node, Page


class EventLog:
    """Collects the events of an engine step, on top of a buffer that numbers them.

    :param at_once: announce losses as the 1.2 line does.
    """

    def __init__(self, buffer: EventBuffer, *, at_once: bool) -> None:
        self._buffer = buffer
        self._at_once = at_once
        # Groups as they were created: the smallest window first.
        self._groups: list[int] = []
        # By group: names of lost blocks, not announced yet or in the event that was added last.
        self._removed: dict[int, list[int | None]] = {}

    @property
    def dropped(self) -> int:
        return self._buffer.dropped

    def created(self, group_id: int, num_blocks: int, host_blocks: int) -> None:
        self._groups.append(group_id)
        levels = [num_blocks, host_blocks]
        self._add(group_id, {"type": "created", "num_blocks_per_cache_level": levels})

    def stored(self, group_id: int, parent_hash: int | None, blocks: Sequence[tuple[Node, Page]]) -> None:
        """Blocks of one sequence with their new pages; ``parent_hash`` is of the one before the first."""
        if not self._buffer.on:
            return
        if not self._at_once:
            self._announce_removed(group_id)
        entries = [
            stored_block(page.hash, node.tokens, node.cache_salt, page.slot.level) for node, page in blocks
        ]
        self._add(group_id, {"type": "stored", "parent_hash": parent_hash, "blocks": entries})

    def removed(self, group_id: int, name: int | None) -> None:
        """That window has lost the block of that name, from its last level."""
        if not self._buffer.on:
            return
        names = self._removed.get(group_id)
        if names is not None:
            names.append(name)
            return
        names = [name]
        if self._at_once:
            self._add(group_id, {"type": "removed", "block_hashes": names})
        self._removed[group_id] = names

    def moved(self, group_id: int, page: Page, from_level: int) -> None:
        """A block has moved to the level on which ``page`` is now."""
        self._add(group_id, updated(page.hash, from_level, page.slot.level))

    def flush(self) -> list[dict[str, Any]]:
        """All events since the last flush; the caller owns them."""
        if self._at_once:
            self._removed.clear()
        for group_id in self._groups:
            self._announce_removed(group_id)
        return self._buffer.take()

    def _announce_removed(self, group_id: int) -> None:
        names = self._removed.pop(group_id, None)
        if names is not None:
            self._buffer.add(group_id, {"type": "removed", "block_hashes": names})

    def _add(self, group_id: int, data: dict[str, Any]) -> None:
        if self._at_once:
            # What is lost from now on is not joined to what was announced before this event.
            self._removed.clear()
        self._buffer.add(group_id, data)
