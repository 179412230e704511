"""A result that is not what it should be ends its request with an error that says so, and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tensorrt_llm_helpers import NIXL, OPTIONS, Started, asked, tokens_of
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin
from tests.tensorrt_llm_package import CompletionOutput, RequestOutput
from vswa_plugin.errors import InvalidRequest, RequestError, Unavailable

MISSING = object()


class Raises:
    """A field whose own code fails."""

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError(f"no {name}")

    def __len__(self) -> int:
        raise ZeroDivisionError


#: Of each field that is read: what it must not be, in the first result or in the last one.
FAULTS: dict[str, tuple[object, ...]] = {
    "outputs": (MISSING, None, [], "text", 5, {}, [None]),
    "finished": (MISSING, None, "yes", 1),
    "cached_tokens": ("many", 1.5, [], True),
    "outputs[0].token_ids": (MISSING, None, "1", 7, [None], ["4"], [1.5], [True], [-1], [2**40], [[3]]),
    "outputs[0].logprobs": (MISSING, 5, "x", [None], [{}], [{4: None}], [{"a": -1}], ["-1"], [[-1.0]]),
    "outputs[0].finish_reason": (MISSING, 3, ["stop"], b"stop"),
    "outputs[0].stop_reason": ([4], 1.5, object()),
}
CASES = [(field, value) for field, values in FAULTS.items() for value in values]
#: Values that some release gives, or that mean nothing was said.
TOLERATED = [
    ("cached_tokens", MISSING),
    ("cached_tokens", None),
    ("outputs[0].stop_reason", MISSING),
    ("outputs[0].stop_reason", "###"),
    ("outputs[0].logprobs", None),
    ("outputs[0].logprobs", [-0.5]),
    ("more", "a field that is new"),
]


def broken(result: RequestOutput, field: str, value: object) -> SimpleNamespace:
    """The last state of ``result`` with a fault in one field."""
    output = {
        each.name: getattr(result.outputs[0], each.name) for each in dataclasses.fields(CompletionOutput)
    }
    state: dict[str, Any] = {"finished": result.finished, "cached_tokens": result.cached_tokens}
    place, name = (output, field.split(".")[1]) if "." in field else (state, field)
    place[name] = value
    if value is MISSING:
        del place[name]
    if field != "outputs":
        state["outputs"] = [SimpleNamespace(**output)]
    return SimpleNamespace(**state)


@pytest.fixture
def started(standin: None, model: Path, request: pytest.FixtureRequest) -> Iterator[Started]:
    mode = getattr(request, "param", "agg")
    made = Started(model, OPTIONS | (NIXL if mode != "agg" else {}), mode)
    yield made
    made.engine.stop()


@pytest.fixture
def break_next(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a fault into the next states of the request whose prompt begins with 99."""
    advance = RequestOutput.__anext__

    def fault(field: str, value: object) -> None:
        async def faulty(self: RequestOutput) -> Any:
            state = await advance(self)
            return broken(state, field, value) if state._prompt[0] == 99 else state

        monkeypatch.setattr(RequestOutput, "__anext__", faulty)

    return fault


async def beside_another(started: Started, max_tokens: int) -> tuple[Any, list[Any]]:
    """What becomes of the faulty request, and of one that runs at the same time."""

    async def ask(prompt: list[int], tokens: int) -> list[Any]:
        return [chunk async for chunk in started.engine.generate(asked(prompt, tokens))]

    return tuple(await asyncio.gather(ask([99, 1], max_tokens), ask([1, 2, 3], 5), return_exceptions=True))  # type: ignore[return-value]


