"""Child processes with a log file each: start, wait until ready, keep alive, stop. By PID, never by name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vswa_plugin.errors import ConfigError, ConnectError, VswaError
from vswa_plugin.launch.logs import TAIL_BYTES, ChildLog
from vswa_plugin.launch.scratch import end_group
from vswa_plugin.program.addresses import check_address
from vswa_plugin.program.disk import why_full
from vswa_plugin.program.run import MESSAGE_BYTES, TERMINATION_ENV, USER_ERROR

logger = logging.getLogger(__name__)

#: Between two looks at whether a child is ready.
FIRST_PAUSE_S, MOST_PAUSE_S = 0.01, 0.25


class ChildDied(VswaError):
    """A child process ended unexpectedly; the message ends with the tail of its log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that no process listens on right now, below the usual ephemeral ranges.

    Not the kernel's choice: while a server is away, a client that tries again and again to reach an
    ephemeral port of this machine can be given that very port as its own, and then holds it.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(ConfigError):  # it is taken
            check_address("127.0.0.1", port)
            return port


@dataclass
class BackOff:
    """Pauses before starts: 1, 2, 4 ... 30 seconds; from the first again after a life of ``lived_s``."""

    first_s: float = 1.0
    most_s: float = 30.0
    lived_s: float = 60.0
    _last_s: float = 0.0

    def pause(self, lived_s: float) -> float:
        """Seconds to wait after a life of ``lived_s``."""
        fresh = not self._last_s or lived_s >= self.lived_s
        self._last_s = self.first_s if fresh else min(2 * self._last_s, self.most_s)
        return self._last_s


class Child:
    """One child process, or one after the other where it is kept.

    Their output goes to ``log_path``; why it ends, a program of ours writes to NAME.termination beside it.

    :ivar env: what the process has in its environment besides ours.
    """

    def __init__(self, name: str, command: Sequence[str], log_path: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.log_path = log_path
        # Absolute: the process may work in another directory.
        self._termination_path = log_path.with_name(f"{name}.termination").resolve()
        self.env = {**env, TERMINATION_ENV: str(self._termination_path)}
        self._command = command
        self._log = ChildLog(log_path)
        self._process: asyncio.subprocess.Process
        self._life: asyncio.Task[int]
        self._born_at = 0.0
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._starting = asyncio.Lock()

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], log_dir: Path, env: Mapping[str, str] | None = None
    ) -> Child:
        """Start ``command``; ``env`` is added to ours. Raises OSError where it cannot be executed."""
        child = cls(name, command, log_dir / f"{name}.log", env or {})
        await child._start()
        return child

    async def _start(self) -> None:
        async with self._starting:
            self._termination_path.unlink(missing_ok=True)  # an earlier life's is no reason of this one
            with self._log.begin_life() as log:
                self._born_at = time.monotonic()
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **self.env},
                    # Ctrl-C reaches the parent only, which stops its children in the right order.
                    start_new_session=True,
                )
                self._life = asyncio.create_task(_to_its_end(self._process), name=f"life of {self.name}")

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Return the exit code once the process and what it had started have ended."""
        return await asyncio.shield(self._life)

    def keep(self, say: Callable[[str], None], back_off: BackOff | None = None) -> None:
        """Start the process again whenever it fails, until :meth:`stop`; ``say`` gets a line each time.

        An exit with code 0 was requested and stands. One with 2 is the user's to correct: then
        :meth:`check` and :meth:`over` raise ConfigError with what the process said.
        """
        self._keeper = asyncio.create_task(self._keep(say, back_off or BackOff()), name=f"keep {self.name}")

    async def _keep(self, say: Callable[[str], None], back_off: BackOff) -> None:
        while True:
            code = await self.wait()
            if self._stopping.is_set():
                return
            if code == 0:
                say(f"{self.name} ended on request and is not started again")
                return
            if code == USER_ERROR:  # starting it again would change nothing
                raise ConfigError(f"{self.name}: {self.last_words()}")
            pause = back_off.pause(time.monotonic() - self._born_at)
            words = self.last_words().splitlines()[0]
            # A signal leaves no time to state a reason: the last words may be about something else.
            between = ":" if code > 0 else ", its last words:"
            say(f"{self.name} {_ended(code)}{between} {words}; starting it again in {pause:g} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            if self._stopping.is_set():  # also where it was set as the pause ended
                return
            await self._start()

    async def over(self) -> None:
        """Return once the process has ended and is not started again; raises as :meth:`keep` says."""
        await (self.wait() if self._keeper is None else asyncio.shield(self._keeper))

    async def stop(self, grace_s: float = 10.0) -> int:
        """SIGTERM, after ``grace_s`` SIGKILL; the exit code."""
        self._stopping.set()
        async with self._starting:  # a process that is just being started is there after this
            self.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            logger.warning("%s (pid %d) did not end in %g s: killed", self.name, self.pid, grace_s)
            self.kill()
        if self._keeper is not None:
            await asyncio.gather(self._keeper, return_exceptions=True)
        return await self.wait()

    def terminate(self) -> None:
        """SIGTERM, as an operator would send it."""
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, as a crash would look."""
        if self._process.returncode is None:
            self._process.kill()

    def log(self, at_most: int = 1 << 20) -> str:
        """The last ``at_most`` bytes of what the present process has written."""
        return self._log.tail(at_most)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the present process, to be shown to a person, never to be parsed."""
        return "\n".join(self.log(TAIL_BYTES).splitlines()[-lines:])

    def last_words(self) -> str:
        """Why the process has ended: the message that it left, else the last line of its log."""
        try:
            with self._termination_path.open("rb") as file:
                message = file.read(MESSAGE_BYTES).decode("utf-8", "replace").strip()
        except FileNotFoundError:  # no program of ours, or it was killed
            message = ""
        lines = [line for line in self.log_tail().splitlines() if line.strip()]
        if full := why_full(self.log_path.parent):  # and what it has written last may be missing
            return "; ".join((message or (lines[-1].strip() if lines else "it could write nothing"), full))
        return message or (lines[-1].strip() if lines else "it wrote nothing")

    def bound_log(self, most_bytes: int) -> bool:
        """See :meth:`ChildLog.rotate`; for a thread."""
        return self._log.rotate(most_bytes)

    def check(self) -> None:
        """Raise ChildDied if the process has ended for good, or what :meth:`keep` says."""
        if self._keeper is not None:
            if not self._keeper.done():
                return
            self._keeper.result()
        if self._process.returncode is not None:
            ended = f"{self.name} {_ended(self._process.returncode)}"
            if full := why_full(self.log_path.parent):
                ended += f"; {full}"
            raise ChildDied(f"{ended}; the end of its log, {self.log_path}:\n{self.log_tail()}")

    async def until(self, ready: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
        """Return once ``ready`` says so; raises ChildDied or, after ``timeout_s``, ConnectError."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        pause = FIRST_PAUSE_S
        while not await ready():
            self.check()
            if loop.time() > deadline:
                raise ConnectError(f"{self.name}: not {what} after {timeout_s:g} s; see {self.log_path}")
            await asyncio.sleep(pause)
            pause = min(1.3 * pause, MOST_PAUSE_S)


async def _to_its_end(process: asyncio.subprocess.Process) -> int:
    """The exit code of ``process``, once nothing is left of its group either: an engine's own process that
    outlives the worker would keep its memory, and its GPU, from the next one.
    """
    code = await process.wait()
    await asyncio.to_thread(end_group, process.pid)
    return code


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by {signal.Signals(-code).name}"


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules with this interpreter."""
    return [sys.executable, "-m", module, *arguments]
