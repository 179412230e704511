"""KV cache events as TensorRT-LLM's manager V2 gives them out (JSON objects as dicts).

Ids count up by one over all groups. ``stored`` blocks of one group grow into one event as long as each
hangs on the last and nothing was removed since; ``removed`` blocks wait, per group, for the next stored
block or the flush. Nothing is told when a block leaves its window: its page can still be reused.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

from .hashing import HASH_ALGO
from .tree import Node

logger = logging.getLogger(__name__)

_DEVICE = 0
_PRIORITY = 35


class EventLog:
    """Collects the events of an engine step.

    :param groups: (group_id, window_size in tokens; for global attention the longest sequence) in the
        order in which groups are announced.
    :param max_size: events kept; over it the oldest are lost, which shows as a skip of ids. 0: no events.
    """

    def __init__(self, groups: Sequence[tuple[int, int]], max_size: int) -> None:
        self._windows = dict(groups)
        self._max_size = max_size
        self._next_id = 0
        self._events: deque[dict[str, Any]] = deque()
        self._open: dict[int, list[dict[str, Any]]] = {}
        self._last_hash: dict[int, int | None] = {}
        self._removed: dict[int, list[int | None]] = {}
        self.dropped = 0

    def created(self, group_id: int, num_blocks: int) -> None:
        self._add(group_id, {"type": "created", "num_blocks_per_cache_level": [num_blocks]})

    def stored(self, group_id: int, node: Node) -> None:
        """``node`` has a page in that group now."""
        if not self._max_size:
            return
        self._close_removed()
        parent_hash = node.parent.hash if node.parent is not None else None
        blocks = self._open.get(group_id)
        if blocks is None or self._last_hash[group_id] != parent_hash:
            blocks = self._open[group_id] = []
            self._add(group_id, {"type": "stored", "parent_hash": parent_hash, "blocks": blocks})
        blocks.append(_stored_block(node))
        self._last_hash[group_id] = node.hash

    def removed(self, group_id: int, node: Node) -> None:
        """``node`` has lost its page in that group."""
        if self._max_size:
            self._removed.setdefault(group_id, []).append(node.hash)

    def flush(self) -> list[dict[str, Any]]:
        """All events since the last flush; the caller owns them."""
        self._close_removed()
        self._open.clear()
        events = list(self._events)
        self._events.clear()
        return events

    def _close_removed(self) -> None:
        if not self._removed:
            return
        for group_id in sorted(self._removed):
            self._add(group_id, {"type": "removed", "block_hashes": self._removed[group_id]})
        self._removed = {}
        # A block stored from here on must not slip into an event before its own removal.
        self._open.clear()

    def _add(self, group_id: int, data: dict[str, Any]) -> None:
        if not self._max_size:
            return
        event = {
            "event_id": self._next_id,
            "data": data,
            "window_size": self._windows[group_id],
            "hash_algo": HASH_ALGO,
            "layer_group_id": group_id,
        }
        self._next_id += 1
        self._events.append(event)
        if len(self._events) > self._max_size:
            self._events.popleft()
            if not self.dropped:
                logger.warning(
                    "KV events are lost: more than event_buffer_max_size=%d between two flushes; raise it",
                    self._max_size,
                )
            self.dropped += 1


def _stored_block(node: Node) -> dict[str, Any]:
    block: dict[str, Any] = {
        "type": "stored_block",
        "block_hash": node.hash,
        "tokens": [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in node.tokens],
        "cache_level": _DEVICE,
        "priority": _PRIORITY,
        "mm_keys": [],
    }
    if node.cache_salt is not None:
        block["cache_salt"] = node.cache_salt
    return block