@pytest.mark.parametrize("max_tokens", [1, 3])
@pytest.mark.parametrize(("field", "value"), CASES)
def test_the_request_ends_with_an_error_that_names_the_field(
    started: Started, break_next: Any, field: str, value: object, max_tokens: int
) -> None:
    break_next(field, value)
    error, other = asyncio.run(beside_another(started, max_tokens))

    assert isinstance(error, RequestError), error
    assert not isinstance(error, Unavailable | InvalidRequest)
    words = f"a result that cannot be read: {field if value != [None] or '.' in field else 'outputs[0]'}"
    assert words in str(error) and ": expected " in str(error)
    assert [4, 5, 6, 7, 8] == tokens_of(other)
    assert started.engine.failure() is None
    assert started.engine.stats()["running"] == 0


@pytest.mark.parametrize("field", FAULTS)
def test_a_value_whose_own_code_fails_ends_its_request_alone(
    started: Started, break_next: Any, field: str
) -> None:
    break_next(field, Raises())
    error, other = asyncio.run(beside_another(started, 1))

    assert isinstance(error, RequestError) and "a result that cannot be read" in str(error)
    assert 5 == len(tokens_of(other))
    assert started.engine.failure() is None


@pytest.mark.parametrize(("field", "value"), TOLERATED)
def test_what_a_release_may_leave_out_or_add_is_no_fault(
    started: Started, break_next: Any, field: str, value: object
) -> None:
    break_next(field, value)
    chunks, _ = asyncio.run(beside_another(started, 1))

    assert [2] == tokens_of(chunks)


def test_tokens_that_are_fewer_than_before_are_a_fault(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = RequestOutput.__anext__

    async def shrinking(self: RequestOutput) -> Any:
        state = await advance(self)
        return state if len(state.outputs[0].token_ids) < 3 else broken(state, "outputs[0].token_ids", [1])

    monkeypatch.setattr(RequestOutput, "__anext__", shrinking)
    with pytest.raises(RequestError, match="expected the 2 that came before, and more, got '1 of them'"):
        started.ask(asked([99, 1], 5))


@pytest.mark.parametrize(
    "raised", [AttributeError("no such field"), KeyError("logprobs"), AssertionError("x")]
)
def test_a_fault_in_the_engines_own_code_for_one_result_ends_its_request_alone(
    started: Started, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    advance = RequestOutput.__anext__

    async def fails(self: RequestOutput) -> Any:
        if self._prompt[0] == 99:
            raise raised
        return await advance(self)

    monkeypatch.setattr(RequestOutput, "__anext__", fails)
    error, other = asyncio.run(beside_another(started, 3))

    assert f"could not make a result of this request: {type(raised).__name__}" in str(error)
    assert type(error) is RequestError
    assert 5 == len(tokens_of(other))
    assert started.engine.failure() is None
    assert started.llm.requests[0].aborted


def test_a_fault_of_code_while_the_executor_is_dead_is_the_end_of_the_engine(started: Started) -> None:
    started.llm.error = AttributeError("no executor")
    started.llm.healthy = False

    with pytest.raises(Unavailable, match="the engine has failed: AttributeError: no executor"):
        started.ask(asked([1]))
    assert "TensorRT-LLM says that its executor is not healthy" == started.engine.failure()


def test_a_fault_of_code_before_a_request_is_admitted_ends_it_alone(started: Started) -> None:
    started.llm.refusal = AttributeError("no such thing")

    with pytest.raises(RequestError, match="could not take this request: AttributeError: no such thing"):
        started.ask(asked([1]))
    assert started.engine.failure() is None


@pytest.mark.parametrize("started", ["prefill"], indirect=True)
@pytest.mark.parametrize("value", [5, {"opaque_state": b""}, object()])
def test_a_handover_that_is_none_ends_its_request_alone(
    started: Started, break_next: Any, value: object
) -> None:
    break_next("outputs[0].disaggregated_params", value)
    error, other = asyncio.run(beside_another(started, 1))

    assert "disaggregated_params: expected DisaggregatedParams" in str(error)
    assert "disaggregated_params" in other[-1]
    assert started.engine.failure() is None
    assert 1 == started.engine.stats()["requests"]
