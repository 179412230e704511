"""The life of one process of ours: the only place that handles signals, watches tasks and drains.

    starting ──► serving ──signal, or serve() returns──► leaving, draining ──► ended: exit code 0
       │            └──serve() raises, or a task ends unasked──► giving up ──► ended: raises, exit code 1
       └──signal──► ended: exit code 0

A second signal ends the draining. However it ends, :meth:`Program.end` is called once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from typing import Any

from vswa_plugin.errors import ConfigError, VswaError
from vswa_plugin.program.run import record_end
from vswa_plugin.program.status import Status
from vswa_plugin.tasks import Tasks

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: How long the end of a program that has failed may take.
END_TIMEOUT_S = 20.0
#: How much of it the plugins have, together, to end in order.
PLUGINS_END_S = 5.0


class Failed(VswaError):
    """The program cannot go on: exit code 1, so that whoever runs it starts it again."""


class Program:
    """What a process does in each part of its life. Each method does nothing unless overridden."""

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return 0

    async def start(self) -> None:
        """Connect and begin to serve; long-lived tasks go to ``life.tasks``. Raises what is wrong."""

    async def serve(self) -> None:
        """Run until there is nothing left to do; raises :class:`Failed` where it cannot go on."""
        await asyncio.Event().wait()

    async def leave(self) -> None:
        """Take no new requests. Not interrupted."""

    async def drain(self) -> None:
        """Return when the requests under way have ended, or after a time-out. A second signal cancels it."""

    async def give_up(self, reason: str) -> None:
        """The program has failed: requests under way shall go on elsewhere."""

    def hurry(self) -> None:
        """A second signal came, and any after it."""

    async def end(self) -> None:
        """Give back whatever was reached."""


class Life:
    """One process from its start to its exit code.

    :param name: of the program, for messages.
    :ivar tasks: each long-lived task of the process; one that ends unasked ends the process.
    :ivar status: what the process says of itself; ``ready`` while it serves.
    :ivar stopped_by: the signal that has ended it, if one has.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tasks = Tasks()
        self.status = Status(tasks=lambda: self.tasks.names)
        self.stopped_by: signal.Signals | None = None
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self._signals: list[signal.Signals] = []
        self._watchdog: threading.Timer | None = None

    async def run(self, program: Program) -> int:
        """Live until SIGTERM, SIGINT, SIGHUP or the end of the work (0).

        :raises Failed: the work or a watched task has ended with an error; ConfigError: because of a setting.
        :raises Exception: what :meth:`Program.start` raises.
        """
        self._listen(program)
        try:
            if not await self._unless_stopped(program.start(), "start"):
                logger.info("stopping before the start was complete")
                return 0
            self.status.ready = True
            try:
                await self._unless_stopped(program.serve(), "serve")
            except (Failed, ConfigError) as error:
                await self._give_up(program, str(error))
                raise
            await self._drain(program)
            return 0
        finally:
            self.status.ready = False
            try:
                await program.end()
            finally:
                await self.tasks.stop()
                self._unlisten()
                if self._watchdog is not None:
                    self._watchdog.cancel()

    def _listen(self, program: Program) -> None:
        def signalled(number: signal.Signals) -> None:
            if self._stopping.is_set():
                self._hurried.set()
                program.hurry()
            else:
                self.stopped_by = number
            self._stopping.set()

        # nohup has SIGHUP ignored: then the end of the terminal is not to end the program.
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._signals = [each for each in _SIGNALS if not (nohup and each is signal.SIGHUP)]
        for number in self._signals:
            asyncio.get_running_loop().add_signal_handler(number, signalled, number)

    def _unlisten(self) -> None:
        for number in self._signals:
            asyncio.get_running_loop().remove_signal_handler(number)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None], name: str) -> bool:
        """Whether ``work`` was done before a signal came; else it is cancelled.

        :raises Failed: a watched task has ended; ConfigError: because of a setting.
        """
        working = asyncio.create_task(work, name=name)
        stopped = asyncio.create_task(self._stopping.wait())
        failed = asyncio.create_task(self.tasks.failed())
        try:
            await asyncio.wait((working, stopped, failed), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return True
            if failed.done() and not stopped.done():
                ended = failed.result()
                if isinstance(ended.__cause__, ConfigError):
                    raise ended.__cause__
                raise Failed(str(ended)) from ended
            return False
        finally:
            for task in (working, stopped, failed):
                task.cancel()
            await asyncio.gather(working, stopped, failed, return_exceptions=True)

    async def _drain(self, program: Program) -> None:
        self.status.ready = False
        logger.info("stopping: no new requests, waiting for %d under way", program.in_flight)
        await program.leave()
        draining = asyncio.create_task(program.drain(), name="drain")
        hurried = asyncio.create_task(self._hurried.wait())
        try:
            await asyncio.wait((draining, hurried), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (draining, hurried):
                task.cancel()
            await asyncio.gather(draining, hurried, return_exceptions=True)
        if not draining.cancelled():
            draining.result()
        if (ended := self.tasks.ended) is not None:
            logger.warning("while draining, %s", ended)
        if program.in_flight:
            logger.warning("%d requests are cancelled: not done in time", program.in_flight)

    async def _give_up(self, program: Program, reason: str) -> None:
        logger.error("giving up: %s", reason)
        self.status.failure = reason
        self._watchdog = end_at_any_rate(self.name, reason)
        await program.give_up(reason)


def end_at_any_rate(name: str, reason: str) -> threading.Timer:
    """End the process in :data:`END_TIMEOUT_S`, should it still be there: a failed one that hangs in its end,
    in that of an engine above all, would never be started again.

    :returns: a timer, to be cancelled where the end has come.
    """

    def end() -> None:
        message = f"{reason}; its end took longer than {END_TIMEOUT_S:g} s"
        sys.stderr.write(f"{name}: failed: {message}\n")
        sys.stderr.flush()
        record_end(message)
        os._exit(1)

    timer = threading.Timer(END_TIMEOUT_S, end)
    timer.daemon = True
    timer.start()
    return timer
