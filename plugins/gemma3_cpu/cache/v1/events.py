"""KV cache events as TensorRT-LLM's manager V1 gives them out: they name groups by window. Read, not run.

``removed`` blocks of one window merge into one event until another event of that window. There is no event
when a block leaves its window or is copied from: its page can still be reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..buffer import EventBuffer, stored_block, updated
from .tree import Node, Page


class EventLog:
    """Collects the events of an engine step, on top of a buffer that numbers them."""

    def __init__(self, buffer: EventBuffer) -> None:
        self._buffer = buffer
        self._open: dict[int, list[int | None]] = {}

    @property
    def dropped(self) -> int:
        return self._buffer.dropped

    def created(self, group_id: int, num_blocks: int, host_blocks: int) -> None:
        levels = [num_blocks, host_blocks]
        self._buffer.add(group_id, {"type": "created", "num_blocks_per_cache_level": levels})

    def stored(self, group_id: int, parent_hash: int | None, run: Sequence[tuple[Node, Page]]) -> None:
        """``run``: blocks that each hang on the one before, with their new pages."""
        self._open.pop(group_id, None)
        if not self._buffer.on:
            return
        blocks = [
            stored_block(page.hash, node.tokens, node.cache_salt, page.slot.level) for node, page in run
        ]
        data: dict[str, Any] = {"type": "stored", "parent_hash": parent_hash, "blocks": blocks}
        self._buffer.add(group_id, data)

    def removed(self, group_id: int, name: int | None) -> None:
        """That window has lost the block of that name, from its last level."""
        names = self._open.get(group_id)
        if names is None:
            names = self._open[group_id] = []
            self._buffer.add(group_id, {"type": "removed", "block_hashes": names})
        names.append(name)

    def moved(self, group_id: int, page: Page, from_level: int) -> None:
        """A block has moved to the level on which ``page`` is now."""
        self._open.pop(group_id, None)
        self._buffer.add(group_id, updated(page.hash, from_level, page.slot.level))

    def flush(self) -> list[dict[str, Any]]:
        """All events since the last flush; the caller owns them."""
        self._open.clear()
        return self._buffer.take()
