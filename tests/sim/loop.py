"""An event loop whose clock jumps to the next timer. It reads no file and waits for nothing."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any


class _NoFiles(selectors.BaseSelector):
    """Where a loop would wait for a timer, the time of that is added to :attr:`passed` instead."""

    def __init__(self) -> None:
        self.passed = 0.0
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the simulation stands still: nothing is scheduled, and nobody runs")
        self.passed += max(0.0, timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """:ivar suspended: seconds during which nothing ran though they passed."""

    def __init__(self) -> None:
        self._files = _NoFiles()
        self.suspended = 0.0
        super().__init__(self._files)

    def time(self) -> float:
        return 1000.0 + self._files.passed

    @property
    def active(self) -> float:
        """The time in which processes could run."""
        return self.time() - self.suspended

    def suspend(self, seconds: float) -> None:
        """The machine sleeps: all timers that are due meanwhile are late."""
        self._files.passed += seconds
        self.suspended += seconds

    def _write_to_self(self) -> None:
        """Nobody waits, so nobody needs to be woken."""
