"""ROUTER=picker with real engines: prefill and decode workers apart, and a gateway that is closed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_picker_e2e import COMPLETIONS, send, value
from tests.cluster.test_router_topologies import complete, deployed, settings_of
from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, long_prompt, own_namespace
from vswa_plugin.launch import cluster as launched
from vswa_plugin.launch.envoy import EnvoySettings
from vswa_plugin.launch.topologies import Routing, WorkerGroup


def test_both_workers_of_a_request_are_chosen_and_what_prefill_reused_is_compared(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path
) -> None:
    groups = WorkerGroup("prefill", 2), WorkerGroup("decode", 1)
    options: dict[str, Any] = {"routing": Routing("picker"), "router_options": ()}
    settings = settings_of(model_dir, own_namespace("picked-apart"), *groups, **options)

    async def body() -> tuple[list[tuple[str, int]], float, float]:
        async with deployed(brokers, tmp_path, settings) as cluster:
            prompts = [long_prompt("a"), long_prompt("b"), long_prompt("a"), long_prompt("b")]
            asked = [await complete(cluster, prompt) for prompt in prompts]
            picks = await value(cluster, "vswa_picker_requests_total", model="gemma", outcome="picked")

            async def exact() -> float:
                return await value(cluster, "vswa_router_predictions_total", model="gemma", result="exact")

            async def all_compared() -> bool:
                return await exact() == picks

            await eventually(all_compared, "each promise is compared, and was right")
            assert 0 == await value(cluster, "vswa_router_load_requests")
            return asked, picks, await exact()

    asked, picks, _ = run(body())

    assert asked[0][0] == asked[2][0]
    assert [0, 0] == [cached for _, cached in asked[:2]]
    assert all(cached > 700 for _, cached in asked[2:]), "the second time it went where the prefix was"
    assert picks >= 4


def test_a_closed_gateway_refuses_requests_while_no_picker_answers(
    run: Run[Any],
    brokers: Brokers,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def closed(*given: Any) -> EnvoySettings:
        return EnvoySettings(*given, closed=True)

    monkeypatch.setattr(launched, "EnvoySettings", closed)
    settings = settings_of(
        model_dir, own_namespace("closed"), WorkerGroup(), routing=Routing("picker"), router_options=()
    )

    async def body() -> list[int]:
        async with deployed(brokers, tmp_path, settings) as cluster:
            request = {"model": "gemma", "prompt": "Hi", "max_tokens": 1}
            with_picker, _ = await send(cluster, COMPLETIONS, request)
            await asyncio.gather(*(picker.stop() for picker in cluster.routers))
            without, _ = await send(cluster, COMPLETIONS, request)
            models, _ = await send(cluster, "/v1/nothing", {})
            return [with_picker, without, models]

    with_picker, without, others = run(body())

    assert 200 == with_picker
    assert without >= 500
    assert 404 == others, "what generates nothing is not refused"
