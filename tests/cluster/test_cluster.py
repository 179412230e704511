"""A deployment on this machine: when it counts as ready, and what is asked of whom to know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from socket import gethostname
from typing import Any, cast

import msgspec
import pytest
from aiohttp import web

from tests.conftest import Run
from tests.e2e_helpers import eventually
from tests.registry_helpers import ENTRY
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.probe import Probe
from vswa_plugin.launch.processes import Child
from vswa_plugin.launch.serving import Serving
from vswa_plugin.launch.topologies import Routing, WorkerGroup
from vswa_plugin.program.life import Life
from vswa_plugin.program.status import reachable_url
from vswa_plugin.registry.file import FileRegistry


class Front:
    """Answers as Dynamo's frontend and one of our routers would; what a request meets is in the fields."""

    def __init__(self) -> None:
        self.components: list[str] = []
        self.statuses = [200]
        self.used = ""
        #: What was asked for, in order.
        self.asked: list[str] = []

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.add_routes([web.get("/health", self._health), web.get("/v1/models", self._models)])
        app.add_routes([web.post("/v1/completions", self._complete), web.get("/metrics", self._metrics)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def asked_twice(self) -> None:
        """From now on: by then an answer that came before has had its effect."""
        self.asked.clear()
        await eventually(lambda: self.asked.count("metrics") > 1, "the router is asked")

    async def _health(self, _: web.Request) -> web.Response:
        self.asked.append("health")
        found = [{"component": c, "namespace": "dynamo", "endpoint": "generate"} for c in self.components]
        return web.json_response({"instances": found})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "gemma"}]})

    async def _complete(self, _: web.Request) -> web.Response:
        self.asked.append("completion")
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return web.json_response({}, status=status)

    async def _metrics(self, _: web.Request) -> web.Response:
        self.asked.append("metrics")
        return web.Response(text=self.used)


def used(*workers: int, model: str = "gemma") -> str:
    """A router's page of metrics that sends requests of ``model`` to those workers."""
    lines = ["# TYPE vswa_router_load_requests gauge"]
    lines += [
        f'vswa_router_load_requests{{model="{model}",worker="{each}",dp_rank="0"}} 0' for each in workers
    ]
    return "\n".join(lines) + "\n"


def test_a_cluster_is_ready_when_all_workers_are_known_and_a_request_is_served_not_when_the_model_is_listed(
    run: Run[Any], tmp_path: Path
) -> None:
    groups = (WorkerGroup("prefill", 1), WorkerGroup("decode", 2))
    front = Front()
    front.components, front.statuses = ["prefill", "backend"], [503, 503, 200]

    async def body() -> None:
        async with front.serving() as url:
            cluster = Cluster(ClusterSettings(str(tmp_path), "gemma", groups), tmp_path)
            cluster.url = url
            cluster.frontend = await Child.start("frontend", ["sleep", "60"], tmp_path)
            waiting = asyncio.create_task(cluster.wait_for_model())
            await eventually(lambda: front.asked.count("health") > 2, "it has looked three times")
            assert "completion" not in front.asked, "one is missing"
            front.components.append("backend")
            await waiting
            await cluster.stop()

    run(body())

    assert front.asked[-6:] == ["health", "completion"] * 3, "until it is served"


