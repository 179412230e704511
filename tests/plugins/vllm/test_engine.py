"""The engine over the stand-in of vLLM: its start, its requests, its end."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vswa_plugins.vllm import package
from vswa_plugins.vllm.engine import VllmEngine

from tests import vllm_package
from tests.vllm_helpers import BS, WINDOW, Started, asked, cached_of, settings_for, tokens_of
from tests.vllm_package import AsyncLLM
from vswa_plugin.engine.contract import WORKER_ONLY, Engine
from vswa_plugin.errors import ConfigError, InvalidRequest, Overloaded, RequestError, Unavailable
from vswa_plugin.host.loading import load_host
from vswa_plugin.testing.conformance import EngineConformance

PROMPT = list(range(100, 140))


@pytest.mark.usefixtures("standin")
class TestVllm(EngineConformance):
    """The suite for engines."""

    prompt = range(300, 380)

    @pytest.fixture
    def engine(self, model: Path) -> Engine:
        return VllmEngine(settings_for(model))


@pytest.fixture
def started(standin: None, model: Path) -> Any:
    made = Started(model)
    yield made
    made.engine.stop()


# -- before the start ------------------------------------------------------------------------------


def test_the_engine_is_found_by_its_name(standin: None, model: Path) -> None:
    engine = load_host(environ={}).engine(settings_for(model))

    assert ("vllm", "0.31.0", "vllm") == (engine.info.engine, engine.info.engine_version, engine.event_format)


def test_it_declares_vllms_groups_and_imports_nothing(standin: None, model: Path) -> None:
    info = VllmEngine(settings_for(model)).info

    assert [WINDOW] * 5 + [None] == [group.window_size for group in info.layout.groups]
    assert ({BS}, "vllm") == ({group.block_size for group in info.layout.groups}, info.layout.rule)
    assert [] == AsyncLLM.made


def several_sizes(folder: Path) -> Path:
    """A model like Gemma 4: a token has half the bytes in layers with a window."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    config = {
        "model_type": "gemma4_text",
        "num_hidden_layers": 12,
        "layer_types": kinds,
        "sliding_window": 64,
    }
    heads = {
        "num_key_value_heads": 2,
        "head_dim": 64,
        "global_head_dim": 128,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps({**config, **heads}))
    return folder


