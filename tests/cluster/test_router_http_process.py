"""Routers as processes of their own, with their HTTP API: load that is shared, selection, exit."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, get
from tests.router_helpers import Stack
from vswa_plugin.launch.processes import Child
from vswa_plugin.router.args import SELECTOR_PORT, HttpArgs, parse


@pytest.fixture(scope="module")
def stack(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("http"), brokers.env, model_dir, "overhttp")

    async def start() -> None:
        await asyncio.gather(made.start("--http-port", "0"), made.echo(), made.echo())
        await made.router("--selector-only", "--http-port", "0")
        await made.shows("gemma")

    try:
        run(start())
        yield made
    finally:
        codes = run(made.stop())
    assert set(codes.values()) == {0}, codes


async def url_of(router: Child) -> str:
    found: list[str] = []

    def said() -> bool:
        found.extend(re.findall(r"API on (http://\S+),", router.log()))
        return bool(found)

    await eventually(said, "it says where it listens")
    return found[0]


async def metric(url: str, name: str) -> float:
    _, text = await get(f"{url}/metrics")
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def test_a_stream_through_one_router_is_load_to_the_other_until_it_ends(run: Run[Any], stack: Stack) -> None:
    front, selector = stack.routers

    async def body() -> list[float]:
        urls = [await url_of(front), await url_of(selector)]
        for url in urls:
            await eventually(lambda url=url: _is(url, "vswa_router_replicas ", 1), "they have met")
        paced = stack.stream(" ".join(f"word{n}" for n in range(60)), "pace:0.05", max_tokens=20)
        seen = []
        async for _ in paced:
            if not seen:
                for url in urls:
                    await eventually(lambda url=url: _is(url, "vswa_router_load_requests{", 1), "load")
                    seen.append(await metric(url, "vswa_router_load_blocks{"))
        for url in urls:
            await eventually(lambda url=url: _is(url, "vswa_router_load_requests{", 0), "it has ended")
        return seen

    ours, theirs = run(body())

    assert ours == theirs > 5


async def _is(url: str, name: str, expected: float) -> bool:
    return await metric(url, name) == expected


def test_only_the_selector_selects_and_both_are_ready(run: Run[Any], stack: Stack) -> None:
    async def body() -> list[int]:
        statuses = []
        async with aiohttp.ClientSession() as session:
            for router in stack.routers:
                url = await url_of(router)
                await eventually(lambda url=url: _ready(url), "it is ready")
                async with session.post(f"{url}/select", json={"token_ids": [1] * 40}) as answer:
                    statuses.append(answer.status)
        return statuses

    assert run(body()) == [404, 200]
    assert "is shown on" not in stack.routers[1].log()


async def _ready(url: str) -> bool:
    return (await get(f"{url}/ready"))[0] == 200


def test_a_selector_listens_by_default_and_a_router_where_it_is_told_to() -> None:
    assert parse([], {}).http == HttpArgs()
    assert parse(["--selector-only"], {}).http == HttpArgs(port=SELECTOR_PORT, selector_only=True)
    assert parse(["--http-port", "0"], {}).http.port == 0
