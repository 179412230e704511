"""Answers that keep to a format: any model, random weights included, gives what the format allows."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vswa_plugins.gemma3_cpu.model.sampling import SamplingParams, make_rng, sample
from vswa_plugins.gemma3_cpu.serving.guided import MAX_BYTES, Grammars, parse_format

from tests.gemma3_disagg_helpers import handed_over, running_pair
from tests.gemma3_engine_helpers import (
    Bench,
    collect,
    prompt_of,
    request_for,
    run_async,
    running_engine,
    tokens_of,
)
from tests.gemma3_engine_helpers import bench as bench
from tests.gemma3_engine_helpers import model as model
from tests.gemma3_engine_helpers import small as small
from vswa_plugin.engine import Fields
from vswa_plugin.errors import InvalidRequest, RequestError

pytest.importorskip("llguidance", reason="needs the extra guided: pip install 'vswa-plugin[guided]'")

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Ulm", "Trier"]}, "rain": {"type": "boolean"}},
    "required": ["city", "rain"],
    "additionalProperties": False,
}
EOS = 1


def guided(prompt_length: int = 20, max_tokens: int = 60, **format_: Any) -> dict[str, Any]:
    more = {name: format_.pop(name) for name in ("temperature", "seed") if name in format_}
    sampling = {
        "guided_decoding": {**dict.fromkeys(("json", "regex", "choice", "grammar")), **format_},
        **more,
    }
    request = request_for(prompt_of(prompt_length), max_tokens, sampling_options=sampling)
    return {**request, "eos_token_ids": [EOS]}


def text_of(directory: Path, chunks: list[dict[str, Any]]) -> str:
    from tokenizers import Tokenizer

    tokens = [token for token in tokens_of(chunks) if token != EOS]
    return str(Tokenizer.from_file(str(directory / "tokenizer.json")).decode(tokens))


def answers(directory: Path, *requests: dict[str, Any]) -> list[list[dict[str, Any]]]:
    async def body() -> list[list[dict[str, Any]]]:
        async with running_engine(directory) as engine:
            return [await collect(engine, request) for request in requests]

    return run_async(body())


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "seed": 5}], ids=["greedy", "sampled"])
def test_random_weights_answer_by_the_schema_and_stop_where_it_ends(
    small: Path, sampling: dict[str, Any]
) -> None:
    (chunks,) = answers(small, guided(json=SCHEMA, **sampling))
    said = json.loads(text_of(small, chunks))

    assert said["city"] in ("Ulm", "Trier") and isinstance(said["rain"], bool) and len(said) == 2
    assert "stop" == chunks[-1]["finish_reason"]
    assert chunks[-1]["completion_usage"]["completion_tokens"] == len(tokens_of(chunks)) < 60


@pytest.mark.parametrize(
    ("format_", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2}"}, r"[a-c]{3}-[0-9]{2}"),
        ({"choice": ["yes, please", "no (never)"]}, r"yes, please|no \(never\)"),
        ({"grammar": 'root ::= "a" ("b" | "c") "d"'}, "a[bc]d"),
        ({"grammar": 'start: "x" "y"'}, "xy"),
        ({"json": json.dumps({"type": "boolean"})}, "true|false"),
    ],
    ids=str,
)
def test_each_kind_of_format_is_kept(small: Path, format_: dict[str, Any], pattern: str) -> None:
    (chunks,) = answers(small, guided(**format_))

    assert re.fullmatch(pattern, text_of(small, chunks)) and chunks[-1]["finish_reason"] == "stop"


def test_an_answer_that_may_end_or_go_on_ends_with_the_models_own_end_or_its_length(small: Path) -> None:
    (chunks,) = answers(small, guided(regex="a*", max_tokens=7))
    text, reason = text_of(small, chunks), chunks[-1]["finish_reason"]

    assert re.fullmatch("a*", text)
    assert reason == ("stop" if tokens_of(chunks)[-1] == EOS else "length")


def test_an_answer_that_is_cut_by_its_length_says_so(small: Path) -> None:
    (chunks,) = answers(small, guided(json=SCHEMA, max_tokens=3))

    assert (3, "length") == (len(tokens_of(chunks)), chunks[-1]["finish_reason"])


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_complete_answer_ends_without_a_token_of_its_own_for_that(small: Path, ignore_eos: bool) -> None:
    request = guided(choice=["yes"])
    request["stop_conditions"] = {**request["stop_conditions"], "ignore_eos": ignore_eos}
    (chunks,) = answers(small, request)

    assert ("yes", "stop") == (text_of(small, chunks), chunks[-1]["finish_reason"])
    assert EOS not in tokens_of(chunks)


class Complex:
    """A guide whose format is too complex from the second token on."""

    finished = False

    def __init__(self) -> None:
        self.taken = 0

    def allowed(self) -> Any:
        return np.ones(4096, bool)

    def take(self, token: int) -> None:
        self.taken += 1
        if self.taken == 2:
            raise RequestError("too complex")


def test_a_format_that_grows_too_complex_ends_its_own_request_alone(bench: Bench) -> None:
    free, guided_ = (bench.add(request_for(prompt_of(20, seed), 5)) for seed in (1, 2))
    assert guided_.generation is not None
    guided_.generation.guide = Complex()  # type: ignore[assignment]
    while bench.scheduler.has_work:
        bench.step()

    assert [RequestError] == [type(each) for each in guided_.outputs[1:]]
    assert 5 == len(free.tokens) and free.last["finish_reason"] == "length"


def test_other_requests_of_the_same_batch_are_free(small: Path) -> None:
    async def body() -> list[Any]:
        async with running_engine(small) as engine:
            free = request_for(prompt_of(20), 5)
            alone = await collect(engine, free)
            _, beside = await asyncio.gather(collect(engine, guided(json=SCHEMA)), collect(engine, free))
            return [tokens_of(alone), tokens_of(beside)]

    alone, beside = run_async(body())

    assert alone == beside


def test_prefill_and_decode_workers_keep_to_one_format_together(small: Path) -> None:
    async def body() -> Any:
        async with running_pair(small) as pair:
            request = guided(json=SCHEMA)
            return await pair.run(request)

    assert json.loads(text_of(small, run_async(body())))["city"] in ("Ulm", "Trier")


def test_a_first_token_that_the_format_does_not_allow_ends_that_request_alone(small: Path) -> None:
    async def body() -> Any:
        async with running_pair(small) as pair:
            free = {**guided(), "sampling_options": {}}
            chunk = await pair.prefilled(free)
            with pytest.raises(RequestError, match="the format of the answer cannot be kept"):
                await collect(pair.decode, handed_over(guided(json=SCHEMA), chunk))
            return await pair.run(guided(json=SCHEMA))

    assert "rain" in text_of(small, run_async(body()))


@pytest.mark.parametrize(
    ("format_", "message"),
    [
        ({"json": {"type": "nonsense"}}, "response_format, tool_choice or guided_json: expected a format"),
        ({"json": "{"}, "response_format, tool_choice or guided_json: expected a format that can be kept"),
        ({"json": 3}, "response_format, tool_choice or guided_json: expected a JSON schema, got int"),
        ({"regex": "("}, "guided_regex: expected a format that can be kept, got: .*regex"),
        ({"regex": 3}, "guided_regex: expected a text, got int"),
        ({"choice": [1]}, "guided_choice: expected a list of texts, got list"),
        ({"choice": "a"}, "guided_choice: expected a list of texts, got str"),
        ({"grammar": "nonsense ("}, "guided_grammar: expected a format that can be kept"),
        ({"regex": "a", "choice": ["a"]}, "guided_regex and guided_choice: expected one format"),
        ({"regex": "a" * (MAX_BYTES + 1)}, "guided_regex: expected at most"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_what_is_no_format_is_refused_as_the_client_calls_it(
    small: Path, format_: dict[str, Any], message: str
) -> None:
    async def body() -> None:
        async with running_engine(small) as engine:
            with pytest.raises(InvalidRequest, match=message) as refused:
                await collect(engine, guided(**format_))
            assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)
            assert tokens_of(await collect(engine, guided(choice=["a"])))

    run_async(body())


def test_without_the_package_a_format_is_refused_with_what_to_install(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    wanted = parse_format(Fields({"choice": ["a"]}, "sampling_options.guided_decoding"))
    assert wanted is not None

    with pytest.raises(
        InvalidRequest, match=r"guided_choice: expected none, .*install 'vswa-plugin\[guided\]'"
    ):
        Grammars(small / "tokenizer.json", 4096, [EOS]).guide(wanted)


def test_a_tokenizer_that_cannot_be_read_is_said_to_be_that(tmp_path: Path) -> None:
    wanted = parse_format(Fields({"choice": ["a"]}, "sampling_options.guided_decoding"))
    assert wanted is not None

    with pytest.raises(RequestError, match=r"tokenizer\.json: expected a tokenizer, got"):
        Grammars(tmp_path / "tokenizer.json", 4096, []).guide(wanted)


@pytest.mark.parametrize("nothing", [{}, {"json": None, "choice": []}, {"json": False}])
def test_no_format_is_free_text(nothing: dict[str, Any]) -> None:
    assert parse_format(Fields(nothing, "sampling_options.guided_decoding")) is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_drawn_and_banned_ones_only_where_nothing_else_is_allowed(
    temperature: float,
) -> None:
    logits = np.array([5.0, 4.0, 3.0, 2.0], np.float32)
    params, allowed = SamplingParams(temperature=temperature), np.array([False, True, True, False])

    def drawn(banned: tuple[int, ...]) -> set[int]:
        rng = make_rng(1)
        return {sample(logits, params, rng, banned=banned, allowed=allowed).token for _ in range(60)}

    assert drawn(()) == ({1} if temperature == 0 else {1, 2})
    assert drawn((1,)) == {2}
    assert drawn((1, 2)) == ({1} if temperature == 0 else {1, 2})
    assert list(logits) == [5, 4, 3, 2]
