"""Chains of many blocks: no step is a walk along all of them, and none goes as deep into the stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vswa_plugins.dynamo_events.projection import Projection
from vswa_plugins.trtllm_events import TrtllmEventAdapter
from vswa_plugins.trtllm_events.hashing import block_key
from vswa_plugins.vllm_events import VllmEventAdapter

from tests.machines.event_sequences import BLOCK, LONGEST, WINDOW
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.chains import ParentLinks
from vswa_plugin.engine.contract import BlocksStored, EngineBlock, EventAdapter
from vswa_plugin.errors import ProtocolError
from vswa_plugin.publishing.nodes import NodeTable, plain_hasher
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.testing.adapter_checks import bounded

DEPTH = 5_000
#: Lines of Python for one block, however deep it lies.
MOST_LINES = 1_000
#: The first blocks may say more, such as what differs from the layout.
FIRST = 3
TOKENS = [7, 8]
Write = Callable[[int, int | None, int], dict[str, Any]]


def of_trtllm(number: int, parent: int | None, name: int) -> dict[str, Any]:
    tokens = [{"token_id": each, "token_extra_id": 0} for each in TOKENS]
    block = {"block_hash": name, "tokens": tokens, "cache_level": 0}
    data = {"type": "stored", "parent_hash": parent, "blocks": [block]}
    return {"event_id": number, "window_size": LONGEST, "layer_group_id": 1, "data": data}


def of_vllm(number: int, parent: int | None, name: int) -> dict[str, Any]:
    fields = {"block_hashes": [name], "parent_block_hash": parent, "token_ids": TOKENS, "block_size": BLOCK}
    return {"type": "BlockStored", "medium": "GPU", "group_idx": 1, **fields}


def chain() -> list[int]:
    names: list[int] = []
    for _ in range(DEPTH):
        names.append(block_key(TOKENS, names[-1] if names else None))
    return names


NAMES = chain()


@pytest.mark.parametrize(
    ("rule", "adapter_of", "write"),
    [
        ("trtllm_v2", TrtllmEventAdapter, of_trtllm),
        ("trtllm_v1", TrtllmEventAdapter, of_trtllm),
        ("trtllm_v1_contiguous", TrtllmEventAdapter, of_trtllm),
        ("vllm", VllmEventAdapter, of_vllm),
    ],
)
def test_a_block_costs_as_much_however_deep_it_lies(
    rule: str, adapter_of: Callable[[CacheLayout], EventAdapter], write: Write
) -> None:
    layout = CacheLayout((CacheGroup(0, WINDOW, BLOCK), CacheGroup(1, None, BLOCK)), rule, "m")
    adapter, residency, projection = adapter_of(layout), Residency(layout), None
    if rule != "trtllm_v1_contiguous":  # which has no fixed need in its sliding group
        projection = Projection("global", layout)

    def step(raw: dict[str, Any]) -> None:
        for event in adapter.feed(raw):
            for change in residency.apply(event):
                if projection is not None:
                    projection.apply(change)
                    projection.commit(projection.changes())

    for number, (parent, name) in enumerate(zip([None, *NAMES], NAMES, strict=False)):
        raw = write(number, parent, name)
        if rule.startswith("trtllm_v1"):
            del raw["layer_group_id"]  # manager V1 gives none
        bounded(lambda raw=raw: step(raw), MOST_LINES if number >= FIRST else 10 * MOST_LINES)

    assert DEPTH == residency.counts()[1]


def test_a_chain_that_goes_with_its_root_goes_at_once() -> None:
    layout = CacheLayout((CacheGroup(0, None, BLOCK),), "trtllm_v1_contiguous", "m")
    adapter = TrtllmEventAdapter(layout)
    for number, (parent, name) in enumerate(zip([None, *NAMES], NAMES, strict=False)):
        raw = of_trtllm(number, parent, name)
        adapter.feed({key: value for key, value in raw.items() if key != "layer_group_id"})
    removed = {"type": "removed", "block_hashes": [NAMES[0]]}
    gone = bounded(lambda: adapter.feed({"event_id": DEPTH, "data": removed}), 20 * DEPTH)

    assert [DEPTH] == [len(event.hashes) for event in gone]  # type: ignore[union-attr]


def test_links_are_looked_through_once_for_a_chain_and_not_at_all_for_new_blocks() -> None:
    links = ParentLinks()
    for parent, name in zip([None, *range(DEPTH)], range(DEPTH), strict=False):
        bounded(lambda parent=parent, name=name: links.add(parent, [name], "a test"), 30)
    links.discard(DEPTH // 2)
    chain = list(range(DEPTH))

    bounded(lambda: links.add(None, chain, "a test"), 20 * DEPTH)
    with pytest.raises(ProtocolError, match=r"a test: .*got block 0 below block 4999"):
        bounded(lambda: links.add(DEPTH - 1, [0], "a test"), 10 * DEPTH)


def test_a_table_full_of_resident_nodes_is_not_looked_through_for_each_block() -> None:
    looked_at = 0

    def resident(_: object) -> bool:
        nonlocal looked_at
        looked_at += 1
        return True

    nodes = NodeTable(plain_hasher, limit=1_000)
    for name in range(4_000):
        nodes.add(None, EngineBlock(name, (name, name)), None, None)
        nodes.trim(resident)

    assert 4_000 == len(nodes)
    assert looked_at < 40 * 4_000


def test_a_chain_that_is_stored_twice_over_itself_is_refused_by_the_residency_too() -> None:
    """An adapter of others may pass on what an engine of others sent."""
    residency = Residency(CacheLayout((CacheGroup(0, None, BLOCK),), "vllm", "m"))
    ring = BlocksStored(0, None, tuple(EngineBlock(name, (1, 2)) for name in ("a", "b", "a")))

    with pytest.raises(ProtocolError, match=r"stored blocks: .*got block 'a' again below itself"):
        residency.apply(ring)
    assert {0: 0} == residency.counts()
