"""What a worker raises, on its way through the router to the frontend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from dynamo.llm import HttpError
from dynamo.llm.exceptions import CannotConnect, Disconnected, InvalidArgument

from vswa_plugin.blocks.hashing import sequence_hashes, sequence_hashes_of_tokens
from vswa_plugin.dynamo.client import (
    Unreached,
    WorkerClient,
    WorkerHttpError,
    _from_dynamo,
    _to_dynamo,
    namespaced_sequence_hashes,
)
from vswa_plugin.dynamo.names import EndpointName
from vswa_plugin.dynamo.runtime import namespaced_block_hash
from vswa_plugin.errors import InvalidRequest, Overloaded, RequestError, Unavailable
from vswa_plugin.selection import NoCandidate

# As Client.direct raises them.
OVERLOADED = ValueError('Unavailable: {"message":"queue full","code":503}')
NOT_FOUND = ValueError('NotFound: {"message":"nope","code":404}')
STREAM_ENDED = ValueError("Unavailable: Stream ended before generation completed")
NOT_LISTED = Exception("Unavailable: instance_id=12 not found for endpoint a/b/c")


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (InvalidArgument("too long"), InvalidRequest, "too long"),
        (ValueError("InvalidRequest: ValueError: bad"), InvalidRequest, "ValueError: bad"),
        (OVERLOADED, Overloaded, "queue full"),
        (NOT_FOUND, WorkerHttpError, "nope"),
        (ValueError("Internal: RuntimeError: bug"), WorkerHttpError, "RuntimeError: bug"),
        (STREAM_ENDED, Unavailable, "Stream ended before generation completed"),
        (NOT_LISTED, Unreached, "instance_id=12 not found for endpoint a/b/c"),
        (RuntimeError("odd"), Unavailable, "odd"),
    ],
)
def test_a_workers_error_is_known_again(raised: Exception, kind: type[Exception], message: str) -> None:
    unavailable = Unreached if raised is NOT_LISTED else Unavailable
    found = _from_dynamo(raised, unavailable)

    assert type(found) is kind
    assert str(found) == message


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (InvalidRequest("m"), InvalidArgument, None),
        (Overloaded("m"), HttpError, 503),
        (NoCandidate("m"), HttpError, 503),
        (WorkerHttpError(404, "m"), HttpError, 404),
        (Unavailable("m"), Disconnected, None),
        (Unreached("m"), CannotConnect, None),
    ],
)
def test_the_frontend_is_told_by_the_exception_that_it_understands(
    error: RequestError, kind: type[Exception], code: int | None
) -> None:
    mapped = _to_dynamo(error)

    assert type(mapped) is kind
    assert getattr(mapped, "code", None) == code
    assert str(mapped).endswith("m")


@pytest.mark.parametrize(("salt", "lora"), [(None, None), ("s", None), (None, "l"), ("s", "l")])
def test_a_prompt_is_hashed_as_its_worker_names_its_blocks(salt: str | None, lora: str | None) -> None:
    tokens = list(range(40))
    blocks = [namespaced_block_hash(tokens[at : at + 16], salt, lora) for at in (0, 16)]
    hashes = namespaced_sequence_hashes(tokens, 16, salt, lora)

    assert list(hashes) == sequence_hashes(blocks)
    assert (hashes == sequence_hashes_of_tokens(tokens, 16)) is (salt is None and lora is None)


class _Prefill:
    """Stands for Dynamo's client of prefill workers: says what it was given, or raises it."""

    def __init__(self, answer: dict[str, Any] | Exception) -> None:
        self._answer = answer
        self.called: list[tuple[Any, ...]] = []

    async def direct(self, request: Any, worker_id: int, annotated: bool) -> AsyncIterator[dict[str, Any]]:
        self.called.append((request, worker_id))

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            if isinstance(self._answer, Exception):
                raise self._answer
            yield self._answer

        return chunks()


@pytest.mark.parametrize("released", [True, False])
def test_a_prompt_is_released_by_a_request_of_its_own(released: bool) -> None:
    dynamo = _Prefill({"released": released})
    client = WorkerClient(EndpointName("n", "c", "e"), dynamo)

    assert released is asyncio.run(client.release(7, {"ticket": 1}))
    assert [({"vswa_release": {"ticket": 1}}, 7)] == dynamo.called


def test_a_worker_that_knows_no_release_refuses_it_as_a_request() -> None:
    refused = InvalidArgument("token_ids: expected token ids, got nothing")
    client = WorkerClient(EndpointName("n", "c", "e"), _Prefill(refused))

    with pytest.raises(InvalidRequest, match="token_ids"):
        asyncio.run(client.release(7, {"ticket": 1}))


class _Stopped:
    context = None

    def stopped(self) -> bool:
        return False


class _Hanging:
    """Stands for Dynamo's client: one chunk, then silence."""

    async def direct(self, *_: Any, **__: Any) -> AsyncIterator[dict[str, Any]]:
        async def chunks() -> AsyncIterator[dict[str, Any]]:
            yield {"token_ids": [1]}
            await asyncio.Event().wait()

        return chunks()


def test_a_worker_that_is_given_up_ends_its_streams_and_no_others() -> None:
    async def check() -> None:
        client = WorkerClient(EndpointName("n", "c", "e"), _Hanging())
        streams = [client.generate({}, worker_id, _Stopped()) for worker_id in (1, 2)]  # type: ignore[arg-type]
        assert not client.busy(1)
        for stream in streams:
            await anext(stream)
        assert client.busy(1)

        client.give_up(1, "nothing is heard of it")
        client.give_up(1, "again")
        with pytest.raises(Unavailable, match="nothing is heard of it"):
            await anext(streams[0])

        assert (False, True) == (client.busy(1), client.busy(2))
        other = asyncio.ensure_future(anext(streams[1]))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not other.done()
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        assert not client.busy(2)

    asyncio.run(asyncio.wait_for(check(), 10))
