"""TensorRT-LLM's KV event objects, numbered and buffered. Which events there are is each manager's own."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from .api import DEVICE
from .hashing import HASH_ALGO

logger = logging.getLogger(__name__)

PRIORITY = 35


class EventBuffer:
    """Events between two flushes. Ids count up by one over all groups.

    :param windows: group id -> window_size in tokens as events give it (global: the longest sequence).
    :param max_size: events kept; over it the oldest are lost, which shows as a skip of ids. 0: no events.
    :param dp_rank: of an engine with several ranks; None leaves the field out.
    :param layer_groups: whether events name their layer group, as manager V2's do.
    """

    def __init__(
        self,
        windows: Mapping[int, int],
        max_size: int,
        *,
        dp_rank: int | None = None,
        layer_groups: bool = True,
    ) -> None:
        self._windows = dict(windows)
        self._max_size = max_size
        self._common: dict[str, Any] = {} if dp_rank is None else {"attention_dp_rank": dp_rank}
        if layer_groups:
            self._common["hash_algo"] = HASH_ALGO
        self._layer_groups = layer_groups
        self._next_id = 0
        self._events: deque[dict[str, Any]] = deque()
        self.dropped = 0

    @property
    def on(self) -> bool:
        return self._max_size > 0

    def add(self, group_id: int, data: dict[str, Any]) -> None:
        """Number one event; ``data`` may still grow until the flush."""
        if not self._max_size:
            return
        event = {
            "event_id": self._next_id,
            "data": data,
            "window_size": self._windows[group_id],
            **self._common,
        }
        if self._layer_groups:
            event["layer_group_id"] = group_id
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

    def take(self) -> list[dict[str, Any]]:
        """All events since the last call; the caller owns them."""
        events = list(self._events)
        self._events.clear()
        return events


def stored_block(
    block_hash: int | None, tokens: Sequence[int], cache_salt: str | None = None, level: int = DEVICE
) -> dict[str, Any]:
    """One entry of a ``stored`` event."""
    block: dict[str, Any] = {
        "type": "stored_block",
        "block_hash": block_hash,
        "tokens": [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens],
        "cache_level": level,
        "priority": PRIORITY,
        "mm_keys": [],
    }
    if cache_salt is not None:
        block["cache_salt"] = cache_salt
    return block


def updated(block_hash: int | None, old_level: int, new_level: int) -> dict[str, Any]:
    """Data of an ``updated`` event: a block has moved between levels."""
    return {
        "type": "updated",
        "block_hash": block_hash,
        "cache_level": {"type": "event_diff", "new_value": new_level, "old_value": old_level},
        "priority": None,
    }
