"""Prefill and decode workers with vLLM, over a stand-in: what is handed over, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.vllm.engine import VllmEngine
from vswa_plugins.vllm.side_channel import HOST, PORT

from tests.vllm_helpers import BS, Installer, Started, asked, cached_of, settings_for, tokens_of
from tests.vllm_package import AsyncLLM
from vswa_plugin.engine.contract import WORKER_ONLY, Engine
from vswa_plugin.errors import ConfigError, InvalidRequest, Unavailable
from vswa_plugin.testing.phases import PhasesConformance

PROMPT = list(range(100, 140))


@pytest.mark.usefixtures("standin")
class TestVllmPhases(PhasesConformance):
    """The suite for a prefill and a decode engine."""

    received = ("transfer_bytes",)
    waiting = ("blocks_used",)

    @pytest.fixture
    def engines(self, model: Path) -> tuple[Engine, Engine]:
        return VllmEngine(settings_for(model, mode="prefill")), VllmEngine(settings_for(model, mode="decode"))


@pytest.fixture
def prefill(standin: None, model: Path) -> Iterator[Started]:
    made = Started(model, mode="prefill")
    yield made
    made.engine.stop()


@pytest.fixture
def decode(standin: None, model: Path) -> Iterator[Started]:
    made = Started(model, mode="decode")
    yield made
    made.engine.stop()


def handed_over(prefill: Started, prompt: list[int] = PROMPT, **more: Any) -> dict[str, Any]:
    """``kv_transfer_params``, over the wire."""
    (chunk,) = prefill.ask(asked(prompt, 9, **more))
    params: dict[str, Any] = json.loads(json.dumps(chunk["disaggregated_params"]))
    assert ["kv_transfer_params"] == list(params), "the one field that Dynamo's vLLM workers read"
    return dict(params["kv_transfer_params"])


def result(params: Any, **more: Any) -> dict[str, Any]:
    return {"prefill_result": {"disaggregated_params": {"kv_transfer_params": params}, **more}}


def given(engine: Started) -> dict[str, Any]:
    """``kv_transfer_params`` of the last request, as vLLM gets them."""
    extra: dict[str, Any] = engine.llm.requests[-1]["sampling_params"].extra_args
    return dict(extra["kv_transfer_params"])


# -- prefill ---------------------------------------------------------------------------------------


def test_a_prefill_worker_computes_one_token_and_keeps_the_prompt(prefill: Started) -> None:
    params = handed_over(prefill)
    sampling = prefill.llm.requests[0]["sampling_params"]

    assert True is given(prefill)["do_remote_decode"] and False is given(prefill)["do_remote_prefill"]
    assert (1, 0) == (sampling.max_tokens, sampling.min_tokens)
    assert True is params["do_remote_prefill"]
    assert [params["remote_request_id"]] == list(prefill.llm.connector.held)  # type: ignore[union-attr]


def test_an_answer_that_its_first_token_ends_is_handed_over_too(prefill: Started, decode: Started) -> None:
    """Another finish reason would make Dynamo's frontend take it for the whole answer."""
    (chunk,) = prefill.ask(asked(PROMPT, 9, eos_token_ids=[PROMPT[-1] + 1]))
    handed = {"prefill_result": {"disaggregated_params": chunk["disaggregated_params"]}}
    chunks = decode.ask(asked(PROMPT, 9, eos_token_ids=[PROMPT[-1] + 1], **handed))

    assert "length" == chunk["finish_reason"]
    assert ("stop", [PROMPT[-1] + 1]) == (chunks[-1]["finish_reason"], tokens_of(chunks))


def test_a_prefill_that_is_taken_back_keeps_nothing(prefill: Started) -> None:
    async def leave() -> None:
        prefill.llm.step = asyncio.Event()
        task = asyncio.create_task(prefill.chunks(asked(PROMPT)))
        while not prefill.llm.running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())

    assert {} == prefill.llm.connector.held  # type: ignore[union-attr]