def test_behind_our_router_a_cluster_is_ready_when_that_sends_requests_to_all_of_its_workers(
    run: Run[Any], tmp_path: Path
) -> None:
    """Not to as many: those of an earlier life may still be there."""
    front = Front()
    front.components = ["backend", "backend", "router"]
    settings = ClusterSettings(
        str(tmp_path),
        "gemma",
        (WorkerGroup("agg", 2),),
        routing=Routing("exact"),
        worker_options=("--registry", f"file:{tmp_path}"),
    )

    async def body() -> None:
        async with front.serving() as url:
            cluster = Cluster(settings, tmp_path)
            cluster.url, cluster.router_urls = url, [url]
            cluster.frontend = await Child.start("frontend", ["sleep", "60"], tmp_path)
            cluster.routers = [await Child.start("router", ["sleep", "60"], tmp_path)]
            cluster.workers = [await Child.start(f"worker-{n}", ["sleep", "60"], tmp_path) for n in (0, 1)]
            one, two = (
                msgspec.structs.replace(ENTRY, worker_id=worker_id, pid=worker.pid)
                for worker_id, worker in zip((0xA, 0xB), cluster.workers, strict=True)
            )
            registries = [FileRegistry(tmp_path) for _ in cluster.workers]
            await registries[0].join(one)
            front.used = used(0xA, 0xB)
            waiting = asyncio.create_task(cluster.wait_for_model())
            await front.asked_twice()
            assert "completion" not in front.asked, "the second has not joined"
            front.used = ""
            await registries[1].join(two)
            for front.used in ("", used(0xA), used(0xA, 0xDEAD), used(0xA, 0xB, model="other")):
                await front.asked_twice()
                assert "completion" not in front.asked
            front.used = used(0xA, 0xB, 0xDEAD)
            await waiting
            for registry in registries:
                await registry.close()
            await cluster.stop()

    run(body())

    assert front.asked[-1] == "completion"


def test_the_registry_tells_where_our_workers_serve_their_status(run: Run[Any], tmp_path: Path) -> None:
    settings = ClusterSettings(str(tmp_path), "gemma", worker_options=("--registry", f"file:{tmp_path}"))

    async def body() -> dict[str, list[str]]:
        cluster = Cluster(settings, tmp_path)
        cluster.workers = [await Child.start(f"worker-{n}", ["sleep", "60"], tmp_path) for n in range(3)]
        pids = [worker.pid for worker in cluster.workers]
        entries = [
            msgspec.structs.replace(ENTRY, worker_id=number, **changes)
            for number, changes in enumerate(
                (
                    {"pid": pids[0], "mode": "prefill", "status_url": "http://h:1"},
                    {"pid": pids[1], "mode": "decode", "status_url": "http://h:2"},
                    {"pid": pids[2], "mode": "decode"},
                    {"pid": pids[0], "host": "elsewhere", "status_url": "http://elsewhere:3"},
                )
            )
        ]
        registries = [FileRegistry(tmp_path) for _ in entries]
        for registry, entry in zip(registries, entries, strict=True):
            await registry.join(entry)
        urls = await cluster.status_urls()
        for registry in registries:
            await registry.close()
        await cluster.stop()
        return urls

    assert run(body()) == {"prefill": ["http://h:1"], "decode": ["http://h:2"]}


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9"),
        ("worker-7", "http://worker-7:9"),
        ("::1", "http://[::1]:9"),
        ("0.0.0.0", f"http://{gethostname()}:9"),
        ("::", f"http://{gethostname()}:9"),
        ("", f"http://{gethostname()}:9"),
    ],
)
def test_what_listens_everywhere_is_reached_by_the_name_of_its_machine(host: str, url: str) -> None:
    assert reachable_url(host, 9) == url


def test_logs_are_bounded_from_the_start_on_by_a_task_that_is_watched(run: Run[Any]) -> None:
    class Starting:
        async def bound_logs(self) -> None:
            raise OSError("the log directory has gone")

        async def start(self) -> None:
            await asyncio.Event().wait()

        async def stop(self) -> None:
            pass

    async def body() -> None:
        life = Life("vswa launch")

        async def make() -> Cluster:
            return cast("Cluster", Starting())

        serving = Serving(make, lambda _: None, life)
        starting = asyncio.create_task(serving.start())
        ended = await asyncio.wait_for(life.tasks.failed(), 5)
        starting.cancel()
        assert str(ended).startswith("bound logs ended unexpectedly (OSError: the log directory has gone)")

    run(body())


def test_who_does_not_answer_says_nothing(run: Run[Any]) -> None:
    async def body() -> tuple[Any, ...]:
        nowhere = "http://127.0.0.1:9"
        async with Probe(ClusterSettings("m", "gemma"), nowhere) as probe:
            routed = await probe.routed_workers(nowhere)
            return await probe.instances(), await probe.lists_model(), await probe.serves_model(), routed

    assert run(body()) == ({}, False, False, set())
