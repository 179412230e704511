"""Joined chunks: the same stream in fewer pieces, and never later than it would be by itself."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswa_plugin.dynamo.bursts import joined
from vswa_plugin.engine.contract import ChunkDict

#: Seconds apart: a test in which this passes has failed.
FOR_EVER = 1_000.0


async def _stream(chunks: Sequence[ChunkDict], error: Exception | None = None) -> AsyncIterator[ChunkDict]:
    for chunk in chunks:
        yield dict(chunk)
    if error is not None:
        raise error


def _passed_on(chunks: Sequence[ChunkDict], apart_s: float) -> list[ChunkDict]:
    async def collect() -> list[ChunkDict]:
        return [chunk async for chunk in joined(_stream(chunks), apart_s)]

    return asyncio.run(collect())


def _tokens(*token_ids: int, **more: Any) -> ChunkDict:
    return {"token_ids": list(token_ids), "index": 0, **more}


def test_a_burst_becomes_one_chunk_after_the_first() -> None:
    burst = [_tokens(1), _tokens(2), _tokens(3, 4), _tokens(5, finish_reason="length")]

    assert [_tokens(1), _tokens(2, 3, 4, 5, finish_reason="length")] == _passed_on(burst, FOR_EVER)


def test_log_probs_stay_with_their_tokens() -> None:
    burst = [_tokens(n, log_probs=[-n / 8], top_logprobs=[[{"token_id": n}]]) for n in range(3)]
    end = _tokens(finish_reason="stop", log_probs=[], top_logprobs=[])

    whole = _passed_on([*burst, end], FOR_EVER)[1]

    assert [1, 2] == whole["token_ids"]
    assert [-1 / 8, -2 / 8] == whole["log_probs"]
    assert [[{"token_id": 1}], [{"token_id": 2}]] == whole["top_logprobs"]


@pytest.mark.parametrize(
    "odd",
    [
        {"token_ids": [2], "index": 1},
        {"token_ids": [2], "index": 0, "log_probs": [-1.0]},
        {"index": 0, "finish_reason": "error"},
    ],
    ids=["another choice", "log probs", "no tokens"],
)
def test_chunks_that_do_not_fit_together_stay_apart(odd: ChunkDict) -> None:
    chunks = [_tokens(0), _tokens(1), odd]
    end = {**odd, "finish_reason": "stop"}

    found = _passed_on([*chunks, end], FOR_EVER)

    assert [_tokens(0), _tokens(1)] == found[:2]


def _flat(chunks: Sequence[ChunkDict]) -> list[tuple[Any, ...]]:
    """Every token with its choice and log prob, and all else at its place among them."""
    flat: list[tuple[Any, ...]] = []
    for chunk in chunks:
        probs = chunk.get("log_probs")
        for at, token in enumerate(chunk["token_ids"]):
            flat.append((chunk["index"], token, probs[at] if probs is not None else None))
        flat += [(name, chunk[name]) for name in sorted(chunk) if name in ("finish_reason", "extra_args")]
    return flat


@st.composite
def _chunk(draw: st.DrawFn) -> ChunkDict:
    chunk: ChunkDict = {
        "token_ids": draw(st.lists(st.integers(0, 9), max_size=3)),
        "index": draw(st.integers(0, 1)),
    }
    if draw(st.booleans()):
        chunk["log_probs"] = [-float(token) for token in chunk["token_ids"]]
    extra = draw(st.sampled_from([None, None, "finish_reason", "extra_args"]))
    return chunk if extra is None else {**chunk, extra: draw(st.integers(0, 9))}


@given(chunks=st.lists(_chunk(), max_size=12), apart_s=st.sampled_from([0.0, 1e-4]))
def test_the_stream_says_the_same_however_it_is_cut(chunks: list[ChunkDict], apart_s: float) -> None:
    assert _flat(chunks) == _flat(_passed_on(chunks, apart_s))


def test_chunks_that_come_apart_are_left_alone() -> None:
    chunks = [_tokens(n) for n in range(5)]

    assert chunks == _passed_on(chunks, 0.0)


def test_what_is_held_back_is_passed_on_in_time_though_nothing_follows() -> None:
    async def check() -> None:
        seen = asyncio.Event()

        async def waiting() -> AsyncIterator[ChunkDict]:
            yield _tokens(1)
            yield _tokens(2)
            await seen.wait()  # for ever, if chunk 2 waits for chunk 3
            yield _tokens(3)

        found = []
        async for chunk in joined(waiting(), 0.01):
            found.append(chunk)
            if chunk["token_ids"] == [2]:
                seen.set()
        assert [_tokens(1), _tokens(2), _tokens(3)] == found

    asyncio.run(asyncio.wait_for(check(), 10))


def test_an_error_comes_after_all_that_came_before_it() -> None:
    async def check() -> None:
        found: list[ChunkDict] = []
        stream = joined(_stream([_tokens(1), _tokens(2), _tokens(3)], ValueError("lost")), FOR_EVER)
        with pytest.raises(ValueError, match="lost"):
            while True:
                found.append(await anext(stream))
        assert [_tokens(1), _tokens(2, 3)] == found

    asyncio.run(check())


@pytest.mark.parametrize("apart_s", [0.0, FOR_EVER])
def test_a_stream_that_is_given_up_ends_with_the_reason_after_all_that_came(apart_s: float) -> None:
    async def hanging() -> AsyncIterator[ChunkDict]:
        yield _tokens(1)
        yield _tokens(2)
        await asyncio.Event().wait()

    async def check() -> None:
        lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        stream = joined(hanging(), apart_s, lost)
        asyncio.get_running_loop().call_later(0.02, lost.set_result, ValueError("given up"))
        assert [_tokens(1), _tokens(2)] == [await anext(stream), await anext(stream)]
        with pytest.raises(ValueError, match="given up"):
            await anext(stream)

    asyncio.run(asyncio.wait_for(check(), 10))


def test_a_stream_that_is_given_up_between_two_chunks_ends_too() -> None:
    async def check() -> None:
        lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        stream = joined(_stream([_tokens(n) for n in range(9)]), 0.0, lost)
        await anext(stream)
        lost.set_result(ValueError("given up"))
        with pytest.raises(ValueError, match="given up"):
            await anext(stream)

    asyncio.run(check())


def test_whoever_cancels_the_reader_cancels_it() -> None:
    async def hanging() -> AsyncIterator[ChunkDict]:
        await asyncio.Event().wait()
        yield _tokens(1)

    async def check() -> None:
        lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        reader = asyncio.ensure_future(anext(joined(hanging(), 0.0, lost)))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    asyncio.run(asyncio.wait_for(check(), 10))


def test_one_chunk_is_asked_for_ahead_and_no_more() -> None:
    asked = 0

    async def counting() -> AsyncIterator[ChunkDict]:
        nonlocal asked
        for n in range(50):
            asked += 1
            yield _tokens(n)

    async def check() -> None:
        stream = joined(counting(), 0.0)
        await anext(stream)
        for _ in range(5):
            await asyncio.sleep(0)
        assert asked == 2
        await stream.aclose()

    asyncio.run(check())


@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_that_is_left_behind_leaves_nothing_behind(fails: bool) -> None:
    ended = asyncio.Event()
    complaints: list[dict[str, Any]] = []

    async def endless() -> AsyncIterator[ChunkDict]:
        try:
            yield _tokens(1)
            if fails:
                raise ValueError("nobody is told")
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        stream = joined(endless(), 0.0)
        await anext(stream)
        for _ in range(5):  # until it waits, or has failed
            await asyncio.sleep(0)
        await stream.aclose()
        await asyncio.wait_for(ended.wait(), 10)
        gc.collect()

    asyncio.run(check())
    gc.collect()
    assert not complaints
