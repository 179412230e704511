"""Which headers of clients are removed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswa_plugin.router.picker.headers import is_routing, routing_patterns

#: As docs/gateway.md lists them; those of Dynamo 1.6 that change where a request goes.
REMOVED = [
    "x-dynamo-worker-instance-id",
    "x-dynamo-prefill-instance-id",
    "x-dynamo-dp-rank",
    "x-dynamo-prefill-dp-rank",
    "x-dynamo-request-priority",
    "x-dynamo-request-strict-priority",
    "x-dynamo-request-id",
    "x-dynamo-",
    "x-dynamo-me",
    "x-dynamo-sessionid",
    "x-dynamo-something-later",
    "x-worker-instance-id",
    "x-prefill-instance-id",
    "x-prefill-dp-rank",
    "x-dp-rank",
    "x-data-parallel-rank",
    "x-gateway-destination-endpoint",
]
KEPT = ["x-dynamo-meta-pace", "x-dynamo-session-id", "x-request-id", "authorization", "x-dynam", "x-worker"]


@pytest.mark.parametrize("name", REMOVED)
def test_a_header_that_says_where_a_request_goes_is_removed(name: str) -> None:
    assert is_routing(name)


@pytest.mark.parametrize("name", KEPT)
def test_a_header_that_says_something_of_the_request_is_kept(name: str) -> None:
    assert not is_routing(name)


NAMES = st.one_of(
    st.sampled_from(REMOVED + KEPT),
    st.text("medatsion-x", max_size=12).map("x-dynamo-".__add__),
    st.sampled_from(["x-dynamo-meta-", "x-dynamo-session-"]).flatmap(
        lambda word: st.integers(0, len(word)).map(lambda at: word[:at])
    ),
    st.text("abx-", max_size=20),
)


@given(NAMES)
def test_envoys_patterns_say_the_same(name: str) -> None:
    assert is_routing(name) == any(re.fullmatch(pattern, name) for pattern in routing_patterns())
