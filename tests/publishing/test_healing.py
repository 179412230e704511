"""After lost engine events: a finished request proves blocks, and never one that may have gone."""

from __future__ import annotations

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksRemoved, BlocksStored, EngineBlock
from vswa_plugin.publishing.healing import Claim, Healing
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire.events import Removed, Stored

#: A window of two blocks of two tokens.
LAYOUT = CacheLayout((CacheGroup(0, 4, 2), CacheGroup(1, None, 2)), "trtllm_v2", "m")
TOKENS = tuple(range(100, 111))  # five blocks and a token
ENGINE_HASHES = [f"e{position}" for position in range(5)]


def cleared() -> tuple[Residency, Healing]:
    """A rank that held five blocks in both groups, and whose view was lost."""
    residency = Residency(LAYOUT)
    healing = Healing(residency)
    blocks = tuple(
        EngineBlock(name, TOKENS[2 * position : 2 * position + 2])
        for position, name in enumerate(ENGINE_HASHES)
    )
    for group in (0, 1):
        residency.apply(BlocksStored(group, None, blocks))
    residency.clear()
    healing.restarted()
    while not healing.prepare():
        pass
    return residency, healing


def positions(changes: list[object]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {0: [], 1: []}
    for change in changes:
        assert isinstance(change, Stored)
        found[change.group_id].append(change.position)
    return found


def test_what_a_resumed_prompt_needed_is_resident_again() -> None:
    residency, healing = cleared()
    changes = healing.changes(Claim(TOKENS, 8, mark=healing.events))

    assert positions([*changes]) == {0: [2, 3], 1: [0, 1, 2, 3]}
    assert {group: len(held) for group, held in residency.resident().items()} == {0: 2, 1: 4}
    assert healing.blocks_healed == 6
    assert healing.changes(Claim(TOKENS, 8, mark=healing.events)) == [], "it is resident now"


def test_a_part_of_a_block_proves_no_block() -> None:
    _, healing = cleared()

    assert positions([*healing.changes(Claim(TOKENS, 7, mark=healing.events))]) == {0: [2], 1: [0, 1, 2]}


def test_a_block_removed_since_the_request_came_is_not_claimed() -> None:
    _, healing = cleared()
    healing.events = 10
    healing.saw_removed(0, ["e3"])

    assert positions([*healing.changes(Claim(TOKENS, 8, mark=10))]) == {0: [2], 1: [0, 1, 2, 3]}


def test_a_removal_before_the_request_came_says_nothing_since_the_engine_reused_the_block_after() -> None:
    _, healing = cleared()
    healing.events = 10
    healing.saw_removed(0, ["e3"])

    assert positions([*healing.changes(Claim(TOKENS, 8, mark=11))]) == {0: [2, 3], 1: [0, 1, 2, 3]}


def test_a_request_that_came_before_the_loss_proves_nothing() -> None:
    _, healing = cleared()

    assert healing.changes(Claim(TOKENS, 8, mark=healing.events - 1)) == []


def test_a_loss_makes_the_marks_of_all_requests_before_it_too_old() -> None:
    """Even if no event of the engine was read between: those that were lost may have been removals."""
    _, healing = cleared()
    mark = healing.events
    healing.restarted()

    assert healing.changes(Claim(TOKENS, 8, mark)) == []
    assert positions([*healing.changes(Claim(TOKENS, 8, healing.events))])[1] == [0, 1, 2, 3]


def test_a_readmitted_block_is_removed_like_any_other() -> None:
    residency, healing = cleared()
    healing.changes(Claim(TOKENS, 8, mark=healing.events))
    (removed,) = residency.apply(BlocksRemoved(0, ("e3",)))

    assert isinstance(removed, Removed)
    assert len(residency.resident()[0]) == 1


def test_a_prompt_that_the_node_table_does_not_know_is_not_claimed() -> None:
    _, healing = cleared()

    assert healing.changes(Claim(tuple(range(50)), 8, mark=healing.events)) == []


def test_without_a_restart_nothing_is_claimed() -> None:
    healing = Healing(Residency(LAYOUT))

    assert healing.changes(Claim(TOKENS, 8, mark=healing.events)) == []
