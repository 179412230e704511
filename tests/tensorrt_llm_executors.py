"""How the 1.1 and 1.2 lines of TensorRT-LLM give out events: by a queue in the caller's process.

The queue is made by whoever comes first. In a thread with a running event loop it becomes one that only a
coroutine can read: the synchronous call gets None from it, which is not JSON.
"""

from __future__ import annotations

import asyncio
import json
import queue
import time
from typing import Any

from tests.tensorrt_llm_package import LLM


class LoopQueue:
    """As much as the synchronous call sees of the queue for coroutines."""

    def __init__(self) -> None:
        self._items: list[str] = []

    def put(self, item: str) -> None:
        self._items.append(item)

    def get(self, timeout: float) -> str | None:
        end = time.time() + timeout
        while time.time() < end:
            if self._items:
                return self._items.pop(0)
        return None


class IterationResult:
    def __init__(self) -> None:
        self._done = False
        self._timeout = 2.0
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.queue: Any = queue.Queue()
        else:
            self.queue = LoopQueue()

    def set_timeout(self, timeout: float) -> None:
        self._timeout = timeout

    def mark_undone(self) -> None:
        self._done = False

    def get_results(self) -> list[dict[str, Any]]:
        results = []
        while not self._done:
            try:
                results.append(json.loads(self.queue.get(timeout=self._timeout)))
            except queue.Empty:
                self._done = True
        return results


class QueueExecutor:
    def __init__(self) -> None:
        self._iter_kv_events_result: IterationResult | None = None

    def _maybe_initialize_iteration_results(self) -> None:
        if self._iter_kv_events_result is None:
            self._iter_kv_events_result = IterationResult()
        else:
            self._iter_kv_events_result.mark_undone()

    def get_kv_events(self, timeout: float) -> list[dict[str, Any]]:
        assert self._iter_kv_events_result is not None, (
            "KV Event IterationResult is not properly instantiated."
        )
        self._iter_kv_events_result.set_timeout(timeout)
        return self._iter_kv_events_result.get_results()

    def is_shutdown(self) -> bool:
        return False


class QueueLLM(LLM):
    """Of a release with a queue, which is filled from the first request on."""

    _check_health = None  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._executor = QueueExecutor()
        self._asked = False
        super().__init__(*args, **kwargs)

    def generate_async(self, *args: Any, **kwargs: Any) -> Any:
        self._executor._maybe_initialize_iteration_results()
        self._asked = True
        return super().generate_async(*args, **kwargs)

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        assert timeout is not None
        return self._executor.get_kv_events(timeout)

    def collect(self) -> None:
        super().collect()
        results = self._executor._iter_kv_events_result
        if self._asked and results is not None:
            events, self._events = self._events, []
            for event in events:
                results.queue.put(json.dumps(event))
