"""Models whose prefixes have other names than the blocks that load is counted in: choice, API, grouping."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from tests.router_http_helpers import Api, entry_of, run
from vswa_plugin.blocks.hashing import prefix_names
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.index import WindowIndex
from vswa_plugin.registry import Entry, oddity
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.pools import Pool, grouped
from vswa_plugin.selection import LoadBook, Weights
from vswa_plugin.wire.events import Batch, Event, Rank, Source, Stored, encode, layout_event
from vswa_plugin.wire.subjects import subject

MIXED = CacheLayout((CacheGroup(0, 64, 32), CacheGroup(1, None, 16)), "vllm_hybrid", "h").check()
AHEAD = msgspec.structs.replace(MIXED, resumption=Resumption(32, 16, lookahead=1)).check()
#: One block size, and yet other names than sequence hashes.
AHEAD_ALONE = msgspec.structs.replace(
    MIXED, groups=(CacheGroup(0, 64, 32), CacheGroup(1, None, 32)), resumption=Resumption(32, 32, lookahead=1)
).check()
LAYOUTS = [MIXED, AHEAD, AHEAD_ALONE]
HOLDS, IDLE = Rank(5), Rank(6)
PROMPT = list(range(130))


def events_of(layout: CacheLayout) -> list[Event]:
    """All that ``PROMPT`` stores."""
    names = tuple(prefix_names(PROMPT, layout.hash_block_size, layout.lookahead))
    return [Stored(group.group_id, 0, None, names) for group in layout.groups]


def entry_with(layout: CacheLayout, worker_id: int) -> Entry:
    return entry_of(
        worker_id,
        model="h",
        block_size=layout.block_size,
        rule=layout.rule,
        groups=layout.groups,
        resumption=layout.resumption,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_choice_scores_by_names_and_counts_load_in_blocks(layout: CacheLayout) -> None:
    index = WindowIndex()
    for rank in (HOLDS, IDLE):
        index.join(rank, layout)
    for event in events_of(layout):
        index.apply(HOLDS, event)
    pool = Pool("h", layout.naming, LoadBook(layout.block_size), (HOLDS, IDLE))
    decider = Decider(index, Weights(), namespaced_sequence_hashes, None, random.Random(3))

    decision = decider.decide(pool, {"model": "h", "token_ids": PROMPT})

    assert (HOLDS, 128) == (decision.rank, decision.cached_tokens)
    assert 4 == pool.book.load(HOLDS).blocks, "four whole blocks of 32 tokens"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_api_answers_for_token_ids_and_says_why_not_for_hashes(layout: CacheLayout) -> None:
    async def body() -> list[tuple[int, Any]]:
        async with Api() as api:
            api.enter(entry_with(layout, HOLDS.worker_id))
            source = Source("ns", "backend", *HOLDS)
            batch = Batch(1, 5, 0, 1, (layout_event(layout), *events_of(layout)))
            await api.fleet.subscriber._on_message(subject(source, "events"), encode(batch))
            hashes = list(namespaced_sequence_hashes(PROMPT, layout.block_size))
            return [
                await api.post("/query", token_ids=PROMPT, model_name="h"),
                await api.post("/explain", token_ids=PROMPT, model_name="h"),
                await api.post("/query_by_hash", sequence_hashes=hashes, model="h"),
            ]

    (asked, queried), (_, explained), (refused, said) = run(body())
    answer = queried["instances"]["5"]["ranks"]["0"]

    assert (200, 32) == (asked, queried["block_size"])
    assert (128, 4, 128) == tuple(
        answer[name] for name in ("cached_tokens", "cached_blocks", "global_only_tokens")
    )
    assert [128] == [each["cached_tokens"] for each in explained]
    assert 400 == refused
    assert "expected token ids for 'h'" in str(said)


def test_workers_whose_prompts_have_other_names_do_not_serve_together() -> None:
    entries = [entry_with(MIXED, 1), entry_with(MIXED, 2), entry_with(AHEAD, 3)]
    group = grouped(entries)["h"]

    assert [1, 2] == [entry.worker_id for entry in group.used]
    ((refused, reason),) = group.refused
    assert 3 == refused.worker_id
    assert "got block size 32 named every 16 tokens with a lookahead of 1" in reason


@pytest.mark.parametrize(
    ("resumption", "words"),
    [
        (Resumption(32, 0), "hash_block_size: expected a part of 32, got 0"),
        (Resumption(32, 24), "hash_block_size: expected a part of 32, got 24"),
        (Resumption(32, 16, lookahead=-1), "expected numbers of tokens"),
        (Resumption(32, 16, least_tokens=1 << 62), "expected numbers of tokens"),
    ],
)
def test_an_entry_by_which_no_prompt_could_be_hashed_is_of_no_use(resumption: Resumption, words: str) -> None:
    entry = msgspec.structs.replace(entry_with(MIXED, 1), resumption=resumption)

    assert words in (oddity(entry) or "")


@pytest.mark.parametrize("capacity", [{"512": -1}, {"512": 1 << 62}, {str(n): 1 for n in range(2_000)}])
def test_an_entry_with_a_capacity_that_no_worker_has_is_of_no_use(capacity: dict[str, int]) -> None:
    assert oddity(msgspec.structs.replace(entry_with(MIXED, 1), capacity=capacity)) is not None
