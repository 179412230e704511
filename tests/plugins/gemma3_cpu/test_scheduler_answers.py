"""What ends an answer, and what its chunks say, one step at a time."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gemma3_engine_helpers import CONTEXT, Bench, Cold, prompt_of, request_for
from tests.gemma3_engine_helpers import bench as bench
from tests.gemma3_engine_helpers import cold as cold
from tests.gemma3_engine_helpers import model as model
from tests.gemma3_engine_helpers import small as small


def test_the_last_chunk_has_reason_and_usage(bench: Bench) -> None:
    [reader] = bench.run(request_for(prompt_of(20), 3))

    assert [{"token_ids": [token], "index": 0} for token in reader.tokens[:2]] == reader.outputs[:2]
    assert {
        "token_ids": reader.tokens[2:],
        "index": 0,
        "finish_reason": "length",
        "completion_usage": {
            "prompt_tokens": 20,
            "completion_tokens": 3,
            "total_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    } == reader.last


def first_tokens(cold: Cold, count: int = 6) -> tuple[list[int], list[int]]:
    """A prompt, and the greedy answer to it, without repetitions."""
    for seed in range(50):
        answer = cold.greedy(prompt_of(20, seed), count)
        if len(set(answer)) == count:
            return prompt_of(20, seed), answer
    raise AssertionError("no prompt with an answer of distinct tokens")


@pytest.mark.parametrize(
    ("where", "key"), [("stop_conditions", "stop_token_ids"), ("stop_conditions", "stop_token_ids_hidden")]
)
def test_a_stop_token_ends_the_answer(bench: Bench, cold: Cold, where: str, key: str) -> None:
    prompt, answer = first_tokens(cold)

    [reader] = bench.run(request_for(prompt, 6, **{where: {key: [answer[3]]}}))

    assert (answer[:4], "stop") == (reader.tokens, reader.last["finish_reason"])


def test_an_eos_token_ends_the_answer_unless_it_is_ignored(bench: Bench, cold: Cold) -> None:
    prompt, answer = first_tokens(cold)
    eos = {"eos_token_ids": [answer[2]]}
    # Dynamo repeats the eos ids among the hidden stop ids.
    ignored = {"ignore_eos": True, "stop_token_ids_hidden": [answer[2]]}

    stopped, going_on = bench.run(
        request_for(prompt, 6, **eos), request_for(prompt, 6, **eos, stop_conditions=ignored)
    )

    assert (answer[:3], "stop") == (stopped.tokens, stopped.last["finish_reason"])
    assert (answer, "length") == (going_on.tokens, going_on.last["finish_reason"])


def test_min_tokens_keeps_stop_tokens_away(bench: Bench, cold: Cold) -> None:
    prompt, answer = first_tokens(cold)
    stop = {"stop_token_ids": [answer[1]]}

    early, late = bench.run(
        request_for(prompt, 6, stop_conditions={**stop, "min_tokens": 1}),
        request_for(prompt, 6, stop_conditions={**stop, "min_tokens": 2}),
    )

    assert (answer[:2], "stop") == (early.tokens, early.last["finish_reason"])
    assert answer[:1] == late.tokens[:1] and len(late.tokens) > 2
    assert answer[1] not in late.tokens[:2]


def test_an_answer_ends_at_the_context(bench: Bench) -> None:
    [reader] = bench.run(request_for(prompt_of(CONTEXT - 5), 100))

    assert (5, "length") == (len(reader.tokens), reader.last["finish_reason"])


def test_log_probabilities_come_with_the_tokens(bench: Bench, cold: Cold) -> None:
    prompt = prompt_of(20)

    [reader] = bench.run(request_for(prompt, 2, output_options={"logprobs": 2}))

    logits = cold.logits(prompt).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum())
    [first], [top] = reader.outputs[0]["log_probs"], reader.outputs[0]["top_logprobs"]  # type: ignore[index]
    assert float(logprobs.max()) == pytest.approx(first, abs=1e-4)
    assert [(1, reader.tokens[0]), (2, int(logprobs.argsort()[-2]))] == [
        (t["rank"], t["token_id"]) for t in top
    ]


def test_the_same_seed_gives_the_same_answer_in_any_company(bench: Bench) -> None:
    seeded = request_for(prompt_of(20), 12, sampling_options={"temperature": 1.0, "seed": 42})
    other = request_for(prompt_of(20), 12, sampling_options={"temperature": 1.0, "seed": 43})

    [alone] = bench.run(seeded)
    together = bench.run(other, seeded, other, seeded)

    assert alone.tokens == together[1].tokens == together[3].tokens
    assert alone.tokens != together[0].tokens == together[2].tokens
