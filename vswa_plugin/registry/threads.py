"""One thread for calls that block: they run one after the other, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class SerialThread:
    """Starts with the first call and ends with :meth:`close`, after which it may be used again."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._executor: ThreadPoolExecutor | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """The result of ``call``. Cancelled while it runs, it runs on; later calls wait for its end."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def close(self) -> None:
        """Return when the calls under way have ended and the thread with them."""
        if self._executor is None:
            return
        executor, self._executor = self._executor, None
        await asyncio.get_running_loop().run_in_executor(executor, _nothing)
        executor.shutdown()


def _nothing() -> None:
    """Behind all other calls in the queue: when it is done, so are they."""
