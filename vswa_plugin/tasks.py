"""Long-lived tasks that somebody watches: none ends without its reason being known.

A component starts its tasks in the group that it is given; whoever made the group waits for
:meth:`Tasks.failed`. In a program of ours that is its life (program/life.py), which then ends the process
with the reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

logger = logging.getLogger(__name__)


class TaskEnded(Exception):
    """A task that should have run until it was stopped has ended; the message says which one and why."""


class Tasks:
    """A group of tasks that run until they are stopped. Event loop only."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], str] = {}
        self._ended: TaskEnded | None = None
        self._waiting: list[asyncio.Future[TaskEnded]] = []

    @property
    def names(self) -> list[str]:
        """The names of the tasks that run, sorted."""
        return sorted(task.get_name() for task in self._running)

    @property
    def ended(self) -> TaskEnded | None:
        """The first task that ended though nobody stopped it; None where there is none."""
        return self._ended

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run ``work`` in a task of that name until it is stopped."""
        return self.watch(asyncio.get_running_loop().create_task(work, name=name))

    def watch(self, task: asyncio.Task[Any], hint: str = "") -> asyncio.Task[Any]:
        """Watch a task that somebody else has made.

        :param hint: what is added to the reason, should it end: the likely cause.
        """
        self._running[task] = hint
        task.add_done_callback(self._done)
        return task

    async def stop(self, tasks: Iterable[asyncio.Task[Any]] | None = None) -> None:
        """Cancel these tasks, or all, and return when they have ended. What they raise is logged."""
        chosen = list(self._running if tasks is None else tasks)
        for task in chosen:
            self._running.pop(task, None)
            task.cancel()
        for outcome in await asyncio.gather(*chosen, return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.warning("a task failed as it was stopped: %s", _said(outcome))

    async def failed(self) -> TaskEnded:
        """Wait for the first task that ends though nobody stopped it; returns why."""
        if self._ended is not None:
            return self._ended
        waiting: asyncio.Future[TaskEnded] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            return await waiting
        finally:
            self._waiting.remove(waiting)

    def _done(self, task: asyncio.Task[Any]) -> None:
        hint = self._running.pop(task, None)
        if hint is None:  # stopped, and whoever stopped it has seen its error
            return
        ended = TaskEnded(f"{task.get_name()} ended unexpectedly ({_why(task)}){hint and '; ' + hint}")
        if not task.cancelled():
            ended.__cause__ = task.exception()
        if self._ended is None:
            self._ended = ended
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(self._ended)


def _why(task: asyncio.Task[Any]) -> str:
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    return "no error given" if error is None else _said(error)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
