"""Events as TensorRT-LLM writes them, and an adapter that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import EngineEvent

DATA = Path(__file__).parent / "data"
LAYOUT = CacheLayout((CacheGroup(0, 8, 4), CacheGroup(1, None, 4)), "trtllm_v2", "m")


class Engine:
    """Writes events with ids that count up, as the engine does."""

    def __init__(self) -> None:
        self.next_id = 0

    def event(self, data: dict[str, Any], group: int | None = 0, **extra: Any) -> dict[str, Any]:
        event: dict[str, Any] = {"event_id": self.next_id, "data": data, "hash_algo": "v1_block_key"}
        if group is not None:
            event |= {"layer_group_id": group, "window_size": [8, 8192][group]}
        self.next_id += 1
        return event | extra

    def stored(
        self, parent: Any, *blocks: dict[str, Any], group: int | None = 0, **extra: Any
    ) -> dict[str, Any]:
        return self.event({"type": "stored", "parent_hash": parent, "blocks": list(blocks)}, group, **extra)

    def removed(self, *hashes: Any, group: int | None = 0, **extra: Any) -> dict[str, Any]:
        return self.event({"type": "removed", "block_hashes": list(hashes)}, group, **extra)

    def updated(self, block_hash: Any, level: Any, group: int | None = 0) -> dict[str, Any]:
        data = {"type": "updated", "block_hash": block_hash, "cache_level": level, "priority": None}
        return self.event(data, group)

    def created(self, window: int, group: int | None = None) -> dict[str, Any]:
        data = {"type": "created", "num_blocks_per_cache_level": [5]}
        return self.event(
            data, None, window_size=window, **({} if group is None else {"layer_group_id": group})
        )


def block(name: Any, token_ids: list[Any], **extra: Any) -> dict[str, Any]:
    tokens = [{"type": "unique_token", "token_id": t, "token_extra_id": 0} for t in token_ids]
    return {
        "type": "stored_block",
        "block_hash": name,
        "tokens": tokens,
        "cache_level": 0,
        "priority": 35,
        "mm_keys": [],
    } | extra


# Imported as `x as x`: pytest finds a fixture by its name in the module, ruff sees that it is meant.
@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def adapter() -> TrtllmEventAdapter:
    return TrtllmEventAdapter(LAYOUT)


def feed(adapter: TrtllmEventAdapter, *events: dict[str, Any]) -> list[EngineEvent]:
    return [told for event in events for told in adapter.feed(event)]


ONE, TWO = [1, 2, 3, 4], [5, 6, 7, 8]