def test_prompts_that_no_decode_worker_fetched_in_time_are_counted(prefill: Started) -> None:
    handed_over(prefill)
    held = prefill.engine.stats()["blocks_used"]
    prefill.llm.connector.expire()  # type: ignore[union-attr]
    handed_over(prefill, PROMPT[:BS])

    assert (held, 1.0) == (5 * 3 + 10, prefill.engine.stats()["transfers_expired"])
    assert 6 == prefill.engine.stats()["blocks_used"]


# -- decode ----------------------------------------------------------------------------------------


def test_a_decode_worker_answers_with_the_cached_tokens_of_prefill(prefill: Started, decode: Started) -> None:
    prefill.ask(asked(PROMPT[:20]))
    params = handed_over(prefill)
    chunks = decode.ask(asked(PROMPT, 3, **result(params)))

    assert params == given(decode)
    assert {"dp_rank": 0, "transferred_tokens": 40} == chunks[0][WORKER_ONLY]
    assert [140, 141, 142] == tokens_of(chunks)
    assert 20 == cached_of(chunks), "its own count would be of what it received"
    assert 25 * 100 == decode.engine.stats()["transfer_bytes"]


@pytest.mark.parametrize(("usage", "cached"), [(4, 4), (999, 39), (None, 0)])
def test_a_prefill_worker_of_an_older_release_says_so_in_its_usage(
    prefill: Started, decode: Started, usage: int | None, cached: int
) -> None:
    params = handed_over(prefill)
    del params["remote_prefill_cached_tokens"]
    more = {} if usage is None else {"prompt_tokens_details": {"cached_tokens": usage}}

    assert cached == cached_of(decode.ask(asked(PROMPT, 2, **result(params, **more))))


def test_what_a_release_hands_over_besides_is_passed_on(prefill: Started, decode: Started) -> None:
    params = {**handed_over(prefill), "novelty": {"of": [1]}}
    decode.ask(asked(PROMPT, 2, **result(params)))

    assert {"of": [1]} == given(decode)["novelty"]


def test_a_prompt_that_cannot_be_fetched_may_be_served_by_another_worker(
    prefill: Started, decode: Started
) -> None:
    params = handed_over(prefill)
    decode.ask(asked(PROMPT, 2, **result(params)))
    with pytest.raises(Unavailable, match="could not be fetched from the prefill worker"):
        decode.ask(asked(PROMPT, 2, **result(params)))
    stats = decode.engine.stats()

    assert (1.0, 0.0, None) == (stats["transfer_failures"], stats["running"], decode.engine.failure())


def test_a_decode_worker_refuses_a_prompt_that_nobody_has_computed(decode: Started) -> None:
    with pytest.raises(InvalidRequest, match="prefill_result: expected what a prefill worker has answered"):
        decode.ask(asked(PROMPT))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"remote_engine_id": None}, r"kv_transfer_params\.remote_engine_id: expected a text, got none"),
        ({"remote_host": 7}, r"remote_host: expected"),
        ({"remote_port": "5600"}, r"remote_port: expected"),
        ({"do_remote_prefill": False}, r"do_remote_prefill: expected true, got False"),
        ({"remote_block_ids": None}, r"remote_block_ids: expected lists of block ids"),
        ({"remote_block_ids": ["ab"]}, r"remote_block_ids: expected lists of block ids"),
        ({"remote_block_ids": [[1], [2]]}, r"expected those of 6 cache groups, as this worker has, got 2"),
        ({"remote_num_tokens": 20}, r"expected 5 blocks of 4 tokens for the 20 tokens"),
    ],
)
def test_params_that_cannot_be_right_are_refused(
    prefill: Started, decode: Started, changed: dict[str, Any], words: str
) -> None:
    params = {**handed_over(prefill), **changed}
    with pytest.raises(InvalidRequest, match=words):
        decode.ask(asked(PROMPT, **result(params)))


