"""A prefill and a decode engine over a real vLLM, with blocks that NIXL moves between them."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.vllm import numbers, package, side_channel
from vswa_plugins.vllm.engine import VllmEngine
from vswa_plugins.vllm.transfer import CONNECTORS

from tests.plugins.vllm.live.conftest import OPTIONS
from tests.plugins.vllm.live.test_live_engine import Shared
from vswa_plugin.engine.contract import Engine, EngineSettings, EventSink
from vswa_plugin.testing.phases import PhasesConformance

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs the package nixl"),
]

#: The lease of a finished prompt, which vLLM renews while a decode engine waits to fetch it.
LEASE_S = 6
TRANSFER = {"kv_connector": "NixlConnector", "kv_connector_extra_config": {"kv_lease_duration": LEASE_S}}
#: Tests of the suite that stop an engine.
ALONE = ("gone", "stopping_prefill", "events_of_each")


def engine_for(model: Path, mode: str, **options: Any) -> VllmEngine:
    given = {**OPTIONS, **({"kv_transfer_config": TRANSFER} if mode != "agg" else {}), **options}
    return VllmEngine(EngineSettings("vllm", mode, str(model), "gemma", given, "args.yaml"))


class Idle(Shared):
    """Starts anew once no prompt waits for a decode engine: vLLM does not forget its cache before."""

    def start(self, on_events: EventSink) -> None:
        assert self.engine._running is not None
        llm, deadline = self.engine._running.llm, time.monotonic() + 10 * LEASE_S
        while not asyncio.run_coroutine_threadsafe(llm.reset_prefix_cache(), self._loop).result(60):
            assert time.monotonic() < deadline, "a prompt is held beyond its lease"
            time.sleep(0.1)
        super().start(on_events)


@pytest.fixture(scope="module")
def shared(model_dir: Path) -> Iterator[tuple[Shared, Shared]]:
    """Engines that stay up: a start takes half a minute."""
    prefill = Idle(engine_for(model_dir, "prefill"))
    try:
        decode = Idle(engine_for(model_dir, "decode"))
        try:
            yield prefill, decode
        finally:
            decode.end()
    finally:
        prefill.end()


class TestVllmPhases(PhasesConformance):
    """The suite for a prefill and a decode engine."""

    prompt = range(300, 1_000)
    long_answer = 900
    timeout_s = 600.0
    received = ("transfer_bytes",)
    waiting = ("blocks_used",)

    @pytest.fixture
    def engines(self, request: pytest.FixtureRequest, model_dir: Path) -> tuple[Engine, Engine]:
        if any(name in request.node.name for name in ALONE):
            return engine_for(model_dir, "prefill"), engine_for(model_dir, "decode")
        both: tuple[Shared, Shared] = request.getfixturevalue("shared")
        return both


def test_the_answer_in_two_phases_is_that_of_one_engine(shared: tuple[Shared, Shared]) -> None:
    prefill, decode = shared
    answers = []
    for seed in range(6):
        prompt = [7 + (11 + seed) * n % 4000 for n in range(20 + 130 * seed)]
        (chunk,) = prefill.ask(prompt, 9)
        handed = {"disaggregated_params": chunk["disaggregated_params"]}
        chunks = decode.ask(prompt, 9, prefill_result=handed)
        tokens = [token for each in chunks for token in each["token_ids"]]
        answers.append((tokens, prefill.direct(prompt, 9)))

    assert [alone for _, alone in answers] == [both for both, _ in answers]
    assert decode.stats()["transfer_bytes"] > 0


def test_a_prompt_that_is_not_to_be_read_from_the_cache_is_computed_on_both_sides(
    shared: tuple[Shared, Shared],
) -> None:
    prefill, decode = shared
    prompt = [3 + 17 * n % 4000 for n in range(300)]
    apart = {"extra_args": {"skip_reading_prefix_cache": True}}
    expired = prefill.stats()["transfers_expired"]
    answers = []
    for more in ({}, apart):
        (chunk,) = prefill.ask(prompt, 5, **more)
        handed = {"disaggregated_params": chunk["disaggregated_params"]}
        chunks = decode.ask(prompt, 5, prefill_result=handed, **more)
        answers.append([token for each in chunks for token in each["token_ids"]])
        cached = chunks[-1]["completion_usage"]["prompt_tokens_details"]["cached_tokens"]
    deadline = time.monotonic() + 10 * LEASE_S
    while held := prefill.stats()["blocks_used"]:
        assert time.monotonic() < deadline, f"{held} blocks are still held"
        time.sleep(0.1)

    assert answers[0] == answers[1]
    assert 0 == cached
    assert expired == prefill.stats()["transfers_expired"], (
        "decode has given it back, not the end of the lease"
    )


def test_a_prompt_that_nobody_fetches_is_freed_when_its_lease_ends(shared: tuple[Shared, Shared]) -> None:
    prefill, _ = shared
    before = prefill.stats()["transfers_expired"]
    prefill.ask([5 + 19 * n % 4000 for n in range(300)], 5)
    assert prefill.stats()["blocks_used"] > 0
    deadline = time.monotonic() + 10 * LEASE_S
    while prefill.stats()["blocks_used"]:
        assert time.monotonic() < deadline, "it is held beyond its lease"
        time.sleep(0.1)

    assert before + 1 == prefill.stats()["transfers_expired"]


def test_the_names_used_are_vllms() -> None:
    """As the installed release has them: statistics and names of the connector, and the environment."""
    from vllm import envs
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

    api = package.load()
    counted = {name for names, _ in numbers._COUNTED.values() for name in names}
    roles = ("kv_producer", "kv_consumer", "kv_both")
    configs = [api.KVTransferConfig(kv_connector=name, kv_role=role) for name in CONNECTORS for role in roles]

    assert counted <= NixlKVConnectorStats().data.keys()
    assert all(api.KVConnectorFactory.supports_hma_config(config) for config in configs)
    assert {side_channel.HOST, side_channel.PORT} <= set(envs.environment_variables)
