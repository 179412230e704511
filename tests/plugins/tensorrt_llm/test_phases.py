"""Prefill and decode workers with TensorRT-LLM, over a stand-in: what is handed over, and how."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm import handover, package

from tests.tensorrt_llm_helpers import NIXL, OPTIONS, Started, asked, cached_of, tokens_of
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin
from tests.tensorrt_llm_package import LLM, DisaggregatedParams, Logprob, get_global_disagg_request_id
from vswa_plugin.engine.contract import WORKER_ONLY
from vswa_plugin.errors import InvalidRequest


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


# -- shapes of other releases ----------------------------------------------------------------------


class Style(enum.IntEnum):
    CONTEXT_FIRST = 0


@dataclasses.dataclass(frozen=True)
class Advertised:
    backend: str
    capabilities: tuple[str, ...]


@dataclasses.dataclass(slots=True, kw_only=True)
class NewerParams(DisaggregatedParams):
    """With what later releases have added: more to say, and a field that the constructor does not take."""

    ctx_usage: dict[str, Any] | None = None
    conversation_id: str | None = None
    advertised: Advertised | None = None
    _locked: bool = dataclasses.field(default=False, init=False)


NEWER: Any = SimpleNamespace(DisaggregatedParams=NewerParams, Logprob=Logprob)


def over_the_wire(params: Any, api: Any = NEWER) -> tuple[dict[str, Any], Any]:
    """What is sent for ``params``, and what the other side makes of it."""
    packed = json.loads(json.dumps(handover.pack(params, 7)))
    unpacked, cached = handover.unpack(api, packed)
    assert 7 == cached
    return packed, unpacked


def test_what_later_releases_add_is_handed_over_and_their_own_business_is_not() -> None:
    given = NewerParams(
        request_type="context_only",
        opaque_state=b"\x00",
        draft_tokens=[1],
        ctx_dp_rank=3,
        ctx_info_endpoint="tcp://10.0.0.1:5",
        schedule_style=Style.CONTEXT_FIRST,
        ctx_usage={"exact": True},
    )
    packed, unpacked = over_the_wire(given)

    assert "_locked" not in packed
    assert dataclasses.replace(given, request_type="generation_only") == unpacked
    assert packed["ctx_usage"]["exact"] is True, "booleans stay booleans"


def test_records_and_enumerations_are_sent_as_plain_values() -> None:
    style = NewerParams(request_type="context_only", schedule_style=Style.CONTEXT_FIRST)
    given = NewerParams(request_type="context_only", advertised=Advertised("python", ("a", "b")))

    assert {"backend": "python", "capabilities": ["a", "b"]} == over_the_wire(given)[0]["advertised"]
    assert int is type(handover.pack(style, 0)["schedule_style"])


LIKELY = {4: Logprob(-0.5, 1), 9: Logprob(-1.5, None)}


@pytest.mark.parametrize("given", [[LIKELY], [[LIKELY], [LIKELY]], [-0.5], [[-0.5]]])
def test_log_probabilities_of_the_first_token_come_back_in_each_shape(given: list[Any]) -> None:
    """Positions or beams of them; all likely tokens, or in later releases the drawn one's number only."""
    _, unpacked = over_the_wire(NewerParams(request_type="context_only", first_gen_log_probs=given))

    assert given == unpacked.first_gen_log_probs


def test_log_probabilities_are_sent_as_dynamos_workers_send_them() -> None:
    packed, _ = over_the_wire(NewerParams(request_type="context_only", first_gen_log_probs=[LIKELY]))

    assert [
        [
            {"token_id": 4, "logprob": -0.5, "rank": 1},
            {"token_id": 9, "logprob": -1.5, "rank": None},
        ]
    ] == packed["first_gen_log_probs"]


def test_what_only_a_later_release_says_is_left_out_by_an_older_one() -> None:
    older: Any = SimpleNamespace(DisaggregatedParams=DisaggregatedParams, Logprob=Logprob)
    given = NewerParams(request_type="context_only", first_gen_tokens=[4], conversation_id="c")

    assert (
        DisaggregatedParams(request_type="generation_only", first_gen_tokens=[4])
        == (over_the_wire(given, older)[1])
    )


def test_releases_that_number_no_request_beforehand_are_served(
    model: Path, standin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill worker's engine numbers it, which is what the decode worker's goes by."""
    disagg_utils = importlib.import_module("tensorrt_llm.llmapi.disagg_utils")
    monkeypatch.delattr(disagg_utils, "get_global_disagg_request_id")
    monkeypatch.setattr(LLM, "context_id", lambda self, params: 17)
    started = Started(model, OPTIONS | NIXL, "prefill")
    told = handed_over(started, [1, 2, 3])
    started.engine.stop()

    assert 17 == told["ctx_request_id"]
    assert "disagg_request_id" not in told


def test_the_number_of_a_request_fits_old_and_new_releases() -> None:
    old: Any = SimpleNamespace(get_global_disagg_request_id=lambda machine_id: machine_id)
    new: Any = SimpleNamespace(get_global_disagg_request_id=get_global_disagg_request_id)
    numbers = package.disagg_request_id(old), package.disagg_request_id(new)

    assert 0 <= (numbers[0] or 0) < 1021
    assert 1 << 41 <= (numbers[1] or 0) < (1 << 41) + 256 * 64
