"""A running ``python -m vswa_plugin.launch``, seen from outside."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e_helpers import eventually
from vswa_plugin.launch.processes import Child, python_module

STANDIN = "vswa_plugin.testing.engine"
REAPER = "vswa_plugin.launch.reaper"


def alive(pid: int) -> bool:
    """Whether that process runs; one that has ended and is not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> dict[str, int]:
    """Child processes by the name of their module or program, without that which cleans up after a kill."""
    found = {}
    for each in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            command = (each / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if parent == pid and REAPER not in command:
            mode = command[command.index("--mode") + 1] if "--mode" in command else ""
            found[mode or (command[2] if command[1] == "-m" else Path(command[0]).name)] = int(each.name)
    return found


class Launched:
    """A running ``python -m vswa_plugin.launch``."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.children: dict[str, int] = {}

    async def serving(self) -> None:
        await eventually(lambda: self._checked() and "Ctrl-C stops" in self.child.log(), "it serves", 30)
        self.children = children_of(self.child.pid)

    def _checked(self) -> bool:
        self.child.check()
        return True

    @property
    def url(self) -> str:
        return re.findall(r"Serving '\w+' on (http://[\d.:]+);", self.child.log())[-1]

    async def ask(self, max_tokens: int = 3) -> tuple[int, Any]:
        body = {"model": "gemma", "prompt": "Hello there", "max_tokens": max_tokens}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.url}/v1/completions", json=body) as answer,
        ):
            return answer.status, await answer.json()

    async def answered(self) -> bool:
        try:
            return (await self.ask())[0] == 200
        except aiohttp.ClientError:
            return False


@asynccontextmanager
async def running(
    folder: Path, command: list[str], env: dict[str, str] | None = None
) -> AsyncIterator[Launched]:
    """``command``, which must end with one of our exit codes and leave none of its children behind."""
    it = Launched(await Child.start("launch", command, folder, env))
    try:
        yield it
    finally:
        code = await it.child.stop(30)
        assert code in (0, 1, 2), it.child.log()
        assert not [name for name, pid in it.children.items() if alive(pid)], it.child.log()


@asynccontextmanager
async def launched(
    folder: Path, model_dir: Path, topology: str, *options: str, env: dict[str, str] | None = None
) -> AsyncIterator[Launched]:
    command = python_module("vswa_plugin.launch", topology, "--engine", "standin", "--http-port", "0")
    command += ["--model-path", str(model_dir), "--log-dir", str(folder)]
    if "--" not in options:
        options = (*options, "--")
    async with running(folder, [*command, *options, "--plugin", STANDIN], env) as it:
        yield it
