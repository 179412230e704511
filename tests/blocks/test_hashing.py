"""Hashes equal Dynamo's, checked against Dynamo itself."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswa_plugin.blocks.hashing import block_hash, block_hashes, chain, sequence_hashes
from vswa_plugin.dynamo.runtime import namespaced_block_hash

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=200)


@given(TOKENS, st.sampled_from([1, 4, 16, 32, 64]))
def test_block_hashes_equal_dynamos(tokens: list[int], block_size: int) -> None:
    from dynamo.llm import compute_block_hash_for_seq

    assert compute_block_hash_for_seq(tokens, block_size) == block_hashes(tokens, block_size)


@given(TOKENS.filter(bool))
def test_one_block_hashes_alike_alone_and_in_a_sequence(tokens: list[int]) -> None:
    assert block_hashes(tokens, len(tokens)) == [block_hash(tokens)]


def test_sequence_hashes_equal_those_of_dynamos_selection_service() -> None:
    from dynamo.llm import SelectionService

    tokens = list(range(1_000, 1_203))

    async def dynamos() -> list[int]:
        service = SelectionService(indexer_threads=1)
        worker = {
            "worker_id": 7,
            "model_name": "m",
            "block_size": 32,
            "endpoint": "http://127.0.0.1:9",
            "kv_events_endpoint": "ipc:///tmp/vswa-test-no-events",
            "max_num_batched_tokens": 1_000,
            "total_kv_blocks": 100,
        }
        await service.upsert_worker(worker)
        booked = await service.select_and_reserve(
            {"model_name": "m", "token_ids": tokens, "selection_id": "a"}
        )
        service.shutdown()
        return [value % 2**64 for value in booked["sequence_hashes"]]

    assert asyncio.run(dynamos()) == sequence_hashes(block_hashes(tokens, 32))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(1, 19))
def test_a_chain_can_be_continued_from_any_parent(blocks: list[int], cut: int) -> None:
    whole = sequence_hashes(blocks)
    head = sequence_hashes(blocks[:cut])

    assert whole == head + sequence_hashes(blocks[cut:], parent=head[-1])


def test_the_same_block_under_another_parent_has_another_sequence_hash() -> None:
    assert len({chain(None, 5), chain(1, 5), chain(2, 5)}) == 3


@pytest.mark.parametrize("size", [1, 32])
def test_salt_and_lora_give_namespaces_of_their_own(size: int) -> None:
    from dynamo.llm import compute_block_hash_for_seq

    tokens = list(range(size))
    plain = namespaced_block_hash(tokens)

    assert plain == block_hash(tokens)
    assert namespaced_block_hash(tokens, "", "") == plain
    assert (
        namespaced_block_hash(tokens, "tenant")
        == compute_block_hash_for_seq(tokens, size, cache_namespace="tenant")[0]
    )
    assert (
        namespaced_block_hash(tokens, None, "adapter")
        == compute_block_hash_for_seq(tokens, size, lora_name="adapter")[0]
    )
    assert (
        len({plain, namespaced_block_hash(tokens, "tenant"), namespaced_block_hash(tokens, None, "tenant")})
        == 3
    )


def test_a_token_id_that_is_no_u32_is_refused() -> None:
    with pytest.raises(OverflowError):
        block_hash([2**32])
