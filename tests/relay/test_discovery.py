"""Workers of another project, found through Dynamo's discovery, behind an exact router that is as ever."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.vllm.grouping import cache_groups
from vswa_plugins.vllm.model import load_shape

from tests import router_helpers
from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, get, own_namespace
from tests.relay_helpers import WAIT_S, url_in
from tests.relay_worker import BS
from tests.router_helpers import prompt_of
from vswa_plugin.launch.processes import Child, free_port
from vswa_plugin.registry import Entry
from vswa_plugin.registry.opening import open_registry


class Fleet:
    """Foreign workers, a relay, and a frontend with an exact router."""

    def __init__(self, folder: Path, brokers: Brokers, model: Path) -> None:
        self.stack = router_helpers.Stack(folder, brokers.env, model, own_namespace("foreign"))
        self._brokers, self._model = brokers, model
        self._numbers = 0

    async def foreign(self, component: str = "backend", ports: tuple[int, int] | None = None) -> Child:
        """A worker, once it serves; ``ports``: of its events and of their replay."""
        self._numbers += 1
        events, replay = ports or (free_port(), free_port())
        options = {
            "endpoint": f"{self.stack.name}.{component}.generate",
            "events": f"tcp://127.0.0.1:{events}",
            "replay": f"tcp://127.0.0.1:{replay}",
            "groups": [group.window_size for group in cache_groups(load_shape(str(self._model)).layers, BS)],
        }
        child = await self.stack.child(f"foreign-{self._numbers}", "tests.relay_worker", json.dumps(options))
        await eventually(lambda: "SERVES" in child.log(), "it serves", WAIT_S)
        return child

    async def relay(self, *arguments: str) -> Child:
        what = (
            "--model-path",
            str(self._model),
            "--served-model-name",
            "gemma",
            "--hidden",
            "--engine-options",
            '{"block_size": 32}',
        )
        where = ("--namespace", self.stack.name, "--heartbeat", "0.2", "--status-port", "0")
        return await self.stack.child("relay", "vswa_plugin.relay", *what, *where, *arguments)

    async def registered(self, *workers: Child) -> list[Entry]:
        expected = sorted(number_of(each) for each in workers)
        found: list[Entry] = []

        async def there() -> bool:
            registry = open_registry("etcd", self._brokers.env)
            try:
                found[:] = await registry.entries(self.stack.name)
            finally:
                await registry.close()
            return expected == sorted(each.worker_id for each in found)

        await eventually(there, f"just {expected} are registered", WAIT_S)
        return found


def number_of(worker: Child) -> int:
    return last_said(worker, "SERVES")


def last_said(worker: Child, word: str) -> int:
    return int(worker.log().rsplit(word, 1)[1].split()[0])


@pytest.fixture
def fleet(run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path, brokers, model_dir)
    yield made
    codes = run(made.stack.stop())
    assert {code for name, code in codes.items() if name not in made.stack.killed} <= {0}, codes


async def counted(router: Child, name: str, label: str) -> float:
    _, page = await get(f"{await url_in(router, 'API on ')}/metrics")
    lines = [line for line in page.splitlines() if line.startswith(f"{name}{{") and label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def knows_all(router: Child, worker: Child) -> None:
    """Wait until the router knows of each block that the worker holds."""

    async def known() -> bool:
        return last_said(worker, "HELD") == await counted(router, "vswa_index_blocks", 'window="global"')

    await eventually(known, "the router knows all blocks", WAIT_S)


def test_an_exact_router_serves_unchanged_workers_and_keeps_its_promises(run: Run[Any], fleet: Fleet) -> None:
    """The instances of one endpoint, one on each host: here one of each of two endpoints."""
    events, replay = free_port(), free_port()

    async def body() -> None:
        stack = fleet.stack
        first = await fleet.foreign("backend", (events, replay))
        relay = await fleet.relay(
            "--events", f"tcp://{{host}}:{events}", "--replay", f"tcp://{{host}}:{replay}"
        )
        await stack.start("--http-port", "0")
        (entry,) = await fleet.registered(first)
        assert (BS, "backend", False) == (entry.block_size, entry.component, entry.visible)
        await stack.shows("gemma")
        prompt = prompt_of("relayed", 300)
        asked = [prompt, prompt, prompt + prompt_of("more", 60), prompt_of("other", 200), prompt]
        answers = []
        for each in asked:
            status, answer = await stack.ask(each, max_tokens=1)
            assert 200 == status, answer
            answers.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            await knows_all(stack.routers[0], first)
        assert 0 == answers[0] < answers[1] == answers[4]
        (router,) = stack.routers

        async def all_counted() -> bool:
            name, results = "vswa_router_predictions_total", ("exact", "over", "under", "unreported")
            counts = [await counted(router, name, f'result="{each}"') for each in results]
            return counts == [len(asked), 0, 0, 0]

        await eventually(all_counted, "each promise is kept exactly", WAIT_S)

        # It dies; another process takes its place, on the same ports, under another id.
        first.kill()
        stack.killed.add(first.name)
        await fleet.registered()
        second = await fleet.foreign("backend", (events, replay))
        await fleet.registered(second)
        last: dict[str, Any] = {}

        async def served() -> bool:
            status, answer = await stack.ask(prompt, max_tokens=1)
            last.update(answer)
            return status == 200

        await eventually(served, "the router has taken it in", WAIT_S)
        assert 0 == last["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert "Traceback" not in relay.log()

    run(body())


def test_two_instances_that_nothing_tells_apart_are_left_out_and_so_is_one_that_has_left(
    run: Run[Any], fleet: Fleet
) -> None:
    ports = free_port(), free_port()

    async def body() -> None:
        one = await fleet.foreign("backend", ports)
        two = await fleet.foreign("backend")
        relay = await fleet.relay(
            "--events", f"tcp://127.0.0.1:{ports[0]}", "--replay", f"tcp://127.0.0.1:{ports[1]}"
        )
        await eventually(
            lambda: "got 2; if they all serve, write the id" in relay.log(), "it says so", WAIT_S
        )
        await fleet.registered()
        assert 0 == await two.stop()
        await fleet.registered(one)
        os.kill(one.pid, signal.SIGUSR1)
        await eventually(lambda: "HIDDEN" in one.log(), "it has left discovery", WAIT_S)
        await fleet.registered()
        await eventually(lambda: "does not list worker" in relay.log(), "it says why", WAIT_S)

    run(body())
