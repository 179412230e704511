"""The two deployments with KV routing, by our router and by Dynamo's own: real engines, real processes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import (
    cluster_on,
    engine_metric,
    eventually,
    long_prompt,
    post,
    recording,
    running,
    stream,
)
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.processes import Child, free_port, python_module
from vswa_plugin.launch.topologies import Routing, WorkerGroup

GREEDY = {"temperature": 0, "ignore_eos": True}
ROOM = {"gemma3_cpu": {"kv_blocks": {"512": 128, "global": 256}}}
SLOW = {"gemma3_cpu": {"debug_step_delay_s": 0.03}}
MODES = {"agg_router": (("agg", 2),), "disagg_router": (("prefill", 2), ("decode", 1))}
COMBINATIONS = [(topology, router) for topology in MODES for router in ("exact", "stock")]


@asynccontextmanager
async def deployed(brokers: Brokers, folder: Path, settings: ClusterSettings) -> AsyncIterator[Cluster]:
    async with running(cluster_on(brokers, folder, settings)) as made:
        yield made
        goodbyes = await made.stop()
        assert not any(goodbyes.values()) or settings.keep, goodbyes
        assert not [child.name for child in (*made.workers, *made.routers) if child.name not in goodbyes]
        assert not [child.name for child in made.workers if "could not leave" in child.log()]


def settings_of(model_dir: Path, namespace: str, *groups: WorkerGroup, **more: Any) -> ClusterSettings:
    options = ("--heartbeat", "0.1", "--status-port", "0")
    base: dict[str, Any] = {"served_model_name": "gemma", "routing": Routing("exact")}
    base |= {"router_options": ("--log-level", "debug"), "worker_options": options}
    return ClusterSettings(str(model_dir), namespace=namespace, groups=groups, **(base | more))


async def complete(cluster: Cluster, prompt: str, max_tokens: int = 4) -> tuple[str, int]:
    """Text and cached tokens of one request that must be answered."""
    body = {**GREEDY, "model": cluster.settings.served_model_name, "prompt": prompt, "max_tokens": max_tokens}
    status, answer = await post(cluster, "/v1/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


async def served(cluster: Cluster) -> bool:
    body = {**GREEDY, "model": cluster.settings.served_model_name, "prompt": "Hello", "max_tokens": 1}
    return (await post(cluster, "/v1/completions", body))[0] == 200


def choices(cluster: Cluster, phase: str) -> int:
    return sum(len(re.findall(f": {phase} rank .* promises", router.log())) for router in cluster.routers)


# -- all four ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def deployment(
    request: pytest.FixtureRequest,
    run: Run[Any],
    brokers: Brokers,
    model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    topology, router = request.param
    groups = [WorkerGroup(mode, count, override=ROOM) for mode, count in MODES[topology]]
    settings = settings_of(model_dir, f"{topology}-{router}", *groups, routing=Routing(router))
    stack = AsyncExitStack()
    folder = tmp_path_factory.mktemp("deployment")
    try:
        yield run(stack.enter_async_context(deployed(brokers, folder, settings)))
    finally:
        run(stack.aclose())


def test_a_second_turn_lands_where_the_first_was_computed(run: Run[Any], deployment: Cluster) -> None:
    prompts = [long_prompt(f"family {name}") for name in "abcd"]
    workers = [worker for worker in deployment.workers if not worker.name.startswith("decode")]

    async def body() -> tuple[list[int], list[int], list[float]]:
        async with recording(deployment, deployment.settings.namespace) as recorded:
            await eventually(lambda: len({s for _, s, _ in recorded.batches}) >= 2, "heartbeats")
            # At once, so that they go to both workers; the second turns, one by one, could then go wrong.
            first = await asyncio.gather(*(complete(deployment, prompt) for prompt in prompts))
            await recorded.settled()
            second = []
            for prompt in prompts:
                second.append(await complete(deployment, f"{prompt} And then?"))
                await recorded.settled()  # by then no router counts it as load any more
        requests = [await engine_metric(each, "requests") for each in workers]
        return [tokens for _, tokens in first], [tokens for _, tokens in second], requests

    first, second, requests = run(body())

    assert all(tokens < 32 for tokens in first)
    assert all(tokens > 700 for tokens in second), second
    assert all(requests), "both workers have served"


def test_workers_are_hidden_behind_our_router_and_shown_to_dynamos(
    run: Run[Any], deployment: Cluster
) -> None:
    exact = deployment.settings.routing.router == "exact"
    namespace = deployment.settings.namespace
    entries = [entry for entry in run(deployment.entries()) if entry.namespace == namespace]
    told = "hidden from Dynamo's frontends (VSWA_ROUTER=exact" if exact else "shown to Dynamo's frontends"

    assert {entry.visible for entry in entries} == {not exact}
    assert all(f"the model is {told}" in worker.log() for worker in deployment.workers)
    assert len(deployment.routers) == exact


def test_no_request_goes_past_the_router(run: Run[Any], deployment: Cluster) -> None:
    if deployment.settings.routing.router == "stock":
        pytest.skip("the router is the frontend's own")
    phases = ("prefill", "decode") if "prefill" in deployment.workers[0].name else ("agg",)
    before = [choices(deployment, phase) for phase in phases]
    for number in range(6):
        run(complete(deployment, f"short {number}", 1))

    assert [choices(deployment, phase) for phase in phases] == [count + 6 for count in before]


# -- what ends and comes back --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two slow workers behind two routers, started again when they fail."""
    group = WorkerGroup("agg", 2, override=SLOW)
    settings = settings_of(model_dir, "kept", group, routing=Routing("exact", 2), keep=True)
    stack = AsyncExitStack()
    try:
        yield run(stack.enter_async_context(deployed(brokers, tmp_path_factory.mktemp("kept"), settings)))
    finally:
        run(stack.aclose())


