"""Groups of any kind whose blocks have several sizes, projected onto Dynamo's tree of equal blocks."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from vswa_plugins.dynamo_events.projection import Projection
from vswa_plugins.dynamo_events.scorer import BoundaryProjection
from vswa_plugins.dynamo_events.units import unit_hashes

from tests.accuracy_helpers import DATA, adapter_for
from tests.dynamo_events_helpers import DynamoTree, told
from tests.dynamo_events_hybrid import MIXED, HybridWorker
from tests.hybrid_helpers import layouts
from tests.properties import examples
from vswa_plugin.accuracy.replay import replay
from vswa_plugin.accuracy.scorers import Exact, GlobalOnly
from vswa_plugin.accuracy.trace import open_trace
from vswa_plugin.blocks.hashing import prefix_names
from vswa_plugin.blocks.layout import CHUNKED, CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.reuse import RULES
from vswa_plugin.engine.contract import BlocksStored, EngineBlock, Node
from vswa_plugin.errors import ConfigError
from vswa_plugin.wire.events import Stored, layout_event


def projectable(layout: CacheLayout) -> CacheLayout:
    """The layout without what one tree cannot show."""
    assume(any(group.kind != CHUNKED for group in layout.groups))
    groups = tuple(msgspec.structs.replace(group, drops_last=False) for group in layout.groups)
    where = Resumption(layout.block_size, layout.hash_block_size)
    return msgspec.structs.replace(layout, groups=groups, resumption=where)


@examples(100)
@given(layouts(), st.integers(0, 1 << 32))
def test_dynamo_finds_what_lies_above_something_that_can_be_resumed(layout: CacheLayout, seed: int) -> None:
    worker = HybridWorker(projectable(layout), seed)
    tree = DynamoTree(layout.block_size)
    for _ in range(8):
        worker.serve()
        tree.take(told(worker.projection))
        worker.projection.check()
        published = worker.published()

        assert len(published) == worker.projection.published
        for tokens in worker.served:
            assert worker.match(tokens, published) == tree.match(tokens)


#: Requests of 90 for which global only, and the projection, promise too much; never too little.
TRACES = {
    "gemma4-32-16.seq": (25, 13),
    "dsv4-256-64-4-8.seq": (18, 12),
    "swa16-full64.seq": (24, 13),
    "swa48-full16-ret192.seq": (9, 4),
    "llama4-chunk128-b16.conc": (2, 2),
    "mamba-swa-full-b64.seq": (25, 14),
}


@pytest.mark.parametrize("name", TRACES)
def test_on_traces_of_vllm_a_stock_router_is_wrong_for_fewer_requests(name: str) -> None:
    (path,) = (DATA / "hybrid").glob(f"vllm-hybrid-{name}.*")
    trace = open_trace(path)
    scorers = [Exact(), GlobalOnly(), BoundaryProjection(trace.layout(), RULES)]
    report = replay(trace, adapter_for, scorers=scorers)
    found = [report.score(scorer.name) for scorer in scorers[1:]]

    assert TRACES[name] == tuple(score.over for score in found)
    assert [0, 0] == [score.under for score in found]


# -- step by step ------------------------------------------------------------------------------------

TOKENS = list(range(100, 132))
#: Dynamo's blocks have four tokens, those of the global group two.
TWO_SIZES = CacheLayout((CacheGroup(0, None, 2), CacheGroup(1, 5, 4)), "vllm_hybrid", "m")


def announced(first: int, *ends: int, parent: int | None = None) -> tuple[BlocksStored, list[Node]]:
    """Blocks of one sequence, the first of which begins at ``first``; engine hashes are positions."""
    names, blocks, nodes = prefix_names(TOKENS, 2), [], []
    for end in ends:
        blocks.append(EngineBlock(end, tuple(TOKENS[first:end])))
        nodes.append(Node(names[end // 2 - 1], end // 2 - 1, names[end // 2 - 2] if end > 2 else None))
        first = end
    return BlocksStored(0, parent, tuple(blocks)), nodes


def stored(group_id: int, *ends: int) -> list[Any]:
    names, size = prefix_names(TOKENS, 2), TWO_SIZES.group(group_id).block_size
    return [Stored(group_id, end // size - 1, None, (names[end // 2 - 1],)) for end in ends]


def published(projection: Projection) -> list[tuple[list[int], int]]:
    """Of the runs that are to be stored: their tokens, and how many blocks of Dynamo's they are."""
    return [(run.token_ids(), len(run.blocks)) for run in told(projection).stored]


