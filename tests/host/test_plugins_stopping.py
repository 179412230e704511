"""When a program lets its plugins end: behind all that they are shown, before the connections close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually
from tests.host_helpers import clock as clock
from tests.host_helpers import host as host
from tests.host_helpers import plugin
from tests.worker.test_worker_life import worker
from vswa_plugin.host.host import PluginHost
from vswa_plugin.program.life import PLUGINS_END_S, Life
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.router.app import Router
from vswa_plugin.router.args import parse as parse_router
from vswa_plugin.router.selector.app import Selector
from vswa_plugin.testing.engine import StandinEngine
from vswa_plugin.wire.transport import Transport
from vswa_plugin.worker.app import Worker
from vswa_plugin.worker.args import parse as parse_worker

OBSERVER = """
from pathlib import Path
from vswa_plugin.hookspecs import hookimpl

SEEN = Path({path!r})


def note(text):
    with SEEN.open("a") as file:
        file.write(text + "\\n")


@hookimpl
def vswa_worker_connected():
    note("connected")


@hookimpl
def vswa_kv_batch():
    note("batch")


@hookimpl
def vswa_stopping(budget_s):
    note(f"stopping in {{budget_s:g}} s")
"""


@pytest.fixture
def order(host: PluginHost, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ends, one after the other."""
    ended: list[str] = []
    close, stop = Transport.close, StandinEngine.stop

    async def closed(transport: Transport) -> None:
        ended.append("NATS")
        await close(transport)

    def stopped(engine: StandinEngine) -> None:
        ended.append("engine")
        stop(engine)

    monkeypatch.setattr(Transport, "close", closed)
    monkeypatch.setattr(StandinEngine, "stop", stopped)
    host.register(plugin(vswa_stopping=lambda budget_s: ended.append(f"plugins in {budget_s:g} s")), "x")
    return ended


def test_the_plugins_of_a_worker_end_between_its_engine_and_its_connection(
    order: list[str], host: PluginHost, run: Run[Any], tmp_path: Path
) -> None:
    args = parse_worker(["--model-path", str(tmp_path), "--engine", "standin"])
    ending = Worker(args, host, StandinEngine(args.settings), FileRegistry(tmp_path), Life("test"))
    ending._engine_started = True
    run(ending.end())

    assert ["engine", f"plugins in {PLUGINS_END_S:g} s", "NATS"] == order


@pytest.mark.parametrize("program", [Router, Selector])
def test_the_plugins_of_a_router_end_before_its_connection(
    program: type[Router | Selector], order: list[str], host: PluginHost, run: Run[Any], tmp_path: Path
) -> None:
    async def body() -> None:
        await program(parse_router([], {}), host, FileRegistry(tmp_path), Life("test")).end()

    run(body())

    assert [f"plugins in {PLUGINS_END_S:g} s", "NATS"] == order


def test_a_worker_that_gets_sigterm_lets_its_plugins_end_once_and_last(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    seen, file = tmp_path / "seen", tmp_path / "observer.py"
    file.write_text(OBSERVER.format(path=str(seen)))

    async def body() -> tuple[int, str]:
        child = await worker(tmp_path, model_dir, brokers.env, "--plugin", str(file))
        await eventually(lambda: "serves 'gemma'" in child.log_path.read_text(), "it serves", 30)
        await eventually(lambda: "batch" in seen.read_text(), "its layout is published")
        return await child.stop(), child.log_path.read_text()

    code, log = run(body())
    lines = seen.read_text().splitlines()

    assert code == 0, log
    assert ("connected", "batch", f"stopping in {PLUGINS_END_S:g} s") == (lines[0], lines[-2], lines[-1])
    assert 1 == sum(line.startswith("stopping") for line in lines)
