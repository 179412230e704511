"""Traces of manager V1's decision code beside ours: the same requests, and every event equal, in order.

One request at a time. The traces name no generated tokens; the events of the widest window show all but the
last, which no manager keeps.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vswa_plugins.gemma3_cpu.cache.spec import GroupSpec
from vswa_plugins.gemma3_cpu.cache.v1 import CacheManagerV1

from tests.gemma3_v1_helpers import opened

DATA = Path(__file__).parents[2] / "data"
MINIMAL = sorted(path.name for path in (DATA / "trtllm-v1-minimal").iterdir())

Records = list[dict[str, Any]]


def read_trace(name: str) -> tuple[dict[str, Any], Records]:
    with lzma.open(DATA / name) as lines:
        header, *records = map(msgspec.json.decode, lines)
    return header, records


def recorded_manager(header: dict[str, Any]) -> CacheManagerV1:
    """A manager as the header says; the widest window is as long as a sequence may be."""
    pools = {int(window): blocks for window, blocks in header["pools"].items()}
    groups = [
        GroupSpec(i, window, pools[window][0], host_blocks=pools[window][1])
        for i, window in enumerate(sorted(pools))
    ]
    return CacheManagerV1(
        groups,
        header["tokens_per_block"],
        max(pools),
        contiguous=header["rule"] == "trtllm_v1_contiguous",
        enable_partial_reuse=header.get("partial_reuse", True),
        max_chunk_tokens=header.get("chunk_size", 8192),
    )


def answers(header: dict[str, Any], records: Records) -> Iterator[list[int]]:
    """What each request generated, its last token left out."""
    widest = max(map(int, header["pools"]))
    prefixes: dict[int | None, list[int]] = {None: []}
    of_requests: list[tuple[dict[str, Any], list[int]]] = []
    for record in records:
        if record["type"] == "request":
            of_requests.append((record, []))
            continue
        data, parent = record["event"]["data"], None
        if data["type"] != "stored" or record["event"]["window_size"] != widest:
            continue
        parent = data["parent_hash"]
        for block in data["blocks"]:
            tokens = prefixes[parent] + [token["token_id"] for token in block["tokens"]]
            parent = block["block_hash"]
            prefixes[parent] = tokens
            if len(tokens) > len(of_requests[-1][1]):
                of_requests[-1][1][:] = tokens
    for request, tokens in of_requests:
        prompt, end = request["token_ids"], len(request["token_ids"]) + request["output_len"] - 1
        answer = tokens[len(prompt) : end]
        assert len(answer) == end - len(prompt) and (not answer or tokens[: len(prompt)] == prompt)
        yield answer


def steps(header: dict[str, Any], request: dict[str, Any], cached: int) -> Iterator[int]:
    """Up to which token each step computes: chunks of the prompt, then token after token.

    A first chunk that is not the last ends at the edge of a block.
    """
    size, chunk = header["tokens_per_block"], header.get("chunk_size", 8192)
    prompt = len(request["token_ids"])
    upto = cached
    while upto < prompt:
        first = upto == cached > 0
        upto = min(prompt, upto + chunk)
        if first and upto < prompt:
            upto = upto // size * size
        yield upto
    yield from range(prompt + 1, prompt + request["output_len"])


def replay(header: dict[str, Any], records: Records) -> Records:
    """What our manager does for the requests of a trace."""
    manager = recorded_manager(header)
    ours: Records = []

    def note() -> None:
        ours.extend({"type": "event", "event": event} for event in manager.flush_events())

    note()
    requests = [record for record in records if record["type"] == "request"]
    for number, (request, answer) in enumerate(zip(requests, answers(header, records), strict=True)):
        sequence = opened(manager, request["token_ids"], request["output_len"])
        ours.append({**request, "cached_tokens": sequence.cached_tokens})
        cached = sequence.cached_tokens
        for upto in steps(header, request, cached):
            # The step that gives the last token also ends the request.
            if sequence.computed_tokens > cached:
                note()
            sequence.reserve(upto)
            sequence.advance(upto - sequence.computed_tokens)
        sequence.close([*answer, 0])
        note()
        if not number % 8:
            manager.check()
    manager.check()
    return ours


def cached_tokens(records: Sequence[dict[str, Any]]) -> list[int]:
    return [record["cached_tokens"] for record in records if record["type"] == "request"]


@pytest.mark.parametrize(
    ("trace", "requests", "events"),
    [
        ("g1b-new-sync-c1", 260, 2081),
        ("w128-new-sync-c1", 260, 2255),
        ("two-new-sync-c1", 260, 3385),
        ("g1b-long-new-sync-c1", 200, 4851),
        ("g1b-host-new-sync-c1", 260, 14415),
        ("g1b-old-sync-c1", 260, 1548),
    ],
)
def test_each_request_reuses_as_many_tokens_and_gives_out_the_same_events(
    trace: str, requests: int, events: int
) -> None:
    header, theirs = read_trace(f"trtllm-v1-{trace}.jsonl.xz")
    ours = replay(header, theirs)

    assert cached_tokens(theirs) == cached_tokens(ours)
    assert theirs == ours
    assert (requests, requests + events) == (len(cached_tokens(theirs)), len(theirs))


@pytest.mark.parametrize("name", MINIMAL)
def test_a_minimal_case_goes_event_for_event(name: str) -> None:
    header, theirs = read_trace(f"trtllm-v1-minimal/{name}")

    assert theirs == replay(header, theirs)


def test_there_are_minimal_cases_of_both_rules() -> None:
    assert 10 == len(MINIMAL)
    assert 5 == sum("v1old" in name for name in MINIMAL)
