"""What is read of a client's request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vswa_plugin.router.picker.requests import Unreadable, read

MESSAGES = [{"role": "user", "content": "Hi"}]


def routed(headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return read(json.dumps({"model": "m", **fields}).encode(), headers or {})


@pytest.mark.parametrize(
    ("fields", "routing"),
    [
        ({"prompt": "Hi"}, {}),
        ({"cache_salt": "a"}, {"cache_salt": "a"}),
        ({"nvext": {"cache_salt": "b"}}, {"cache_salt": "b"}),
        ({"cache_salt": "a", "nvext": {"cache_salt": "b"}}, {"cache_salt": "b"}),
        ({"nvext": None}, {}),
        (
            {"nvext": {"backend_instance_id": 2**63, "dp_rank": 1}},
            {"backend_instance_id": 2**63, "dp_rank": 1},
        ),
        (
            {"nvext": {"prefill_worker_id": 1, "prefill_dp_rank": 2, "decode_worker_id": 3, "other": [4]}},
            {"prefill_worker_id": 1, "prefill_dp_rank": 2, "decode_worker_id": 3},
        ),
        (
            {"nvext": {"routing_constraints": {"required_taints": ["a"]}}},
            {"routing_constraints": {"required_taints": ["a"]}},
        ),
    ],
)
def test_its_routing_is_what_dynamos_frontend_makes_of_it(fields: dict[str, Any], routing: Any) -> None:
    assert routing == routed(**fields).routed["routing"]


@pytest.mark.parametrize(
    ("fields", "scorable"),
    [
        ({"prompt": "Hi", "logprobs": 3}, True),
        ({"prompt": "Hi", "prompt_logprobs": 0}, False),
        ({"prompt": "Hi", "echo": True}, False),
        ({"prompt": "Hi", "echo": False}, True),
        ({"messages": MESSAGES}, True),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "image_url"}]}]}, True),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, False),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, False),
    ],
)
def test_a_request_whose_tokens_do_not_say_what_is_reused_is_promised_nothing(
    fields: dict[str, Any], scorable: bool
) -> None:
    assert scorable == routed(**fields).scorable


def test_its_headers_give_what_plugins_are_told() -> None:
    request = routed({"x-dynamo-meta-tenant": "a", "x-dynamo-session-id": "b", "accept": "c"}, prompt="Hi")

    assert {"tenant": "a"} == request.metadata
    assert "b" == request.routed["agent_context"]["session_id"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"model": 7}', b'{"model": "m", "nvext": 3}', b'{"model": "\xff"}', b"{" * 5_000],
)
def test_what_cannot_be_read_is_left_to_the_frontend(body: bytes) -> None:
    with pytest.raises(Unreadable, match=r"^expected a request for a model as JSON, got \d+ bytes"):
        read(body, {})