def test_blocks_of_several_sizes_are_declared_and_handed_over_by_nobody(
    standin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = several_sizes(tmp_path)
    layout = VllmEngine(settings_for(model)).info.layout

    assert ([(64, 2 * BS)] * 5 + [(None, BS)], "vllm_hybrid") == (
        [(group.window_size, group.block_size) for group in layout.groups],
        layout.rule,
    )
    monkeypatch.setattr(package, "require_nixl", lambda: None)
    with pytest.raises(
        ConfigError, match=r"--mode decode: expected a model whose cache groups have blocks of"
    ):
        VllmEngine(msgspec.structs.replace(settings_for(model), mode="decode"))


def test_a_vllm_that_made_blocks_of_one_size_instead_ends_the_worker(standin: None, tmp_path: Path) -> None:
    made = Started(several_sizes(tmp_path))
    made.ask(asked(PROMPT))
    made.engine.stop()

    assert "cache group 0: expected blocks of 8 tokens, got blocks of 4" in str(made.engine.failure())


def test_all_layers_may_share_one_pool(standin: None, model: Path) -> None:
    made = Started(model, {"disable_hybrid_kv_cache_manager": True})
    made.ask(asked(PROMPT))
    made.engine.stop()

    assert [None] == [group.window_size for group in made.engine.info.layout.groups]
    assert made.engine.failure() is None


def test_an_option_that_the_release_does_not_have_is_refused(standin: None, model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown option 'max_num_seq' in args\.yaml: did you mean 'max_num_seqs'"
    ):
        VllmEngine(settings_for(model, {"max_num_seq": 4}))


# -- the start -------------------------------------------------------------------------------------


def test_what_the_engine_has_made_of_the_options_is_stated_after_the_start(
    standin: None, model: Path
) -> None:
    made = Started(model, {"max_model_len": 128, "max_num_seqs": 3, "max_num_batched_tokens": 64})
    made.engine.stop()
    info = made.engine.info

    assert (128, 3, 64, 777) == (
        info.context_length,
        info.max_num_seqs,
        info.max_num_batched_tokens,
        info.total_kv_blocks,
    )


@pytest.mark.parametrize(
    ("quirks", "message"),
    [
        (
            {"block_size": 32},
            "block_size: expected 32, which vLLM chose .*; write block_size: 32 .in args.yaml.",
        ),
        ({"hybrid_off": True}, "expected vLLM to keep 6 cache groups, but it has turned its hybrid KV cache"),
    ],
)
def test_another_cache_than_was_declared_ends_the_start(
    standin: None, model: Path, quirks: dict[str, Any], message: str
) -> None:
    AsyncLLM.quirks = quirks
    engine = VllmEngine(settings_for(model))
    with pytest.raises(ConfigError, match=message):
        engine.start(lambda *_: None)
    engine.stop()

    assert AsyncLLM.made[-1].closed, "its processes end with the worker"


def test_a_value_that_vllm_refuses_is_said_in_one_line(standin: None, model: Path) -> None:
    engine = VllmEngine(settings_for(model, {"kv_cache_memory_bytes": 0}))
    message = "vLLM does not take these options: .*greater than 0 .in args.yaml"
    with pytest.raises(ConfigError, match=message) as refused:
        engine.start(lambda *_: None)

    assert "\n" not in str(refused.value)


def test_an_engine_that_dies_while_it_starts_is_no_setting(standin: None, model: Path) -> None:
    AsyncLLM.quirks = {"dies": True}
    with pytest.raises(Unavailable, match="vLLM has not started: Engine core initialization failed"):
        VllmEngine(settings_for(model)).start(lambda *_: None)


def test_a_stop_while_it_starts_ends_what_has_started(
    standin: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VllmEngine(settings_for(model))
    made = AsyncLLM.from_engine_args

    def stopped_meanwhile(args: Any, **_: Any) -> AsyncLLM:
        engine.stop()
        return made(args)

    monkeypatch.setattr(AsyncLLM, "from_engine_args", stopped_meanwhile)
    with pytest.raises(Unavailable, match="stopped while it started"):
        engine.start(lambda *_: None)

    assert AsyncLLM.made[-1].closed


# -- requests --------------------------------------------------------------------------------------


def test_what_is_asked_for_reaches_vllm(standin: None, model: Path) -> None:
    options = {
        "enable_lora": True,
        "scheduling_policy": "priority",
        "vswa": {"lora_adapters": {"b": "/b", "a": "/a"}},
    }
    made = Started(model, options)
    routing = {"cache_salt": "s", "lora_name": "b", "priority": 2}
    guided = {"guided_decoding": {"regex": "x"}}
    made.ask(asked(PROMPT, routing=routing, sampling_options=guided))
    given = made.llm.requests[-1]
    made.engine.stop()

    assert {"type": "token", "prompt_token_ids": PROMPT, "cache_salt": "s"} == given["prompt"]
    assert vllm_package.LoRARequest("b", 2, "/b") == given["lora_request"]
    assert (-2, None, "x") == (
        given["priority"],
        given["data_parallel_rank"],
        given["sampling_params"].structured_outputs.regex,
    )


def test_the_first_chunk_names_the_rank(started: Started) -> None:
    chunks = started.ask(asked(PROMPT, 3))

    assert {"dp_rank": 0, "transferred_tokens": 0} == chunks[0][WORKER_ONLY]
    assert not any(WORKER_ONLY in chunk for chunk in chunks[1:])
    assert [140, 141, 142] == tokens_of(chunks)


def test_cached_tokens_are_counted(started: Started) -> None:
    assert [0, 36] == [cached_of(started.ask(asked(PROMPT))) for _ in range(2)]
    stats = started.engine.stats()

    assert (2.0, 80.0, 36.0, 0.0) == tuple(
        stats[name] for name in ("requests", "prompt_tokens", "cached_tokens", "running")
    )


def test_a_request_that_reads_no_cache_has_none(started: Started) -> None:
    started.ask(asked(PROMPT))

    assert 0 == cached_of(started.ask(asked(PROMPT, extra_args={"skip_reading_prefix_cache": True})))


def test_a_stop_token_ends_the_answer_and_is_told(started: Started) -> None:
    chunks = started.ask({"token_ids": PROMPT, "eos_token_ids": [142]})

    assert ("stop", 142) == (chunks[-1]["finish_reason"], chunks[-1]["stop_reason"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampling_options": {"temperature": 9}}, "temperature must be in"),
        ({"output_options": {"logprobs": 21}}, "max allowed: 20"),
        ({"routing": {"lora_name": "x"}}, "unknown adapter 'x'"),
    ],
)
def test_what_vllm_refuses_is_the_clients_fault(
    started: Started, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        started.ask(asked(PROMPT, **fields))
    assert started.engine.failure() is None


def caused(cause: Exception) -> Exception:
    error = vllm_package.EngineGenerateError()
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (vllm_package.GracefulHTTPError("busy"), Overloaded),
        (vllm_package.GenerationError("kv load"), Unavailable),
        (vllm_package.VLLMValidationError("no"), InvalidRequest),
        (caused(ValueError("no")), InvalidRequest),
        (caused(KeyError("x")), RequestError),
    ],
    ids=repr,
)
def test_an_error_of_one_request_ends_that_request_alone(
    started: Started, error: Exception, ours: type[Exception]
) -> None:
    started.llm.errors.append(error)
    with pytest.raises(RequestError) as raised:
        started.ask(asked(PROMPT))

    assert ours is type(raised.value)
    assert started.engine.failure() is None
    assert 1 == len(tokens_of(started.ask(asked(PROMPT))))


def test_a_closed_request_is_taken_back(started: Started) -> None:
    async def close_early() -> int:
        started.llm.step = asyncio.Event()
        started.llm.step.set()
        async with aclosing(started.engine.generate(asked(PROMPT, 100))) as chunks:
            await anext(chunks)
        return len(started.llm.running)

    assert 0 == asyncio.run(close_early())
    assert 0.0 == started.engine.stats()["running"]


def test_a_request_that_is_cancelled_while_vllm_takes_it_in_is_taken_back(started: Started) -> None:
    """vLLM itself aborts only what it has handed a queue for."""
    taken: list[str] = []

    async def generate(request_id: str, **_: Any) -> Any:
        started.llm.running[request_id] = asyncio.Event()
        await asyncio.Event().wait()
        yield

    async def abort(request_id: str) -> None:
        taken.append(request_id)

    started.llm.generate, started.llm.abort = generate, abort  # type: ignore[method-assign, assignment]

    async def cancel() -> None:
        task = asyncio.create_task(started.chunks(asked(PROMPT)))
        while not started.llm.running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())

    assert list(started.llm.running) == taken


