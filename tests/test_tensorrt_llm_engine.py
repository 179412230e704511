"""TensorRT-LLM as an engine, over a stand-in of the package: requests, chunks, errors, both phases."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vswa_plugins.tensorrt_llm as plugin
from vswa_plugins.tensorrt_llm import engine
from vswa_plugins.tensorrt_llm.engine import TensorRtLlmEngine
from vswa_plugins.tensorrt_llm.request import _GUIDED, SAMPLING

from tests.tensorrt_llm_helpers import (
    LLM,
    NIXL,
    OPTIONS,
    RequestError,
    Started,
    asked,
    cached_of,
    settings_for,
    tokens_of,
)
from tests.tensorrt_llm_helpers import SamplingParams as TheirSampling
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin
from vswa_plugin.engine import WORKER_ONLY
from vswa_plugin.errors import ConfigError, InvalidRequest, Unavailable

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


def test_capacity_becomes_known_with_the_start(model: Path) -> None:
    built = TensorRtLlmEngine(settings_for(model))
    before = built.info.total_kv_blocks
    built.start(lambda rank, events: None)
    built.stop()

    assert (256, 70) == (before, built.info.total_kv_blocks)


def test_options_that_only_the_package_knows_are_bad_are_the_users(model: Path) -> None:
    built = TensorRtLlmEngine(settings_for(model, {**OPTIONS, "model_kwargs": {"refused": 1}}))

    with pytest.raises(ConfigError, match="does not take these options: LLM got invalid argument"):
        built.start(lambda rank, events: None)


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


# -- what the engine is asked ----------------------------------------------------------------------


def test_sampling_options_are_passed_on_by_their_names(started: Started) -> None:
    options = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "seed": 7,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "n": 1,
        "guided_decoding": {"choice": ["a+", "b"], "backend": None},
    }
    request = asked([1, 2, 3], 4, sampling_options=options, eos_token_ids=[1])
    request["stop_conditions"]["min_tokens"] = 2
    started.ask(request | {"priority": 0.9, "routing": {"cache_salt": "s"}})
    given = started.llm.requests[0].arguments

    expected = TheirSampling(
        temperature=0.7,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        seed=7,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        max_tokens=4,
        min_tokens=2,
        stop_token_ids=[1],
        detokenize=False,
        guided_decoding=given["sampling_params"].guided_decoding,
    )
    assert expected == given["sampling_params"]
    assert r"(a\+|b)" == expected.guided_decoding.regex
    assert (0.9, "s") == (given["priority"], given["cache_salt"])


def test_without_max_tokens_the_answer_may_fill_the_context(started: Started) -> None:
    chunks = started.ask({"token_ids": list(range(150)), "stop_conditions": {}})

    assert 106 == len(tokens_of(chunks))


def test_the_docs_list_every_option_that_is_passed_on() -> None:
    docs = (Path(__file__).parent.parent / "docs" / "tensorrt-llm.md").read_text("utf-8")

    assert [] == [name for name in (*SAMPLING, *_GUIDED) if f"`{name}`" not in docs]


REFUSED = [
    ({"token_ids": []}, "at least one token id"),
    ({"token_ids": [-1]}, r"ids in \[0, 5000\), got -1"),
    ({"token_ids": [5000]}, "got 5000 to 5000"),
    ({"token_ids": [1] * 256}, "256 tokens: expected at most 255.*shorten the prompt"),
    (
        {"token_ids": [1] * 201},
        "max_num_tokens, 200, because this worker runs without enable_chunked_prefill",
    ),
    ({"token_ids": [1], "multi_modal_data": {"image_url": []}}, "multi_modal_data: expected no images"),
    ({"token_ids": [1], "sampling_options": {"n": 2}}, "sampling_options.n: expected 1, got 2"),
    ({"token_ids": [1], "sampling_options": {"use_beam_search": True}}, "use_beam_search: expected False"),
    ({"token_ids": [1], "sampling_options": {"top_p": "x"}}, "top_p: expected a number, got 'x'"),
    ({"token_ids": [1], "output_options": {"prompt_logprobs": 1}}, "prompt_logprobs: expected none"),
    ({"token_ids": [1], "routing": {"dp_rank": 1}}, r"dp_rank: expected a rank in \[0, 0\], got 1"),
    ({"token_ids": [1], "routing": {"lora_name": "x"}}, "unknown adapter 'x'.*Known: none"),
    (
        {"token_ids": [1], "stop_conditions": {"max_tokens": 0}},
        "max_tokens: expected an integer of at least 1",
    ),
    ({"token_ids": [1], "prefill_result": {"disaggregated_params": {}}}, "expected none in mode agg"),
]


@pytest.mark.parametrize(("request_", "words"), REFUSED)
def test_a_request_that_cannot_be_served_is_refused_before_the_engine_sees_it(
    started: Started, request_: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        started.ask(request_)

    assert [] == started.llm.requests


# -- when something fails --------------------------------------------------------------------------


def test_what_the_engine_refuses_at_once_is_the_requests_fault(started: Started) -> None:
    started.llm.refusal = ValueError("guided decoding is off")

    with pytest.raises(InvalidRequest, match="refuses the request: guided decoding is off"):
        started.ask(asked([1]))
    assert started.engine.failure() is None


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
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started.engine._running is not None
    started.llm.healthy = False
    started.engine._running.poller._check_health()

    assert "TensorRT-LLM says that its executor is not healthy" == started.engine.failure()
    with pytest.raises(Unavailable, match="not healthy"):
        started.ask(asked([1]))


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


# -- phases apart ----------------------------------------------------------------------------------


@pytest.fixture
def prefill(standin: None, model: Path) -> Iterator[Started]:
    made = Started(model, OPTIONS | NIXL, "prefill")
    yield made
    made.engine.stop()


@pytest.fixture
def decode(standin: None, model: Path) -> Iterator[Started]:
    made = Started(model, OPTIONS | NIXL, "decode")
    yield made
    made.engine.stop()


def handed_over(prefill: Started, prompt: list[int], **more: Any) -> dict[str, Any]:
    """What a prefill worker tells, over the wire."""
    (chunk,) = prefill.ask(asked(prompt, 9, **more))
    told: dict[str, Any] = json.loads(json.dumps(chunk["disaggregated_params"]))
    return told


def test_a_prefill_worker_ends_with_length_and_what_a_decode_worker_needs(prefill: Started) -> None:
    (chunk,) = prefill.ask(asked([1, 2, 3], 9))
    given = prefill.llm.requests[0].arguments

    assert "length" == chunk["finish_reason"]
    assert "context_only" == given["disaggregated_params"].request_type
    assert (1, False) == (given["sampling_params"].max_tokens, given["streaming"])
    told = chunk["disaggregated_params"]
    names = {"request_type", "first_gen_tokens", "opaque_state", "disagg_request_id", "ctx_request_id"}
    assert names | {"_epd_metadata"} == set(told)
    assert ("AHdoZXJl/w==", [4]) == (told["opaque_state"], told["first_gen_tokens"])


def test_a_prefill_worker_names_the_request_as_dynamos_frontend_demands(
    prefill: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "context_id", lambda self, params: None)
    told = handed_over(prefill, [1, 2, 3])

    assert told["disagg_request_id"] == told["ctx_request_id"]


def test_an_answer_that_ends_with_its_first_token_is_not_handed_over(prefill: Started) -> None:
    (chunk,) = prefill.ask(asked([1, 2, 3], 9, eos_token_ids=[4]))

    assert "stop" == chunk["finish_reason"]
    assert "disaggregated_params" not in chunk


def test_a_decode_worker_goes_on_where_the_prefill_worker_ended(prefill: Started, decode: Started) -> None:
    prompt = list(range(24))
    prefill.ask(asked(prompt[:12]))
    told = handed_over(prefill, prompt, output_options={"logprobs": 2})
    chunks = decode.ask(asked(prompt, 3, prefill_result={"disaggregated_params": told | {"worker_id": 5}}))
    given = decode.llm.requests[0].arguments["disaggregated_params"]

    assert ("generation_only", b"\x00where\xff", [24]) == (
        given.request_type,
        given.opaque_state,
        given.first_gen_tokens,
    )
    assert [24, 25] == list(given.first_gen_log_probs[0])
    assert -0.5 == given.first_gen_log_probs[0][24].logprob
    assert [24, 25, 26] == tokens_of(chunks)
    assert {"dp_rank": 0, "transferred_tokens": 24} == chunks[0][WORKER_ONLY]
    assert 12 == cached_of(chunks), "the prefill worker's count, not the transferred prompt"


@pytest.mark.parametrize(("told_by_dynamo", "cached"), [(2, 2), (99, 5), (None, 0)])
def test_the_cached_tokens_of_dynamos_own_prefill_workers_are_taken_over(
    prefill: Started, decode: Started, told_by_dynamo: int | None, cached: int
) -> None:
    told = handed_over(prefill, [1, 2, 3, 4, 5, 6])
    del told["_epd_metadata"]
    result = {"disaggregated_params": told, "prompt_tokens_details": {"cached_tokens": told_by_dynamo}}

    assert cached == cached_of(decode.ask(asked([1, 2, 3, 4, 5, 6], prefill_result=result)))


def test_a_decode_worker_does_both_phases_of_what_nobody_has_computed(decode: Started) -> None:
    decode.ask(asked([1, 2, 3]))

    given = decode.llm.requests[0].arguments["disaggregated_params"]
    assert "context_and_generation" == given.request_type


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"kind": "gemma3_cpu", "version": 1}, "got the fields kind, version; run the same engine"),
        (
            {"request_type": "context_only", "opaque_state": "%"},
            "expected what a TensorRT-LLM prefill worker",
        ),
        ({"request_type": "context_only", "first_gen_log_probs": [[{}]]}, "KeyError"),
        ([], "expected an object, got list"),
    ],
)
def test_what_no_prefill_worker_of_this_engine_sends_is_refused(
    decode: Started, told: Any, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        decode.ask(asked([1, 2, 3], prefill_result={"disaggregated_params": told}))


def test_fields_of_a_newer_release_are_left_out(prefill: Started, decode: Started) -> None:
    told = handed_over(prefill, [1, 2, 3]) | {"novelty": 1}

    assert [4] == tokens_of(decode.ask(asked([1, 2, 3], prefill_result={"disaggregated_params": told})))


def test_a_request_is_aborted_only_when_its_blocks_have_arrived(prefill: Started, decode: Started) -> None:
    told = handed_over(prefill, [1, 2, 3])

    async def cancelled_early() -> list[bool]:
        decode.llm.stall = asyncio.Event()
        request = asked([1, 2, 3], 5, prefill_result={"disaggregated_params": told})
        reading = asyncio.ensure_future(anext(decode.engine.generate(request)))
        while not decode.llm.requests:
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        seen = [decode.llm.requests[0].aborted]
        decode.llm.stall.set()
        await asyncio.gather(*decode.engine._aborting)
        return [*seen, decode.llm.requests[0].aborted]

    assert [False, True] == asyncio.run(cancelled_early())
