"""Traces whose token ids and hashes are replaced: as good for replay, and nothing to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.recorder.hiding import Hiding

from tests.accuracy_helpers import DATA, replayed
from vswa_plugin.accuracy.trace import TraceEvent, TraceRequest, TraceWriter, open_trace

TRACES = ["trtllm-v2-gemma3-1b-head", "trtllm-v2-host-tier", "vllm-0.33-gptoss", "vllm-0.33-gemma3-1b-dense"]


@pytest.mark.parametrize("name", TRACES)
def test_every_scorer_predicts_a_hidden_trace_as_it_does_the_engines_own(tmp_path: Path, name: str) -> None:
    trace = open_trace(DATA / f"{name}.jsonl.gz")
    layout = trace.layout()
    hiding = Hiding(trace.header.format, layout.block_size, layout.rule)
    with (
        TraceWriter(tmp_path / "plain.jsonl.gz", trace.header) as first,
        TraceWriter(tmp_path / "hidden.jsonl.gz", trace.header) as second,
    ):
        for _, line in islice(trace.records(), 500):
            if isinstance(line, TraceEvent):
                first.event(line.event)
                second.event(hiding.event(line.event))
            elif isinstance(line, TraceRequest):
                first.request(line)
                second.request(msgspec.structs.replace(line, token_ids=hiding.prompt(line.token_ids)))
    plain, hidden = (replayed(tmp_path / f"{name}.jsonl.gz") for name in ("plain", "hidden"))

    assert plain.requests >= 10
    assert plain.outcomes == hidden.outcomes
    assert [] == hidden.mistakes


TOKENS = st.lists(st.integers(0, 3), max_size=11).map(tuple)


@given(TOKENS, TOKENS)
def test_hidden_blocks_share_as_many_tokens_from_their_start(one: Sequence[int], two: Sequence[int]) -> None:
    hiding = Hiding("trtllm", 4, "trtllm_v2", key=b"k" * 32)

    def shared(first: Sequence[int], second: Sequence[int]) -> list[int]:
        counts = []
        for at in range(0, 12, 4):
            pairs = list(zip(first[at : at + 4], second[at : at + 4], strict=False))
            counts.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)))
        return counts

    assert shared(one, two) == shared(hiding.prompt(one), hiding.prompt(two))
    assert len(one) == len(hiding.prompt(one))


def test_a_token_is_hidden_otherwise_behind_other_tokens_and_by_another_key() -> None:
    hiding = Hiding("vllm", 4, "vllm")
    first, second = hiding.prompt([7, 7, 7, 7]), Hiding("vllm", 4, "vllm").prompt([7, 7, 7, 7])

    assert 4 == len(set(first))
    assert first != second
    assert hiding.prompt([8, 7])[1] != first[1]
    assert first == hiding.prompt([5, 5, 5, 5, 7, 7, 7, 7])[4:]


@pytest.mark.parametrize("key", ["tokens", "block_hash", "parent_hash", "cache_salt", "lora_name", "secret"])
def test_nothing_of_a_stored_block_comes_through(key: str) -> None:
    tokens = [{"type": "unique_token", "token_id": 90_000 + n, "token_extra_id": 0} for n in range(4)]
    block = {"type": "stored_block", "block_hash": 91_001, "tokens": tokens, "secret": "93001"}
    data = {
        "type": "stored",
        "parent_hash": 91_002,
        "blocks": [block],
        "cache_salt": "92001",
        "lora_name": "92002",
        "secret": "93002",
    }
    raw = {"event_id": 3, "window_size": 64, "hash_algo": "v1_block_key", "data": data, "secret": 93_003}
    hidden = json.dumps(Hiding("trtllm", 4, "trtllm_v2").event(raw))
    sent = {
        "tokens": ["90000", "90001", "90002", "90003"],
        "block_hash": ["91001"],
        "parent_hash": ["91002"],
        "cache_salt": ["92001"],
        "lora_name": ["92002"],
        "secret": ["93001", "93002", "93003"],
    }[key]

    assert [] == [word for word in sent if f'"{word}"' in hidden or f" {word}," in hidden]


def test_both_encodings_of_vllm_are_hidden_alike() -> None:
    hiding = Hiding("vllm", 2, "vllm")
    as_map = {
        "type": "BlockStored",
        "block_hashes": [b"\x01" * 32],
        "parent_block_hash": None,
        "token_ids": [1, 2],
        "block_size": 2,
        "extra_keys": [["salt"]],
        "group_idx": 1,
    }
    as_array = ["BlockStored", [b"\x01" * 32], None, [1, 2], 2, None, None, None, [["salt"]], 1]

    assert hiding.event(as_map) == hiding.event(as_array)
    assert [[hiding.text("salt")]] == hiding.event(as_map)["extra_keys"]
    assert hiding.event(["BlockRemoved", [b"\x01" * 32], None, 1])["block_hashes"] == [
        hiding.name(b"\x01" * 32)
    ]
    assert {"type": "AllBlocksCleared"} == hiding.event(["AllBlocksCleared"])


@pytest.mark.parametrize(("extra", "mm_keys"), [(9, []), (0, [{"hash": "secret"}])])
def test_a_block_that_is_more_than_text_stays_one(extra: int, mm_keys: list[Any]) -> None:
    token = {"type": "unique_token", "token_id": 5, "token_extra_id": extra}
    raw_block = {"block_hash": 1, "tokens": [token], "mm_keys": mm_keys}
    raw = {"event_id": 0, "data": {"type": "stored", "parent_hash": None, "blocks": [raw_block]}}
    (block,) = Hiding("trtllm", 4, "trtllm_v2").event(raw)["data"]["blocks"]

    assert ["hidden"] == block["mm_keys"]
    assert 0 == block["tokens"][0]["token_id"]