# -- ranks -----------------------------------------------------------------------------------------


def test_each_rank_serves_and_announces_on_its_own(standin: None, model: Path) -> None:
    made = Started(model, ranks=3)
    for rank in range(3):
        made.ask(asked([rank, *PROMPT], routing={"dp_rank": rank}))
    tokens = {rank: made.wait_for(6, rank)[0]["token_ids"][0] for rank in range(3)}
    made.engine.stop()

    assert {0: 0, 1: 1, 2: 2} == tokens
    assert 3 == made.engine.info.data_parallel_size


def test_a_request_for_any_rank_goes_to_the_one_with_the_fewest(standin: None, model: Path) -> None:
    made = Started(model, ranks=2)

    async def two() -> list[int]:
        made.llm.step = asyncio.Event()
        both = [asyncio.create_task(made.chunks(asked(PROMPT))) for _ in range(2)]
        while len(made.llm.running) < 2:
            await asyncio.sleep(0)
        made.llm.step.set()
        return [chunks[0][WORKER_ONLY]["dp_rank"] for chunks in await asyncio.gather(*both)]

    ranks = asyncio.run(two())
    made.engine.stop()

    assert [0, 1] == ranks
    assert {"running_rank_0", "running_rank_1"} <= made.engine.stats().keys()


# -- failures --------------------------------------------------------------------------------------


def test_the_death_of_the_engine_core_is_the_workers_with_its_reason(started: Started) -> None:
    started.llm.engine_core.resources.engine_manager.processes = [
        SimpleNamespace(name="EngineCore", exitcode=-9)
    ]

    async def die() -> None:
        started.llm.step = asyncio.Event()
        task = asyncio.create_task(started.chunks(asked(PROMPT, 9)))
        while not started.llm.running:
            await asyncio.sleep(0)
        started.llm.errored = True
        with pytest.raises(Unavailable, match="EngineCore with exit code -9"):
            await task
        with pytest.raises(Unavailable, match="EngineCore with exit code -9"):
            await started.chunks(asked(PROMPT))

    asyncio.run(die())

    assert "vLLM's engine core has ended: EngineCore with exit code -9" == started.engine.failure()


def test_the_reason_is_vllms_where_the_processes_cannot_be_seen(started: Started) -> None:
    del started.llm.engine_core.resources.engine_manager
    started.llm.errored = True

    assert "vLLM's engine core has ended: EngineCore encountered an issue." == started.engine.failure()


def test_events_that_contradict_the_layout_end_the_worker(standin: None, model: Path) -> None:
    AsyncLLM.quirks = {"windows": (WINDOW, None)}
    made = Started(model)
    made.ask(asked(PROMPT))
    made.wait_for(2)
    made.engine.stop()

    assert "cache group 1: expected window 8, got global attention" in str(made.engine.failure())


def test_a_stop_ends_the_requests_under_way(standin: None, model: Path) -> None:
    made = Started(model)

    async def stop_meanwhile() -> None:
        made.llm.step = asyncio.Event()
        task = asyncio.create_task(made.chunks(asked(PROMPT, 9)))
        while not made.llm.running:
            await asyncio.sleep(0)
        await asyncio.to_thread(made.engine.stop)
        with pytest.raises(Unavailable, match="the engine stops"):
            await task

    asyncio.run(stop_meanwhile())

    assert made.llm.closed
    assert not [thread for thread in threading.enumerate() if thread.name == "kv events"]


def test_an_engine_that_was_never_started_can_be_stopped(standin: None, model: Path) -> None:
    VllmEngine(settings_for(model)).stop()
