"""Recorded TensorRT-LLM V2 managers beside ours: the same requests, and every event equal, in order.

An iteration is a chunk of prefill, or one decoded token: the first output token comes with the last chunk,
so that a request of n output tokens has n - 1 of the latter.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.gemma3_v2_helpers import Announced, compute, opened, read_trace, recorded_manager


def replay(trace: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of the trace, and ours of its requests."""
    header, records = read_trace(trace)
    manager = recorded_manager(header)
    ours: list[dict[str, Any]] = []

    def tell() -> None:
        ours.extend({"type": "event", "event": event} for event in manager.flush_events())

    tell()
    for record in records:
        if record["type"] == "request":
            sequence = opened(manager, record["token_ids"], record["output_len"])
            ours.append({**record, "cached_tokens": sequence.cached_tokens})
            prompt_len = len(record["token_ids"])
            compute(sequence, prompt_len, header["chunk_size"], tell)
            compute(sequence, prompt_len + record["output_len"] - 1, 1, tell)
            sequence.close()
            manager.check()
    return records, ours


def resident_at_requests(records: list[dict[str, Any]]) -> list[dict[int, dict[int, int]]]:
    announced, sets = Announced(), []
    for record in records:
        if record["type"] == "event":
            announced.apply([record["event"]])
        else:
            sets.append({group_id: dict(held) for group_id, held in announced.held.items()})
    return sets


@pytest.mark.parametrize(
    ("trace", "requests", "events"), [("gemma3-1b", 150, 1628), ("host-tier", 100, 4827)]
)
def test_each_request_of_a_recorded_engine_reuses_as_many_tokens_and_tells_the_same_events(
    trace: str, requests: int, events: int
) -> None:
    theirs, ours = replay(trace)

    cached = [record["cached_tokens"] for record in theirs if record["type"] == "request"]
    assert cached == [record["cached_tokens"] for record in ours if record["type"] == "request"]
    assert resident_at_requests(theirs) == resident_at_requests(ours)
    assert theirs == ours
    assert (requests, requests + events) == (len(cached), len(theirs))
