"""A cache salt keeps tenants apart: equal prompts share no name, in hashes, stream, index or projection."""

from __future__ import annotations

import itertools

import pytest
from vswa_plugins.dynamo_events.projection import Projection

from tests.cases.follower_helpers import LAYOUT
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.dynamo.runtime import namespaced_block_hash
from vswa_plugin.engine.contract import BlocksStored, EngineBlock
from vswa_plugin.index import WindowIndex
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire.events import Event, Rank, layout_event

TOKENS = tuple(range(96))
PROMPT = (*TOKENS, 7)
RANK = Rank(1)
#: Salt and LoRA of each tenant; the last ones differ in how they are put together only.
TENANTS = [
    (None, None),
    ("a", None),
    ("b", None),
    ("A", None),
    (None, "a"),
    ("a", "b"),
    ("b", "a"),
    ("ab", None),
]


def names(tenant: tuple[str | None, str | None]) -> list[int]:
    return list(namespaced_sequence_hashes(PROMPT, 32, *tenant))


def stored_by(tenant: tuple[str | None, str | None]) -> tuple[list[Event], BlocksStored, Residency]:
    """What a worker publishes when its engine has stored the tenant's prompt."""
    salt, lora = tenant
    residency = Residency(LAYOUT, NodeTable(namespaced_block_hash))
    blocks = tuple(EngineBlock(at, TOKENS[at : at + 32]) for at in range(0, 96, 32))
    event = BlocksStored(0, None, blocks, cache_salt=salt, lora_name=lora)
    return residency.apply(event), event, residency


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(TENANTS, 2)))
def test_no_block_of_equal_prompts_of_two_tenants_has_the_same_name(
    one: tuple[str | None, str | None], other: tuple[str | None, str | None]
) -> None:
    assert 3 == len(names(one)) == len(names(other))
    assert set() == set(names(one)) & set(names(other))


@pytest.mark.parametrize("tenant", TENANTS)
def test_a_prompt_is_promised_to_the_tenant_whose_blocks_these_are_and_to_nobody_else(
    tenant: tuple[str | None, str | None],
) -> None:
    index = WindowIndex()
    index.join(RANK, LAYOUT)
    for event in stored_by(tenant)[0]:
        index.apply(RANK, event)
    promised = {each: index.score(names(each), len(PROMPT)).get(RANK, 0) for each in TENANTS}

    assert {each: 96 if each == tenant else 0 for each in TENANTS} == promised


@pytest.mark.parametrize("tenant", TENANTS)
def test_dynamos_router_is_sent_the_names_of_that_tenant_only(tenant: tuple[str | None, str | None]) -> None:
    events, stored, residency = stored_by(tenant)
    projection = Projection("boundary", LAYOUT)
    nodes = [node for block in stored.blocks if (node := residency.nodes.get(block.hash)) is not None]
    projection.apply(layout_event(LAYOUT))
    projection.learn(stored, nodes)
    for event in events:
        projection.apply(event)
    projection.commit(projection.changes())

    assert set(names(tenant)) == projection.published_hashes()
