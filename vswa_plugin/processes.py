"""Child processes with a log file each: start, wait until ready, stop. By PID, never by name."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from vswa_plugin.errors import ConnectError, VswaError

logger = logging.getLogger(__name__)


class ChildDied(VswaError):
    """A child process ended though nobody asked it to; the message ends with the tail of its log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on right now, below the usual ephemeral ranges.

    Not the kernel's choice: while a server is away, a client that tries again and again to reach an
    ephemeral port of this machine can be given that very port as its own, and then holds it.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Child:
    """One child process. Its standard output and error go to ``log_path``."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._process = process

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], log_dir: Path, env: Mapping[str, str] | None = None
    ) -> Child:
        """Start ``command``; ``env`` is added to ours. Raises OSError where it cannot be executed."""
        log_path = log_dir / f"{name}.log"
        with log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
                # Ctrl-C reaches the parent only, which stops its children in the right order.
                start_new_session=True,
            )
        return cls(name, process, log_path)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self, grace_s: float = 10.0) -> int:
        """SIGTERM, after ``grace_s`` SIGKILL; the exit code."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), grace_s)
            except TimeoutError:
                logger.warning("%s (pid %d) did not end in %g s: killed", self.name, self.pid, grace_s)
                self.kill()
        return await self._process.wait()

    def kill(self) -> None:
        """SIGKILL, as a crash would look."""
        if self._process.returncode is None:
            self._process.kill()

    def log_tail(self, lines: int = 15) -> str:
        text = self.log_path.read_text("utf-8", "replace")
        return "\n".join(text.splitlines()[-lines:])

    def check(self) -> None:
        """Raise ChildDied if the process has ended."""
        if self._process.returncode is not None:
            raise ChildDied(
                f"{self.name} ended with exit code {self._process.returncode}; the end of its log, "
                f"{self.log_path}:\n{self.log_tail()}"
            )

    async def until(self, ready: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
        """Return once ``ready`` says so; raises ChildDied or, after ``timeout_s``, ConnectError."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not await ready():
            self.check()
            if asyncio.get_running_loop().time() > deadline:
                raise ConnectError(f"{self.name}: not {what} after {timeout_s:g} s; see {self.log_path}")
            await asyncio.sleep(0.02)


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules with this interpreter."""
    return [sys.executable, "-m", module, *arguments]
