"""TensorRT-LLM as an engine, over a stand-in of the package: life, chunks, failures, ranks."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vswa_plugins.tensorrt_llm as plugin
from vswa_plugins.tensorrt_llm import engine, health
from vswa_plugins.tensorrt_llm.engine import TensorRtLlmEngine

from tests.metrics_helpers import documented
from tests.tensorrt_llm_helpers import OPTIONS, Started, asked, cached_of, settings_for, tokens_of
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin
from tests.tensorrt_llm_package import LLM, RequestError
from vswa_plugin.engine.contract import WORKER_ONLY
from vswa_plugin.errors import ConfigError, InvalidRequest, Unavailable, VswaError

pytestmark = pytest.mark.usefixtures("standin")


@pytest.fixture
def started(standin: None, model: Path) -> Iterator[Started]:
    made = Started(model)
    yield made
    made.engine.stop()


# -- start and stop --------------------------------------------------------------------------------


def test_the_plugin_answers_for_its_name_only(model: Path) -> None:
    settings = settings_for(model)

    assert ["tensorrt_llm"] == plugin.vswa_engine_names()
    assert isinstance(plugin.vswa_engine(settings), TensorRtLlmEngine)
    assert plugin.vswa_engine(type(settings)("other", "agg", str(model), "gemma")) is None


def test_nothing_is_imported_before_the_start(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    TensorRtLlmEngine(settings_for(model))

    assert [] == [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]


def test_the_model_is_built_with_the_options_and_what_events_need(started: Started, model: Path) -> None:
    assert str(model) == started.llm.model
    assert {
        "max_num_tokens": 200,
        "max_seq_len": 256,
        "kv_cache_config": {**OPTIONS["kv_cache_config"], "event_buffer_max_size": 100_000},
    } == started.llm.kwargs


def test_it_says_which_release_is_installed(model: Path) -> None:
    assert TensorRtLlmEngine(settings_for(model)).info.engine_version == "1.3.0rc29"


def test_capacity_becomes_known_with_the_start(model: Path) -> None:
    built = TensorRtLlmEngine(settings_for(model))
    before = built.info.total_kv_blocks
    built.start(lambda rank, events: None)
    built.stop()

    assert (256, 70) == (before, built.info.total_kv_blocks)


@pytest.mark.parametrize("error", [AttributeError(), KeyError("maxNumBlocks"), OSError("no answer")])
def test_a_release_that_does_not_tell_its_capacity_is_started_all_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: LLM) -> dict[str, int]:
        raise error

    monkeypatch.setattr(LLM, "get_kv_cache_capacity", fail)
    built = TensorRtLlmEngine(settings_for(model))
    built.start(lambda rank, events: None)
    built.stop()

    assert 256 == built.info.total_kv_blocks


def test_options_that_only_the_package_knows_are_bad_are_the_users(model: Path) -> None:
    built = TensorRtLlmEngine(settings_for(model, {**OPTIONS, "model_kwargs": {"refused": 1}}))

    with pytest.raises(ConfigError, match="does not take these options: LLM got invalid argument"):
        built.start(lambda rank, events: None)


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
        (AssertionError(), "AssertionError: "),
        (FileNotFoundError(2, "No such file", "/lb.yaml"), r"FileNotFoundError: .*'/lb.yaml'"),
        (SystemExit(1), "SystemExit: 1"),
    ],
)
def test_what_keeps_the_engine_from_starting_is_one_line(
    standin: None, model: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, words: str
) -> None:
    def init(llm: LLM, **_: object) -> None:
        raise raised

    monkeypatch.setattr(LLM, "__init__", init)
    engine = TensorRtLlmEngine(settings_for(model))

    with pytest.raises(VswaError, match=f"TensorRT-LLM has not started: {words}; its lines above") as caught:
        engine.start(lambda rank, events: None)

    assert not isinstance(caught.value, ConfigError)


def test_stopping_ends_the_engine_and_gives_out_the_last_events(started: Started) -> None:
    started.ask(asked([1, 2, 3, 4, 5, 6, 7, 8]))
    started.engine.stop()

    assert started.llm.closed
    assert {"created", "stored"} == {event["data"]["type"] for event in started.events[0]}
    with pytest.raises(Unavailable, match="has not started, or stops"):
        started.ask(asked([1]))


def test_an_engine_that_does_not_end_holds_nobody_up(
    started: Started, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forever = threading.Event()
    monkeypatch.setattr(LLM, "shutdown", lambda self: forever.wait())
    monkeypatch.setattr(engine, "STOP_TIMEOUT_S", 0.05)
    started.engine.stop()
    forever.set()

    assert ["TensorRT-LLM has not ended within 0 s; its processes may be left"] == [
        record.getMessage() for record in caplog.records if record.levelname == "ERROR"
    ]


# -- chunks ----------------------------------------------------------------------------------------


def test_tokens_come_as_they_are_generated_and_the_last_chunk_has_the_usage(started: Started) -> None:
    chunks = started.ask(asked([1, 2, 3], max_tokens=3))

    assert [[4], [5], [6]] == [chunk["token_ids"] for chunk in chunks]
    assert {"dp_rank": 0, "transferred_tokens": 0} == chunks[0][WORKER_ONLY]
    assert "length" == chunks[-1]["finish_reason"]
    assert {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    } == chunks[-1]["completion_usage"]


def test_a_repeated_prompt_is_cached_but_for_its_last_token(started: Started) -> None:
    prompt = list(range(24))

    assert [0, 23] == [cached_of(started.ask(asked(prompt))) for _ in range(2)]
    assert {"requests": 2.0, "prompt_tokens": 48.0, "cached_tokens": 23.0} == {
        name: started.engine.stats()[name] for name in ("requests", "prompt_tokens", "cached_tokens")
    }


def test_what_it_states_is_in_the_docs_as_counters_and_gauges(started: Started) -> None:
    rows = {row.name: row.type for row in documented()}
    stats, totals = started.engine.stats(), started.engine.info.totals

    assert {"prompt_tokens", "kv_events"} <= totals <= stats.keys()
    for name in stats:
        shown, kind = (f"{name}_total", "counter") if name in totals else (name, "gauge")
        assert kind == rows[f"vswa_engine_{shown}"]


def test_a_stop_token_ends_the_answer(started: Started) -> None:
    request = asked([1, 2, 3], 9, eos_token_ids=[6])
    request["stop_conditions"]["stop_token_ids_hidden"] = [7]
    chunks = started.ask(request)

    assert [4, 5] == tokens_of(chunks)
    assert ("stop", 6) == (chunks[-1]["finish_reason"], chunks[-1]["stop_reason"])


@pytest.mark.parametrize("stop", [{"ignore_eos": True}, {"stop_token_ids_visible": [6]}])
def test_the_engine_stops_at_nothing_where_the_frontend_wants_to_see_it(
    started: Started, stop: dict[str, Any]
) -> None:
    chunks = started.ask(
        {"token_ids": [1, 2, 3], "eos_token_ids": [6], "stop_conditions": {"max_tokens": 5} | stop}
    )

    assert [4, 5, 6, 7, 8] == tokens_of(chunks)


def test_log_probabilities_are_those_of_each_new_token(started: Started) -> None:
    chunks = started.ask(asked([1, 2, 3], 2, output_options={"logprobs": 2}))

    assert [[-0.5], [-0.5]] == [chunk["log_probs"] for chunk in chunks]
    assert [
        {"rank": 1, "token_id": 5, "token": None, "logprob": -0.5},
        {"rank": 2, "token_id": 6, "token": None, "logprob": -1.5},
    ] == chunks[1]["top_logprobs"][0]


def test_zero_alternatives_still_give_the_tokens_own_log_probability(started: Started) -> None:
    (chunk,) = started.ask(asked([1, 2, 3], 1, output_options={"logprobs": 0}))

    assert [-0.5] == chunk["log_probs"]


def test_packed_token_ids_are_read(started: Started) -> None:
    assert [4] == tokens_of(
        started.ask({"token_ids": struct.pack("<3i", 1, 2, 3), "stop_conditions": {"max_tokens": 1}})
    )


# -- when something fails --------------------------------------------------------------------------


def test_what_the_engine_refuses_at_once_is_the_requests_fault(started: Started) -> None:
    started.llm.refusal = ValueError("guided decoding is off")

    with pytest.raises(InvalidRequest, match="refuses the request: guided decoding is off"):
        started.ask(asked([1]))
    assert started.engine.failure() is None


@pytest.mark.parametrize("raised", [ValueError("from a thread"), RuntimeError("LLM is shutting down")])
def test_what_a_dead_engine_says_to_the_next_request_is_not_the_requests_fault(
    started: Started, raised: Exception
) -> None:
    started.llm.refusal = raised
    started.llm.healthy = False

    with pytest.raises(Unavailable, match="takes no requests any more"):
        started.ask(asked([1]))
    assert "TensorRT-LLM says that its executor is not healthy" == started.engine.failure()


def test_a_request_that_the_engine_gives_up_can_go_to_another_worker(started: Started) -> None:
    started.llm.error = RequestError("out of blocks")

    with pytest.raises(Unavailable, match="gave the request up: out of blocks"):
        started.ask(asked([1]))
    assert started.engine.failure() is None


def test_any_other_error_is_the_end_of_the_engine(started: Started) -> None:
    started.llm.error = RuntimeError("CUDA error")

    with pytest.raises(Unavailable, match="the engine has failed: RuntimeError: CUDA error"):
        started.ask(asked([1]))
    assert "RuntimeError: CUDA error" == started.engine.failure()


def test_an_executor_that_is_not_healthy_is_the_end_of_the_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "INTERVAL_S", 0.001)
    failed = threading.Event()
    built = TensorRtLlmEngine(settings_for(model))
    fail = built._fail
    monkeypatch.setattr(built, "_fail", lambda reason: (fail(reason), failed.set()))
    monkeypatch.setattr(LLM, "_check_health", lambda self: False)
    built.start(lambda rank, events: None)

    assert failed.wait(10)
    assert "TensorRT-LLM says that its executor is not healthy" == built.failure()
    with pytest.raises(Unavailable, match="not healthy"):
        asyncio.run(anext(built.generate(asked([1]))))
    built.stop()


def test_closing_the_answer_aborts_the_request(started: Started) -> None:
    async def take_one() -> None:
        chunks = started.engine.generate(asked([1, 2, 3], 9))
        await anext(chunks)
        await chunks.aclose()

    asyncio.run(take_one())

    assert started.llm.requests[0].aborted
    assert 0 == started.engine.stats()["running"]


def test_a_finished_answer_is_not_aborted(started: Started) -> None:
    started.ask(asked([1, 2, 3], 2))

    assert not started.llm.requests[0].aborted


# -- ranks -----------------------------------------------------------------------------------------

TWO_RANKS = {**OPTIONS, "tensor_parallel_size": 2, "enable_attention_dp": True}


@pytest.fixture
def two_ranks(standin: None, model: Path) -> Iterator[Started]:
    made = Started(model, TWO_RANKS)
    yield made
    made.engine.stop()


def test_attention_dp_ranks_are_insisted_on_and_told(two_ranks: Started) -> None:
    chunks = two_ranks.ask(asked([1, 2, 3], routing={"dp_rank": 1}))
    scheduling = two_ranks.llm.requests[0].arguments["scheduling_params"]

    assert (1, False) == (scheduling.attention_dp_rank, scheduling.attention_dp_relax)
    assert 1 == chunks[0][WORKER_ONLY]["dp_rank"]
    assert 2 == two_ranks.engine.info.data_parallel_size


def test_without_a_named_rank_the_one_with_fewer_requests_serves(two_ranks: Started) -> None:
    async def ranks() -> list[int]:
        answers = [two_ranks.engine.generate(asked([1, 2, 3], 2)) for _ in range(3)]
        firsts = [await anext(answer) for answer in answers]
        for answer in answers:
            await answer.aclose()
        return [first[WORKER_ONLY]["dp_rank"] for first in firsts]

    assert [0, 1, 0] == asyncio.run(ranks())


def test_events_are_handed_over_by_rank(two_ranks: Started) -> None:
    for rank in (1, 0, 1):
        two_ranks.ask(asked(list(range(rank * 100, rank * 100 + 8)), routing={"dp_rank": rank}))
    two_ranks.engine.stop()

    for rank, events in two_ranks.events.items():
        assert list(range(len(events))) == [event["event_id"] for event in events]
        assert {rank} == {event["attention_dp_rank"] for event in events}


# -- where no engine was named ---------------------------------------------------------------------


def test_it_serves_where_the_package_and_a_gpu_are_there(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnamed = type(settings_for(model))("", "agg", str(model), "gemma", OPTIONS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    without = plugin.vswa_engine(unnamed)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    chosen = plugin.vswa_engine(unnamed)

    assert without is None
    assert chosen is not None and chosen.info.engine == "tensorrt_llm"
    assert chosen.info.reason.startswith(
        "no engine was named, tensorrt_llm is installed and 2 GPUs are visible"
    )
    assert TensorRtLlmEngine(settings_for(model)).info.reason == ""


def test_the_host_prefers_it_to_the_embedded_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vswa_plugin.host.loading import load_host

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with load_host() as host:
        unnamed = type(settings_for(model))("", "agg", str(model), "gemma", OPTIONS)
        assert "tensorrt_llm" == host.engine(unnamed).info.engine


def test_without_the_package_a_gpu_changes_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    assert plugin.vswa_engine(type(settings_for(model))("", "agg", str(model), "gemma")) is None