async def broken_stream(cluster: Cluster, prompt: str, candidates: list[Child]) -> tuple[str, int, Child]:
    """Text and tokens of a streamed answer; after 10 tokens the candidate that serves it is killed."""
    parts: list[str] = []
    tokens, victim = 0, None
    body = {**GREEDY, "model": "gemma", "prompt": prompt, "max_tokens": 30}
    async for chunk in stream(cluster, "/v1/completions", body):
        assert "error" not in chunk, chunk
        parts += [choice["text"] for choice in chunk["choices"]]
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        if len(parts) == 10:
            for each in candidates:
                if await serving(each, chunk["id"].partition("-")[2]):
                    victim = each
                    each.kill()
    assert victim is not None
    return "".join(parts), tokens, victim


async def serving(child: Child, request_id: str) -> bool:
    if child.name.startswith("router"):
        return request_id in child.log()
    return await engine_metric(child, "running") > 0


@pytest.mark.parametrize("kind", ["workers", "routers"])
def test_what_is_killed_in_a_stream_is_not_noticed_by_the_client_and_comes_back(
    run: Run[Any], kept: Cluster, kind: str
) -> None:
    prompt = long_prompt(f"victim of {kind}", 25)

    async def body() -> tuple[str, str, int]:
        undisturbed = (await complete(kept, prompt, 30))[0]
        before = {child.pid for child in getattr(kept, kind)}
        text, tokens, victim = await broken_stream(kept, prompt, getattr(kept, kind))

        def is_back() -> bool:
            log = victim.log()
            return victim.pid not in before and ("serves 'gemma'" in log or "is shown" in log)

        await eventually(is_back, "it is back", 30)
        assert all([await served(kept) for _ in range(4)])
        return undisturbed, text, tokens

    undisturbed, text, tokens = run(body())

    assert text == undisturbed
    assert tokens == 30


def test_a_router_that_stands_alone_is_missed_until_it_is_started_again(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path
) -> None:
    settings = settings_of(model_dir, "alone", WorkerGroup("agg", 2), keep=True)

    async def body() -> tuple[float, int, str]:
        async with deployed(brokers, tmp_path, settings) as made:
            prompt = long_prompt("before")
            await complete(made, prompt)
            made.routers[0].kill()
            began = time.monotonic()
            await eventually(lambda: served(made), "requests are served again", 20)
            took = time.monotonic() - began
            return took, (await complete(made, prompt))[1], made.routers[0].log()

    took, cached, log = run(body())

    assert took < 10
    assert cached > 700, "the new router knows what the workers hold"
    assert "2 workers in the registry\n" in log


def test_a_new_worker_is_used_within_a_second_of_joining(run: Run[Any], kept: Cluster) -> None:
    async def body() -> float:
        added = await kept.add_worker()
        began = time.monotonic()
        asking = [asyncio.create_task(complete(kept, long_prompt(f"new {n}", 10), 8)) for n in range(3)]

        async def used() -> bool:
            asking.append(asyncio.create_task(complete(kept, long_prompt(f"new {len(asking)}", 10), 8)))
            return await engine_metric(added, "requests") > 0

        await eventually(used, "the worker is used")
        took = time.monotonic() - began
        await asyncio.gather(*asking)
        return took

    assert run(body()) < 1.0


