"""What a worker raises, on its way through the router to the frontend."""

from __future__ import annotations

import pytest
from dynamo.llm import HttpError
from dynamo.llm.exceptions import CannotConnect, Disconnected, InvalidArgument

from vswa_plugin.dynamo import namespaced_block_hash
from vswa_plugin.dynamo_client import Refused, Unreached, _from_dynamo, _to_dynamo, namespaced_sequence_hashes
from vswa_plugin.errors import InvalidRequest, Overloaded, RequestError, Unavailable
from vswa_plugin.hashing import sequence_hashes, sequence_hashes_of_tokens
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
        (NOT_FOUND, Refused, "nope"),
        (ValueError("Internal: RuntimeError: bug"), Refused, "RuntimeError: bug"),
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
        (Refused(404, "m"), HttpError, 404),
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
    assert (list(hashes) == sequence_hashes_of_tokens(tokens, 16)) is (salt is None and lora is None)
