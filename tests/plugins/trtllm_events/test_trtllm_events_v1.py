"""TensorRT-LLM's event JSON of both managers as it is written, and what manager V1 leaves unsaid."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.trtllm_events import TrtllmEventAdapter, chain_keys, hashing, salt_id
from vswa_plugins.trtllm_events.hashing import block_key
from vswa_plugins.trtllm_events.searches import MAX_SEARCHED

from tests.trtllm_events_helpers import DATA, ONE, TWO, Engine, block, feed
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import (
    BlocksMoved,
    BlocksRemoved,
    BlocksStored,
    EngineEvent,
    EventsLost,
    GroupCreated,
)
from vswa_plugin.errors import ProtocolError
from vswa_plugin.publishing.residency import Residency, Restart

GROUPS = (CacheGroup(0, 8, 4), CacheGroup(1, None, 4))
LONGEST = 32768
TEXT = list(range(100, 140))


def adapter_of(rule: str, groups: tuple[CacheGroup, ...] = GROUPS) -> TrtllmEventAdapter:
    return TrtllmEventAdapter(CacheLayout(groups, rule, "m"))


class V1Engine(Engine):
    """Writes events without layer groups, in which blocks have the names that the engine gives them."""

    def store(self, parent: Any, *pairs: tuple[int, list[int]], window: int = LONGEST) -> dict[str, Any]:
        return self.stored(parent, *(block(*pair) for pair in pairs), group=None, window_size=window)

    def remove(self, *hashes: int, window: int = LONGEST) -> dict[str, Any]:
        return self.removed(*hashes, group=None, window_size=window)


def chain(blocks: int) -> list[tuple[int, list[int]]]:
    """(hash, tokens) of the first blocks of ``TEXT``."""
    parts = [TEXT[i * 4 : i * 4 + 4] for i in range(blocks)]
    return list(zip(chain_keys(TEXT, 4)[:blocks], parts, strict=True))


def as_list(told: EngineEvent) -> list[Any]:
    match told:
        case GroupCreated():
            return ["created", told.group_id, told.window_size]
        case BlocksStored():
            hashes = [each.hash for each in told.blocks]
            return ["stored", told.group_id, told.parent_hash, hashes, told.tier, told.cache_salt]
        case BlocksRemoved():
            return ["removed", told.group_id, list(told.hashes)]
        case BlocksMoved():
            return ["moved", told.group_id, list(told.hashes), told.tier]
        case EventsLost():
            return ["lost", told.expected_id, told.got_id]


# -- as they are written ---------------------------------------------------------------------------


def golden(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(DATA) / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "rule"), [("trtllm-events-v2.jsonl", "trtllm_v2"), ("trtllm-events-v1.jsonl", "trtllm_v1")]
)
def test_golden_events_mean_what_is_written_beside_them(name: str, rule: str) -> None:
    adapter = adapter_of(rule)
    for row in golden(name):
        before = copy.deepcopy(row["event"])

        assert row["means"] == [as_list(told) for told in adapter.feed(row["event"])], row["event"]
        assert before == row["event"]


def test_block_hashes_are_the_published_ones() -> None:
    first = block_key([1, 2, 3, 4], None)
    salted = block_key([1, 2, 3, 4], None, salt=123)

    assert (924206229973855, 6875034662206558884) == (first, block_key([5, 6], first))
    assert (6280297290684427985, 18177682803760873588) == (salted, block_key([5, 6], salted))
    assert [first] == chain_keys([1, 2, 3, 4, 5], 4)


def test_a_lora_is_part_of_every_hash_and_a_salt_of_the_first() -> None:
    plain, lora, salted = (chain_keys(TEXT, 4, *more) for more in ((), (3,), (None, salt_id("s"))))

    assert not set(plain) & set(lora) and not set(plain) & set(salted)
    assert block_key(TEXT[4:8], salted[0]) == salted[1]
    assert block_key(TEXT[4:8], lora[0]) != lora[1]


# -- windows ---------------------------------------------------------------------------------------


def windows_told(adapter: TrtllmEventAdapter, *events: dict[str, Any]) -> dict[int, int | None]:
    last: dict[int, int | None] = {}
    for told in feed(adapter, *events):
        if isinstance(told, GroupCreated):
            last[told.group_id] = told.window_size
    return last


def test_windows_that_memory_clamped_are_taken_in_the_order_of_their_size() -> None:
    engine = V1Engine()
    groups = (CacheGroup(0, 512, 4), CacheGroup(1, None, 4))
    adapter = adapter_of("trtllm_v1", groups)

    assert {0: 512, 1: None} == windows_told(adapter, engine.created(512), engine.created(20000))
    assert {0: 256, 1: None} == windows_told(
        adapter_of("trtllm_v1", groups), Engine().created(256), Engine().created(20000)
    )
    assert [BlocksRemoved(1, (5,))] == adapter.feed(engine.remove(5, window=20000))


def test_more_windows_than_were_declared_become_groups() -> None:
    adapter, engine = adapter_of("trtllm_v1", GROUPS[1:]), V1Engine()

    assert {1: 8, 2: None} == windows_told(adapter, engine.created(8), engine.created(LONGEST))
    assert [BlocksRemoved(1, (5,)), BlocksRemoved(2, (6,))] == feed(
        adapter, engine.remove(5, window=8), engine.remove(6)
    )


def test_where_created_events_are_lost_other_events_tell_the_windows() -> None:
    engine = Engine()
    engine.next_id = 2
    told = adapter_of("trtllm_v2").feed(engine.removed(5, group=0, window_size=12))

    assert [EventsLost(0, 2), GroupCreated(0, 12), BlocksRemoved(0, (5,))] == told


def test_a_layout_that_was_corrected_begins_a_new_epoch_once() -> None:
    residency, adapter, engine = (
        Residency(CacheLayout(GROUPS, "trtllm_v2", "m")),
        adapter_of("trtllm_v2"),
        Engine(),
    )
    restarts = 0
    for raw in [engine.created(12, 0), engine.created(LONGEST, 1), engine.removed(1, window_size=12)]:
        for told in adapter.feed(raw):
            try:
                residency.apply(told)
            except Restart:
                restarts += 1

    assert 1 == restarts
    assert (12, None) == tuple(group.window_size for group in residency.layout.groups)


def test_a_window_that_is_no_declared_one_clamped_is_refused() -> None:
    with pytest.raises(ProtocolError, match="got window_size 6"):
        adapter_of("trtllm_v1").feed(V1Engine().remove(5, window=6))


# -- parents that are not said ---------------------------------------------------------------------


def stored_runs(told: list[EngineEvent]) -> list[tuple[int, Any, list[Any]]]:
    return [
        (each.group_id, each.parent_hash, [b.hash for b in each.blocks])
        for each in told
        if isinstance(each, BlocksStored)
    ]


def test_blocks_behind_ones_that_were_there_already_get_their_true_parent() -> None:
    adapter, engine = adapter_of("trtllm_v1"), V1Engine()
    a, b, c, d, e = chain(5)
    feed(adapter, engine.store(None, a, b, c))

    told = feed(adapter, engine.remove(a[0]), engine.store(None, a, d, e))

    assert [(1, None, [a[0]]), (1, c[0], [d[0], e[0]])] == stored_runs(told)


def test_what_another_window_holds_is_no_parent_in_this_one() -> None:
    adapter, engine = adapter_of("trtllm_v1"), V1Engine()
    a, b, c = chain(3)
    feed(adapter, engine.store(None, a, b))

    told = feed(
        adapter,
        engine.store(None, a, window=8),
        engine.store(None, c, window=8),
        engine.remove(c[0], window=8),
    )

    assert [(0, None, [a[0]])] == stored_runs(told)
    assert not any(isinstance(each, BlocksRemoved) for each in told), "what was left out is not removed"


def test_the_search_for_a_parent_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, engine = adapter_of("trtllm_v1"), V1Engine()
    siblings = [(block_key([i, 0, 0, 0], None), [i, 0, 0, 0]) for i in range(MAX_SEARCHED + 9)]
    feed(adapter, *(engine.store(None, each) for each in siblings))

    looked_at = []
    monkeypatch.setattr(hashing, "block_key", lambda *block: looked_at.append(block))

    assert [] == feed(adapter, engine.store(None, (12345, [9, 9, 9, 9])))
    assert MAX_SEARCHED == len(looked_at)


def test_an_engine_whose_names_are_made_otherwise_is_believed() -> None:
    adapter, engine = adapter_of("trtllm_v1"), V1Engine()

    assert [(1, None, [11, 12])] == stored_runs(feed(adapter, engine.store(None, (11, ONE), (12, TWO))))


def test_events_of_manager_v2_say_their_parents(caplog: pytest.LogCaptureFixture) -> None:
    adapter, engine = adapter_of("trtllm_v1"), Engine()
    feed(adapter, engine.stored(None, block(chain(1)[0][0], chain(1)[0][1])))
    told = feed(adapter, engine.stored(3, block(11, ONE)), engine.stored(11, block(12, TWO)))

    assert [(0, 3, [11]), (0, 11, [12])] == stored_runs(told)
    assert [
        "reuse rule trtllm_v1, but the events are those of KV cache manager V2: predictions may be wrong; "
        "set reuse_rule to trtllm_v2"
    ] == [record.getMessage() for record in caplog.records]


def test_after_a_loss_nothing_is_known_to_be_a_parent() -> None:
    adapter, engine = adapter_of("trtllm_v1"), V1Engine()
    a, b, c = chain(3)
    feed(adapter, engine.store(None, a, b))
    engine.next_id += 1

    assert [(1, None, [a[0]])] == stored_runs(feed(adapter, engine.store(None, a, c)))


# -- losses that are not said ----------------------------------------------------------------------


def test_in_the_12_line_a_removal_takes_all_below_it_along_in_its_window() -> None:
    adapter, engine = adapter_of("trtllm_v1_contiguous"), V1Engine()
    a, b, c = chain(3)
    fork = (block_key(ONE, a[0]), ONE)
    feed(adapter, engine.store(None, a, b, c), engine.store(a[0], fork), engine.store(None, a, b, window=8))
    (told,) = feed(adapter, engine.remove(a[0]))

    assert isinstance(told, BlocksRemoved)
    assert (1, {a[0], b[0], c[0], fork[0]}) == (told.group_id, set(told.hashes))
    assert [BlocksRemoved(1, (c[0],))] == feed(adapter, engine.remove(c[0])), "known to be gone, and harmless"
    assert [BlocksRemoved(0, (b[0],))] == feed(adapter, engine.remove(b[0], window=8))


@pytest.mark.parametrize("rule", ["trtllm_v1", "trtllm_v2"])
def test_under_the_other_rules_what_hangs_on_a_removed_block_stays(rule: str) -> None:
    adapter, engine = adapter_of(rule), V1Engine()
    a, b = chain(2)
    feed(adapter, engine.store(None, a, b))

    assert [BlocksRemoved(1, (a[0],))] == feed(adapter, engine.remove(a[0]))


def test_a_block_that_comes_back_brings_nothing_back_with_it() -> None:
    adapter, engine = adapter_of("trtllm_v1_contiguous"), V1Engine()
    a, b, c = chain(3)
    feed(adapter, engine.store(None, a, b, c), engine.remove(b[0]), engine.store(a[0], b))

    assert [BlocksRemoved(1, (b[0],))] == feed(adapter, engine.remove(b[0]))


def test_what_is_remembered_of_chains_goes_with_the_blocks() -> None:
    adapter, engine = adapter_of("trtllm_v1_contiguous"), V1Engine()
    blocks = chain(6)
    feed(adapter, engine.store(None, *blocks), engine.store(None, *blocks, window=8))
    feed(adapter, *(engine.remove(key, window=window) for window in (8, LONGEST) for key, _ in blocks))
    held = adapter._ranks[0].chains._held

    assert {0: ({}, {}), 1: ({}, {})} == {
        group: (links.parents, links.children) for group, links in held.items()
    }


# -- through the residency -------------------------------------------------------------------------


def test_repeats_and_removals_of_what_was_never_stored_change_nothing() -> None:
    residency, adapter, engine = (
        Residency(CacheLayout(GROUPS, "trtllm_v1", "m")),
        adapter_of("trtllm_v1"),
        V1Engine(),
    )
    a, b = chain(2)
    events = [engine.remove(a[0]), engine.store(None, a, b), engine.store(None, a, b), engine.remove(b[0], 7)]
    changes = [change for raw in events for told in adapter.feed(raw) for change in residency.apply(told)]

    assert ["Stored", "Removed"] == [type(change).__name__ for change in changes]
    assert {0: 0, 1: 1} == residency.counts()


def test_a_sliding_block_is_named_by_what_the_global_group_holds() -> None:
    residency, adapter, engine = (
        Residency(CacheLayout(GROUPS, "trtllm_v2", "m")),
        adapter_of("trtllm_v2"),
        Engine(),
    )
    a, b, c = chain(3)
    for raw in (
        engine.stored(None, *(block(*each) for each in (a, b, c)), group=1),
        engine.stored(b[0], block(*c), group=0),
        engine.stored(77, block(78, ONE), group=0),
    ):
        for told in adapter.feed(raw):
            residency.apply(told)

    assert {0: 1, 1: 3} == residency.counts()
    assert 1 == residency.unattributed, "its parent was never announced by any group"


def test_a_block_that_was_believed_goes_by_its_removal_though_it_is_left_out_later() -> None:
    """Before any name was seen to be what its tokens make of it, an engine's names are believed."""
    adapter, engine = adapter_of("trtllm_v1"), V1Engine()
    odd = (11, TWO)
    feed(adapter, engine.store(None, odd), engine.store(None, *chain(1)), engine.store(None, odd))

    assert [BlocksRemoved(1, (11,))] == feed(adapter, engine.remove(11))