@pytest.mark.parametrize(("block_size", "blocks"), [(2 * BS, 5), (BS // 2, 20)])
def test_a_prefill_worker_with_another_block_size_is_refused(
    model: Path, decode: Started, block_size: int, blocks: int
) -> None:
    other = Started(model, {"block_size": block_size}, mode="prefill")
    params = handed_over(other)
    other.engine.stop()
    words = f"got {blocks}: the prefill worker has another block size; run the same"
    with pytest.raises(InvalidRequest, match=words):
        decode.ask(asked(PROMPT, **result(params)))


def test_a_block_ahead_of_the_prompt_is_none_of_another_size(prefill: Started, decode: Started) -> None:
    params = handed_over(prefill)
    params["remote_block_ids"][-1].append(77)

    assert 2 == len(tokens_of(decode.ask(asked(PROMPT, 2, **result(params)))))


def test_what_another_engine_hands_over_is_refused(decode: Started) -> None:
    with pytest.raises(InvalidRequest, match="expected those of a vLLM prefill worker; run the same engine"):
        decode.ask(asked(PROMPT, prefill_result={"disaggregated_params": {"request_type": "context_only"}}))


# -- the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_each_mode_has_its_role(standin: None, model: Path, mode: str, role: str) -> None:
    made = Started(model, mode=mode)
    config = made.llm.args.kv_transfer_config
    made.engine.stop()

    assert config is not None and ("NixlConnector", role) == (config.kv_connector, config.kv_role)


def test_without_nixl_the_command_is_named(install_standin: Installer, model: Path) -> None:
    install_standin("0.31.0", nixl=False)
    VllmEngine(settings_for(model))
    for mode in ("prefill", "decode"):
        with pytest.raises(ConfigError, match="the package nixl is not installed: pip install nixl"):
            VllmEngine(settings_for(model, mode=mode))


def test_a_mode_that_is_none_is_refused(standin: None, model: Path) -> None:
    with pytest.raises(ConfigError, match="mode"):
        VllmEngine(settings_for(model, mode="encode"))


@pytest.mark.parametrize("mode", ["agg", "decode"])
def test_a_connector_that_cannot_keep_several_groups_is_refused(
    standin: None, model: Path, mode: str
) -> None:
    example = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    both = {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": [{"kv_connector": "NixlConnector"}, example]},
    }
    transfer = example if mode == "agg" else both
    engine = VllmEngine(settings_for(model, {"kv_transfer_config": transfer}, mode))
    with pytest.raises(ConfigError) as refused:
        engine.start(lambda rank, events: None)

    expected = f"kv_transfer_config.kv_connector: expected one that can keep 6 cache groups, such as NixlConnector, got '{transfer['kv_connector']}', for which vLLM"  # noqa: E501
    assert str(refused.value).startswith(expected)
    assert not AsyncLLM.made


def test_such_a_connector_serves_a_model_that_is_kept_in_one_group(standin: None, model: Path) -> None:
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    made = Started(model, {"kv_transfer_config": transfer, "disable_hybrid_kv_cache_manager": True})
    made.engine.stop()

    assert 1 == len(made.engine.info.layout.groups)


def test_what_vllm_itself_refuses_of_the_connector_is_one_line(standin: None, model: Path) -> None:
    engine = VllmEngine(settings_for(model, {"kv_transfer_config": {"kv_connector": "NixlConnector"}}))
    with pytest.raises(ConfigError, match="vLLM does not take these options: Please specify kv_role"):
        engine.start(lambda rank, events: None)


def test_each_engine_of_a_machine_has_ports_of_its_own(
    standin: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PORT, raising=False)
    seen: list[tuple[str, str]] = []
    made = AsyncLLM.from_engine_args

    def noted(*args: Any, **more: Any) -> AsyncLLM:
        seen.append((os.environ[HOST], os.environ[PORT]))
        return made(*args, **more)

    monkeypatch.setattr(AsyncLLM, "from_engine_args", noted)
    for mode in ("prefill", "decode"):
        Started(model, mode=mode).engine.stop()

    assert ["localhost", "localhost"] == [host for host, _ in seen]
    assert PORT not in os.environ and HOST not in os.environ
    assert all(port.isdecimal() for _, port in seen)