def test_a_decode_worker_that_is_killed_in_a_stream_is_not_noticed_either(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path
) -> None:
    groups = WorkerGroup("prefill"), WorkerGroup("decode", 2, override=SLOW)

    async def body() -> tuple[str, str, int]:
        async with deployed(brokers, tmp_path, settings_of(model_dir, "decoders", *groups)) as made:
            undisturbed = (await complete(made, long_prompt("migrant", 25), 30))[0]
            text, tokens, victim = await broken_stream(made, long_prompt("migrant", 25), made.workers[1:])
            made.workers.remove(victim)
            return undisturbed, text, tokens

    undisturbed, text, tokens = run(body())

    assert text == undisturbed
    assert tokens == 30


def test_two_models_in_one_namespace_have_routers_of_their_own(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path
) -> None:
    names = {"first": tmp_path / "first", "Org/Second": tmp_path / "second"}
    for folder in names.values():
        folder.mkdir()

    async def body() -> list[list[str]]:
        async with AsyncExitStack() as stack:
            made = [
                await stack.enter_async_context(
                    deployed(
                        brokers,
                        folder,
                        settings_of(model_dir, "models", WorkerGroup(), served_model_name=name),
                    )
                )
                for name, folder in names.items()
            ]
            for cluster in made:
                for number in range(4):
                    await complete(cluster, f"Hello {number}", 2)
            return [
                re.findall(r"model '(\S+)' is shown on \S+", cluster.routers[0].log()) for cluster in made
            ]

    assert run(body()) == [["first"], ["Org/Second"]]


# -- what counting the global layers alone costs ---------------------------------------------------------


@asynccontextmanager
async def exact_front(cluster: Cluster) -> AsyncIterator[str]:
    """The URL of a second frontend, behind which our router sends requests to the same workers."""
    port, namespace = free_port(), f"{cluster.settings.namespace}-front"
    router = python_module("vswa_plugin.router", "--endpoint", f"dyn://{namespace}.router.generate")
    router += [
        "--namespace",
        cluster.settings.namespace,
        "--served-model-name",
        "gemma",
        "--heartbeat",
        "0.1",
    ]
    frontend = python_module("vswa_plugin.frontend", "--namespace", namespace, "--http-port", str(port))
    children = [
        await Child.start(name, command, cluster.folder, cluster.env)
        for name, command in (("second-router", router), ("second-frontend", frontend))
    ]
    try:
        await eventually(lambda: ask(f"http://127.0.0.1:{port}", "Hello"), "it serves", 20)
        yield f"http://127.0.0.1:{port}"
    finally:
        for child in children:
            await child.stop()


async def ask(url: str, prompt: str, worker_id: int | None = None) -> int | None:
    """Tokens that were computed for a prompt, by ``worker_id`` where it is given; None: not served."""
    body = {**GREEDY, "model": "gemma", "prompt": prompt, "max_tokens": 2}
    if worker_id is not None:
        body["nvext"] = {"backend_instance_id": worker_id}
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/completions", json=body) as got,
        ):
            usage = (await got.json()).get("usage")
    except aiohttp.ClientError:
        return None
    return usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] if usage else None


@pytest.mark.parametrize("projection", ["boundary", "global"])
def test_a_long_prefix_without_its_last_window_does_not_win_over_a_shorter_one_that_can_be_resumed(
    run: Run[Any],
    brokers: Brokers,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    projection: str,
) -> None:
    """One worker holds two long prompts but for their sliding blocks, the other the first half of each."""
    monkeypatch.setenv("VSWA_DYNAMO_EVENTS", projection)
    group = WorkerGroup("agg", 2, override={"gemma3_cpu": {"kv_blocks": {"512": 72, "global": 300}}})
    settings = settings_of(model_dir, f"scores-{projection}", group, routing=Routing("stock"))
    prompts = [long_prompt(f"family {name}", 70) for name in "ab"]

    async def body() -> tuple[int | None, int | None]:
        async with deployed(brokers, tmp_path, settings) as made:
            entries = [each for each in await made.entries() if each.namespace == settings.namespace]
            long, short = (entry.worker_id for entry in entries)
            async with exact_front(made) as exact, recording(made, settings.namespace) as recorded:
                await eventually(lambda: len({s for _, s, _ in recorded.batches}) == 2, "heartbeats of both")
                for prompt in (*prompts, *(long_prompt(f"evictor {n}", 70) for n in range(2))):
                    await ask(made.url, prompt, long)
                for prompt in prompts:
                    await ask(made.url, prompt[: len(prompt) // 2], short)
                await recorded.settled()
                by_us = await ask(exact, f"{prompts[0]} And then?")
                return by_us, await ask(made.url, f"{prompts[1]} And then?")

    by_us, by_dynamo = run(body())

    assert by_us is not None
    assert by_dynamo is not None
    assert 700 < by_us < 1000, "the second half"
    if projection == "boundary":
        assert 700 < by_dynamo < 1000, "the same"
    else:
        assert by_dynamo > 1500, "all of it: the blocks that were promised could not be resumed"
