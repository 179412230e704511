"""KV cache events as TensorRT-LLM's manager V2 gives them out (JSON objects as dicts).

Ids count up by one over all groups. ``stored`` blocks of one group grow into one event while each hangs on
the last; ``removed`` blocks wait, per group, for the next event of another kind or the flush. There is no
event when a block leaves its window: its page can still be reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..buffer import EventBuffer, stored_block, updated
from .tree import Node


class EventLog:
    """Collects the events of an engine step.

    :param group_ids: by group index.
    :param num_blocks: per level, as ``created`` gives it for every group.
    """

    def __init__(self, buffer: EventBuffer, group_ids: Sequence[int], num_blocks: Sequence[int]) -> None:
        self.buffer = buffer
        self._ids = list(group_ids)
        self._growing: dict[int, dict[str, Any]] = {}
        self._removed: dict[int, list[int | None]] = {}
        for group_id in sorted(group_ids):
            buffer.add(group_id, {"type": "created", "num_blocks_per_cache_level": list(num_blocks)})

    def stored(self, node: Node, groups: Sequence[int]) -> None:
        """``node`` has a page in these groups now, which are given in the order of their ids."""
        if not self.buffer.on:
            return
        # The groups' events differ in nothing here, so one object stands in all of them.
        block = stored_block(node.hash, node.tokens, node.cache_salt)
        for g in groups:
            self._stored(self._ids[g], node.parent_hash, block)

    def removed(self, node: Node, g: int) -> None:
        """``node`` has lost its last page in that group."""
        if self.buffer.on:
            group_id = self._ids[g]
            self._removed.setdefault(group_id, []).append(node.hash)
            self._growing.pop(group_id, None)

    def updated(self, node: Node, g: int, old_level: int, new_level: int) -> None:
        """The page of ``node`` in that group has moved."""
        if self.buffer.on:
            self._close_all_removed()
            self._growing.pop(self._ids[g], None)
            self.buffer.add(self._ids[g], updated(node.hash, old_level, new_level))

    def flush(self) -> list[dict[str, Any]]:
        """All events since the last flush; the caller owns them."""
        self._close_all_removed()
        self._growing.clear()
        return self.buffer.take()

    def _stored(self, group_id: int, parent_hash: int | None, block: dict[str, Any]) -> None:
        self._close_removed(group_id)
        data = self._growing.get(group_id)
        if not self._removed and data is not None and data["blocks"][-1]["block_hash"] == parent_hash:
            data["blocks"].append(block)
            return
        self._close_all_removed()
        data = self._growing[group_id] = {"type": "stored", "parent_hash": parent_hash, "blocks": [block]}
        self.buffer.add(group_id, data)

    def _close_all_removed(self) -> None:
        for group_id in list(self._removed):
            self._close_removed(group_id)

    def _close_removed(self, group_id: int) -> None:
        hashes = self._removed.pop(group_id, None)
        if hashes:
            self.buffer.add(group_id, {"type": "removed", "block_hashes": hashes})
