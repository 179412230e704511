"""From vLLM's outputs to Dynamo's chunks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vswa_plugins.vllm.answer import Answer

from vswa_plugin.errors import RequestError


def output(tokens: list[int], reason: str | None = None, cached: int | None = 0, **more: Any) -> Any:
    made = {"token_ids": tokens, "finish_reason": reason, "stop_reason": None, "logprobs": None, **more}
    return SimpleNamespace(outputs=[SimpleNamespace(**made)], num_cached_tokens=cached)


def likely(**by_rank: float) -> dict[int, Any]:
    """``t5=-0.5``: token 5; ranks in the order given."""
    return {
        int(name[1:]): SimpleNamespace(logprob=value, rank=rank)
        for rank, (name, value) in enumerate(by_rank.items(), 1)
    }


def test_each_chunk_has_the_new_tokens_and_the_last_one_the_usage() -> None:
    answer = Answer(100, None)
    chunks = [answer.chunk(output([7])), answer.chunk(output([8, 9], "length"))]
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 3,
        "total_tokens": 103,
        "prompt_tokens_details": {"cached_tokens": 0},
    }

    assert {"token_ids": [7], "index": 0} == chunks[0]
    assert {"token_ids": [8, 9], "index": 0, "finish_reason": "length", "completion_usage": usage} == chunks[
        1
    ]
    assert answer.finished


def test_an_output_without_anything_new_makes_no_chunk() -> None:
    assert Answer(100, None).chunk(output([])) is None


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    """vLLM looks a preempted prompt up again, by then with what was generated."""
    answer = Answer(100, None)
    for cached in (None, 32, 96):
        answer.chunk(output([7], cached=cached))

    assert 32 == answer.cached_tokens


def test_the_last_token_of_the_prompt_is_never_cached() -> None:
    answer = Answer(100, None)
    answer.chunk(output([7], cached=100))

    assert 99 == answer.cached_tokens


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("abort", "cancelled"),
        ("error", "error"),
        ("repetition", "stop"),
        ("something new", "error"),
    ],
)
def test_reasons_are_dynamos(theirs: str, ours: str) -> None:
    chunk = Answer(9, None).chunk(output([7], theirs, stop_reason=7))
    assert chunk is not None

    assert (ours, 7) == (chunk["finish_reason"], chunk["stop_reason"])


def test_log_probabilities_are_the_drawn_tokens_own_and_the_likeliest_ones() -> None:
    given = [likely(t5=-0.5, t6=-1.0, t7=-2.0)]
    chunk = Answer(9, 2).chunk(output([7], logprobs=given))
    assert chunk is not None

    assert [-2.0] == chunk["log_probs"]
    assert [[(1, 5, -0.5), (2, 6, -1.0)]] == [
        [(each["rank"], each["token_id"], each["logprob"]) for each in at] for at in chunk["top_logprobs"]
    ]


def test_with_none_of_the_likeliest_the_drawn_token_stands_alone() -> None:
    chunk = Answer(9, 0).chunk(output([7], logprobs=[likely(t5=-0.5, t7=-2.0)]))
    assert chunk is not None

    assert [[7]] == [[each["token_id"] for each in at] for at in chunk["top_logprobs"]]


@pytest.mark.parametrize(
    "broken",
    [
        SimpleNamespace(outputs=[], num_cached_tokens=0),
        SimpleNamespace(outputs=None, num_cached_tokens=0),
        SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])], num_cached_tokens=0),
        output(["x"]),  # type: ignore[list-item]
        output([7], logprobs=[likely(t5=-0.5)]),
        output([7, 8], logprobs=[likely(t7=-0.5)]),
    ],
    ids=str,
)
def test_an_output_of_another_shape_ends_its_request_alone(broken: Any) -> None:
    with pytest.raises(RequestError, match="vLLM gave an output that cannot be read"):
        Answer(9, 1).chunk(broken)