def test_a_block_of_dynamos_has_the_tokens_of_all_between_two_edges() -> None:
    projection = Projection("boundary", TWO_SIZES)
    projection.learn(*announced(0, 2, 6, 8))
    for event in [*stored(0, 2, 4, 6, 8), *stored(1, 4, 8)]:
        projection.apply(event)

    assert [(TOKENS[:8], 2)] == published(projection)


def test_an_announcement_goes_on_from_the_middle_of_a_block() -> None:
    projection = Projection("boundary", TWO_SIZES)
    projection.learn(*announced(0, 4, 6))
    projection.learn(*announced(6, 12, parent=6))
    for event in [*stored(0, 2, 4, 6, 8, 10, 12), *stored(1, 8, 12)]:
        projection.apply(event)

    assert [(TOKENS[:12], 3)] == published(projection)
    projection.check()


def test_what_goes_on_from_an_unknown_block_or_has_another_name_is_not_published() -> None:
    projection = Projection("boundary", TWO_SIZES)
    projection.learn(*announced(4, 8, parent=4))
    block, (node,) = announced(0, 4)
    projection.learn(block, [node._replace(sequence_hash=1)])
    for event in [*stored(0, 2, 4, 6, 8), *stored(1, 4, 8)]:
        projection.apply(event)
    assert [] == published(projection)

    projection.learn(*announced(0, 4))
    projection.learn(*announced(4, 8, parent=4))
    assert [(TOKENS[:8], 2)] == published(projection)


def test_a_layout_of_other_blocks_begins_with_nothing() -> None:
    projection = Projection("boundary", TWO_SIZES)
    projection.learn(*announced(0, 4))
    for event in [*stored(0, 2, 4), *stored(1, 4)]:
        projection.apply(event)
    told(projection)
    projection.apply(layout_event(CacheLayout((CacheGroup(0, None, 2),), "vllm", "m")))

    changes = told(projection)
    assert (1, []) == (len(changes.removed), changes.stored)
    assert (0, 0) == (projection.published, projection.blocks)


def test_ends_that_are_not_gone_on_from_are_forgotten() -> None:
    groups = (CacheGroup(0, None, 4, "recurrent"), CacheGroup(1, 3, 2))
    projection = Projection("boundary", CacheLayout(groups, "vllm_hybrid", "m"), spare=3)
    for n in range(50):
        block = EngineBlock(n, (n, n))
        name = prefix_names((n, n), 2)[0]
        projection.learn(BlocksStored(0, None, (block,)), [Node(name, 0, None)])
        told(projection)

    assert 0 == projection.blocks
    assert len(projection._pieces) <= 2 * 3


def test_blocks_of_another_name_space_are_named_by_dynamo_and_say_so() -> None:
    from dynamo.llm import compute_block_hash_for_seq

    from vswa_plugin.blocks.hashing import sequence_hashes

    units = compute_block_hash_for_seq(TOKENS[:4], 2, lora_name="l", cache_namespace="s")
    names = sequence_hashes(units)
    projection = Projection("boundary", TWO_SIZES, hasher=unit_hashes)
    block = BlocksStored(0, None, (EngineBlock(1, tuple(TOKENS[:4])),), cache_salt="s", lora_name="l")
    projection.learn(block, [Node(names[1], 1, names[0])])
    projection.apply(Stored(0, 0, None, tuple(names)))
    projection.apply(Stored(1, 0, None, (names[1],)))

    (run,) = told(projection).stored
    assert ([names[1]], ("s", "l")) == ([each.sequence_hash for each in run.blocks], run.blocks[0].space)


# -- refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (CacheLayout((CacheGroup(0, None, 4, drops_last=True),), "vllm_hybrid", "m"), "blocks behind it"),
        (CacheLayout((CacheGroup(0, None, 4, "chunked", 8),), "vllm_hybrid", "m"), "cannot be projected"),
        (
            CacheLayout(MIXED.groups, "vllm_hybrid", "m", resumption=Resumption(4, 1, lookahead=2)),
            "names that cover 2 tokens more",
        ),
        (
            CacheLayout((CacheGroup(0, None, 4),), "vllm_hybrid", "m", resumption=Resumption(2, 2, True)),
            "prefixes that end inside blocks",
        ),
        (CacheLayout(MIXED.groups, "vllm_hybrid", "m", "another"), "got another"),
    ],
    ids=["a block that is given up", "chunks alone", "lookahead", "partial", "another scheme"],
)
def test_what_one_tree_cannot_show_is_refused(layout: CacheLayout, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Projection("boundary", layout)
