"""The simulated cache beside recordings of vLLM's own (tests/data/README.md), one request at a time."""

from __future__ import annotations

import pytest

from tests.vllm_cache_helpers import Recorded, answer_of, manager_of, recorded, trace_named

#: Every event is as recorded.
ALIKE = (
    "dsv4-256-64-4-8",
    "gemma4-32-16",
    "kimi-linear-mla-b128",
    "llama4-chunk512-b16",
    "mamba-swa-full-b64",
    "qwen35-align-b64",
    "swa-only-two-windows",
    "swa16-full64",
    "swa48-full16-ret192",
    "swa500-b16-dense",
)
#: What is reused is as recorded. A trace does not say which drafts were right, so that the last blocks of
#: some answers are taken, and evict others, a step earlier or later: so many requests have the same events.
WITH_DRAFTS = {
    "eagle-drop-swa16-full64": 88,
    "eagle-lookahead-hash": 82,
    "mtp3-lookahead-hash": 78,
    "qwen35-mtp-lookahead-hash": 83,
}


@pytest.mark.parametrize("name", [*ALIKE, *WITH_DRAFTS])
def test_every_request_of_the_engine_is_served_alike(name: str) -> None:
    header, requests = recorded(trace_named(name))
    manager = manager_of(header)
    reused, events_alike = 0, 0
    for number, one in enumerate(requests):
        token_ids, output_len = one.request["token_ids"], one.request["output_len"]
        match = manager.match(token_ids)
        sequence = manager.open(token_ids, output_len)
        assert sequence is not None
        sequence.compute_prompt()
        sequence.finish(answer_of(one, manager.layout))
        events = manager.pool.take_events()
        expected = (number, one.request["cached_tokens"], one.request.get("junction", 0))

        assert expected == (number, sequence.cached_tokens, match.junction)
        assert match.length == sequence.cached_tokens
        manager.pool.check()
        if name in ALIKE:  # the first that is not, with its events
            assert one.events == events, f"request {number}"
        reused += sequence.cached_tokens > 0
        events_alike += one.events == events
    assert 90 == len(requests)
    assert reused > 20, "many reuse something"
    assert events_alike >= WITH_DRAFTS.get(name, len(requests))


def test_the_recordings_evict_and_share() -> None:
    """Otherwise the test above would show little."""
    for name in (*ALIKE, *WITH_DRAFTS):
        _, requests = recorded(trace_named(name))
        removed = sum(event["type"] == "BlockRemoved" for one in requests for event in one.events)
        assert removed > 20, name


def test_an_answer_is_read_from_the_events_that_store_it() -> None:
    header, requests = recorded(trace_named("gemma4-32-16"))
    layout = manager_of(header).layout
    one = next(each for each in requests if each.request["output_len"] > 40)
    prompt, answer = one.request["token_ids"], answer_of(one, layout)
    whole = (len(prompt) + len(answer) - 1) // 32 * 32 - len(prompt)

    assert one.request["output_len"] == len(answer)
    assert any(each for each in answer[:whole])
    shown = [token for event in one.events if event["type"] == "BlockStored" for token in event["token_ids"]]
    assert set(answer[:whole]) <= set(shown)
    assert [0] * len(answer) == answer_of(Recorded(one.request, []), layout)
