"""DYN_NAMESPACE and its suffix end to end: workers, a router and Dynamo's own frontends find each other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, own_namespace
from vswa_plugin.launch.cluster import LOOPBACK_ENV
from vswa_plugin.launch.processes import Child, free_port, python_module

SUFFIX = "ab12"


async def models(session: aiohttp.ClientSession, url: str) -> list[str]:
    try:
        async with session.get(f"{url}/v1/models") as response:
            return [each["id"] for each in (await response.json())["data"]]
    except aiohttp.ClientError:
        return ["no answer yet"]


async def completes(session: aiohttp.ClientSession, url: str) -> bool:
    body = {"model": "gemma", "prompt": "railway", "max_tokens": 1}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        return response.status == 200


def test_the_environment_of_a_deployment_says_where_everything_is(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    base = own_namespace("pool")
    env = {**LOOPBACK_ENV, "DYN_LOG": "warn", **brokers.env, "DYN_NAMESPACE": base}
    of_workers = {**env, "DYN_NAMESPACE_WORKER_SUFFIX": SUFFIX}

    async def body() -> None:
        children: list[Child] = []

        async def start(name: str, program: str, environ: dict[str, str], *options: str) -> Child:
            children.append(await Child.start(name, python_module(program, *options), tmp_path, environ))
            return children[-1]

        async def frontend(name: str, environ: dict[str, str]) -> str:
            port = free_port()
            await start(name, "vswa_plugin.frontend", environ, "--http-port", str(port))
            return f"http://127.0.0.1:{port}"

        try:
            worker = await start("worker", "vswa_plugin.worker", of_workers, "--model-path", str(model_dir))
            by_prefix = await frontend("by-prefix", {**env, "DYN_NAMESPACE_PREFIX": base})
            by_name = await frontend("by-name", env)
            async with aiohttp.ClientSession() as session:
                await eventually(
                    lambda: f"on {base}-{SUFFIX}.backend.generate" in worker.log(), "it serves", 30
                )

                async def answers(url: str) -> bool:
                    return ["gemma"] == await models(session, url) and await completes(session, url)

                await eventually(lambda: answers(by_prefix), "a frontend of the prefix serves the model", 30)

                async def empty() -> bool:
                    return [] == await models(session, by_name)

                await eventually(empty, "a frontend of the namespace alone does not see it", 30)
                router = await start("router", "vswa_plugin.router", of_workers)
                await eventually(lambda: answers(by_name), "and sees it through the router", 30)
            assert f"is shown on {base}.router.generate" in router.log()
        finally:
            await asyncio.gather(*(child.stop() for child in reversed(children)))

    run(body())
