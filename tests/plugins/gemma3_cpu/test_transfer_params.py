"""What travels from prefill to decode worker: plain JSON, read back exactly, refused where it is not ours."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.transfer.params import TransferParams, parse_params

from vswa_plugin.errors import InvalidRequest

TOKENS = st.integers(0, 262_207)
LOGPROBS = st.floats(max_value=0.0, allow_nan=False, allow_infinity=False)
PARAMS = st.integers(1, 10**6).flatmap(
    lambda prompt_len: st.builds(
        TransferParams,
        host=st.sampled_from(["127.0.0.1", "::1", "prefill-0.prefill"]),
        port=st.integers(1, 65535),
        ticket=st.text("0123456789abcdef", min_size=32, max_size=32),
        fingerprint=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
        prompt_len=st.just(prompt_len),
        cached_tokens=st.integers(0, prompt_len - 1),
        first_token=TOKENS,
        first_logprob=st.none() | LOGPROBS,
        first_top=st.lists(st.tuples(TOKENS, LOGPROBS), max_size=4).map(tuple),
        prefill_worker_id=st.none() | st.integers(0, 2**64 - 1),
        prefill_dp_rank=st.none() | st.integers(0, 8),
    )
)
GOOD: dict[str, Any] = TransferParams(
    host="127.0.0.1",
    port=7000,
    ticket="0123456789abcdef" * 2,
    fingerprint="f",
    prompt_len=100,
    cached_tokens=64,
    first_token=9,
).to_json()


@given(PARAMS)
def test_params_survive_json(params: TransferParams) -> None:
    assert params == parse_params(json.loads(json.dumps(params.to_json(), allow_nan=False)))


def test_params_name_their_kind_and_version_and_leave_out_what_was_not_asked_for() -> None:
    assert {"kind": "gemma3_cpu", "version": 1}.items() <= GOOD.items()
    assert not {"first_logprob", "first_top", "prefill_worker_id", "prefill_dp_rank"} & set(GOOD)


def test_unknown_fields_are_ignored() -> None:
    assert parse_params(GOOD) == parse_params({**GOOD, "worker_id": {"prefill_worker_id": 3}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "trtllm"}, "expected kind 'gemma3_cpu', got 'trtllm'"),
        ({"version": 2}, "expected version 1, got 2"),
        ({"version": "1"}, r"Expected `int`, got `str` - at `\$.version`"),
        ({"port": 0}, r"at `\$.port`"),
        ({"port": 65536}, r"at `\$.port`"),
        ({"host": ""}, r"at `\$.host`"),
        ({"ticket": "0" * 31}, r"at `\$.ticket`"),
        ({"ticket": "G" * 32}, r"at `\$.ticket`"),
        ({"ticket": "0" * 32 + "\n"}, r"at `\$.ticket`"),
        ({"fingerprint": "f" * 1025}, r"at `\$.fingerprint`"),
        ({"prompt_len": 0}, r"at `\$.prompt_len`"),
        ({"cached_tokens": -1}, r"at `\$.cached_tokens`"),
        ({"cached_tokens": 100}, "cached_tokens below prompt_len, got 100 of 100 tokens"),
        ({"first_token": -1}, r"at `\$.first_token`"),
        ({"first_token": True}, r"at `\$.first_token`"),
        ({"first_logprob": "x"}, r"at `\$.first_logprob`"),
        ({"first_top": [[1, 2, 3]]}, r"at `\$.first_top\[0\]`"),
        ({"prefill_worker_id": -1}, r"at `\$.prefill_worker_id`"),
    ],
)
def test_a_field_that_is_not_ours_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_params({**GOOD, **change})


@pytest.mark.parametrize("name", list(GOOD))
def test_a_missing_field_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"missing required field `{name}`"):
        parse_params({key: value for key, value in GOOD.items() if key != name})


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda x: st.lists(x) | st.dictionaries(st.text(max_size=3), x),
    )
)
def test_anything_else_is_an_invalid_request(data: object) -> None:
    with pytest.raises(InvalidRequest, match=r"prefill_result.disaggregated_params: expected"):
        parse_params(data)


def test_an_error_never_quotes_the_ticket() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_params({**GOOD, "ticket": "secret"})

    assert "secret" not in str(caught.value)
