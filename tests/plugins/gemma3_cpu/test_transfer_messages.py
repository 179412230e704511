"""Messages of a KV transfer: what is framed comes back, what is broken is refused by its reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.transfer.messages import (
    LENGTH,
    MAX_FINGERPRINT,
    MAX_GROUPS,
    MAX_HEADER_BYTES,
    MAX_REASON,
    VERSION,
    Ack,
    BlocksHeader,
    Done,
    Nack,
    Pull,
    PullRefused,
    clip,
    decode_answer,
    decode_pull,
    decode_verdict,
    frame,
    payload_length,
)
from vswa_plugins.gemma3_cpu.transfer.plan import RUN_BYTES, GroupBlocks, fingerprint

from vswa_plugin.errors import ProtocolError

U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PULLS = st.builds(
    Pull,
    st.just(VERSION),
    st.text("0123456789abcdef", max_size=64),
    TEXT,
    st.lists(st.tuples(U64, U64), max_size=MAX_GROUPS).map(tuple),
)
ANSWERS = st.one_of(
    st.builds(BlocksHeader, U64, U64, U64, U64, U64), st.builds(Done, U64), st.builds(PullRefused, TEXT, U64)
)
VERDICTS = st.one_of(st.builds(Ack, U64), st.builds(Nack, TEXT))
DECODERS = (decode_pull, decode_answer, decode_verdict)


def payload(framed: bytes) -> bytes:
    assert payload_length(framed[:4]) == len(framed) - 4
    return framed[4:]


@given(PULLS)
def test_a_pull_survives_the_wire(pull: Pull) -> None:
    assert pull == decode_pull(payload(frame(pull)))


@given(ANSWERS)
def test_an_answer_survives_the_wire(answer: BlocksHeader | Done | PullRefused) -> None:
    assert answer == decode_answer(payload(frame(answer)))


@given(VERDICTS)
def test_a_verdict_survives_the_wire(verdict: Ack | Nack) -> None:
    assert verdict == decode_verdict(payload(frame(verdict)))


@given(st.binary(max_size=100), st.sampled_from(DECODERS))
@example(b"\x92\xa1\x80", DECODERS[0]).via("a tag that is not UTF-8")
@example(b"\x92\xa1\x80", DECODERS[1]).via("a tag that is not UTF-8")
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(data: bytes, decode: Any) -> None:
    try:
        decode(data)
    except ProtocolError as error:
        assert str(error).startswith("expected ")


@pytest.mark.parametrize("decode", DECODERS)
def test_a_deeply_nested_payload_is_refused(decode: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(b"\x91" * 10_000 + b"\x90")


@given(st.integers(0, 2**32 - 1))
def test_a_length_over_the_limit_is_refused_before_anything_is_allocated(length: int) -> None:
    if length <= MAX_HEADER_BYTES:
        assert length == payload_length(LENGTH.pack(length))
    else:
        with pytest.raises(ProtocolError, match=f"at most {MAX_HEADER_BYTES} bytes, got one of {length}"):
            payload_length(LENGTH.pack(length))


@pytest.mark.parametrize("version", [0, 2, 2**64 - 1])
def test_a_pull_of_another_version_is_refused_by_its_version_whatever_its_shape(version: int) -> None:
    with pytest.raises(ProtocolError, match=f"transfer version 1, got version {version}"):
        decode_pull(msgspec.msgpack.encode(["pull", version, {"all": "different"}]))


def test_fields_that_a_later_version_appends_are_ignored() -> None:
    assert Done(5) == decode_answer(msgspec.msgpack.encode(["done", 5, "new"]))
    assert Pull(1, "t", "f", ()) == decode_pull(msgspec.msgpack.encode(["pull", 1, "t", "f", [], 7]))


@pytest.mark.parametrize(
    "fields",
    [
        ["x" * 65, "f", []],
        ["t", "f" * (MAX_FINGERPRINT + 1), []],
        ["t", "f", [[0, 1]] * (MAX_GROUPS + 1)],
        ["t", "f", [[0, -1]]],
        ["t", "f", [[0, 1, 2]]],
        ["t", "f"],
    ],
)
def test_a_pull_with_a_field_out_of_its_bounds_is_refused(fields: list[object]) -> None:
    with pytest.raises(ProtocolError, match="expected a pull, got"):
        decode_pull(msgspec.msgpack.encode(["pull", VERSION, *fields]))


def test_the_largest_messages_stay_below_the_limit() -> None:
    wide = "\U0010ffff"
    pull = Pull(VERSION, wide * 64, wide * MAX_FINGERPRINT, ((2**64 - 1,) * 2,) * MAX_GROUPS)

    assert pull == decode_pull(payload(frame(pull)))
    assert Nack(wide * MAX_REASON) == decode_verdict(payload(frame(Nack(clip(wide * 9999)))))


@given(
    st.integers(0, 50), st.integers(-2, 50), st.sampled_from([1, 1000, RUN_BYTES // 3, RUN_BYTES, 5 << 20])
)
def test_runs_cover_each_block_once_and_stay_within_the_buffer(first: int, length: int, size: int) -> None:
    group = GroupBlocks(range(first, first + length), size)
    runs = list(group.runs())

    assert list(group.blocks) == [block for start, stop in runs for block in range(start, stop)]
    assert all((stop - start) * size <= max(RUN_BYTES, size) for start, stop in runs)
    assert group.run_bytes == max(((stop - start) * size for start, stop in runs), default=0)
    assert group.bounds[0] <= group.bounds[1]


def test_a_fingerprint_tells_every_difference_and_no_other() -> None:
    groups = [(512, 24), (None, 40)]
    made = fingerprint({"a": 1, "b": [2, None]}, "float32", 32, groups)
    others = [
        fingerprint({"a": 2, "b": [2, None]}, "float32", 32, groups),
        fingerprint({"a": 1, "b": [2, None]}, "float16", 32, groups),
        fingerprint({"a": 1, "b": [2, None]}, "float32", 16, groups),
        fingerprint({"a": 1, "b": [2, None]}, "float32", 32, [(512, 24), (None, 41)]),
        fingerprint({"a": 1, "b": [2, None]}, "float32", 32, [(1024, 24), (None, 40)]),
        fingerprint({"a": 1, "b": [2, None]}, "float32", 32, groups[::-1]),
    ]

    assert made == fingerprint({"b": [2, None], "a": 1}, "float32", 32, groups)
    assert made.endswith("dtype=float32 block_size=32 groups=512:24,global:40")
    assert len({made, *others}) == 7
