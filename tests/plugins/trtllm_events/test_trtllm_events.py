"""TensorRT-LLM's event JSON, read into the host's engine events."""

from __future__ import annotations

import copy
import gzip
import json
from typing import Any

import pytest
import vswa_plugins.trtllm_events as plugin
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from tests.trtllm_events_helpers import DATA, LAYOUT, ONE, TWO, Engine, block, feed
from tests.trtllm_events_helpers import adapter as adapter
from tests.trtllm_events_helpers import engine as engine
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import (
    BlocksMoved,
    BlocksRemoved,
    BlocksStored,
    EngineBlock,
    EngineEvent,
    EventsLost,
    GroupCreated,
)
from vswa_plugin.errors import ProtocolError

# -- what events mean ------------------------------------------------------------------------------


def test_stored_blocks_keep_their_order_and_parent(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    blocks = (EngineBlock(11, tuple(ONE)), EngineBlock(12, tuple(TWO)))

    assert [BlocksStored(1, 10, blocks)] == adapter.feed(
        engine.stored(10, block(11, ONE), block(12, TWO), group=1)
    )


def test_a_salt_may_stand_at_the_blocks_or_above_them(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    at_blocks = engine.stored(None, block(1, ONE, cache_salt="a"))
    above = engine.stored(None, block(2, ONE))
    above["data"]["cache_salt"] = "a"

    assert [told.cache_salt for told in feed(adapter, at_blocks, above)] == ["a", "a"]  # type: ignore[union-attr]


def test_blocks_on_several_tiers_are_told_tier_by_tier(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    event = engine.stored(None, block(1, ONE), block(2, TWO, cache_level=1))

    assert [
        BlocksStored(0, None, (EngineBlock(1, tuple(ONE)),)),
        BlocksStored(0, 1, (EngineBlock(2, tuple(TWO)),), tier="host"),
    ] == adapter.feed(event)


def test_removed_names_its_group(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    expected = [BlocksRemoved(0, (1, 2)), BlocksRemoved(1, (3,))]

    assert expected == feed(adapter, engine.removed(1, 2), engine.removed(3, group=1))


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ({"type": "event_diff", "old_value": 0, "new_value": 1}, [BlocksMoved(0, (7,), "host")]),
        ({"type": "event_diff", "old_value": 1, "new_value": 0}, [BlocksMoved(0, (7,), "device")]),
        ({"type": "event_diff", "old_value": 1, "new_value": 2}, [BlocksMoved(0, (7,), "disk")]),
        ({"type": "event_diff", "old_value": 1, "new_value": 1}, []),
        (None, []),
    ],
)
def test_updated_tells_of_a_change_of_tier_only(
    adapter: TrtllmEventAdapter, engine: Engine, level: Any, told: list[EngineEvent]
) -> None:
    assert told == adapter.feed(engine.updated(7, level))


def test_signed_hashes_are_the_same_as_unsigned(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    top = (1 << 64) - 5
    stored, removed = feed(adapter, engine.stored(-6, block(-5, ONE)), engine.removed(-5, top))

    assert BlocksStored(0, top - 1, (EngineBlock(top, tuple(ONE)),)) == stored
    assert BlocksRemoved(0, (top, top)) == removed


def test_hashes_of_another_algorithm_are_kept_as_strings(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    told = adapter.feed(engine.stored("aa", block("bb", ONE)))

    assert [BlocksStored(0, "aa", (EngineBlock("bb", tuple(ONE)),))] == told


def test_token_ids_may_be_digits_in_a_string(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    assert adapter.feed(engine.stored(None, block(1, ONE))) == feed(
        TrtllmEventAdapter(LAYOUT), Engine().stored(None, block(1, ["1", "2", "3", "4"]))
    )


def test_keys_that_are_not_known_are_ignored(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    event = engine.stored(None, block(1, ONE, uuid=None, new=[1]), novelty={"a": 1})
    event["data"]["more"] = "?"

    assert [BlocksStored(0, None, (EngineBlock(1, tuple(ONE)),))] == adapter.feed(event)


def test_keys_that_older_versions_lack_are_not_missed(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    old = block(1, ONE)
    for key in ("mm_keys", "cache_level", "priority", "type"):
        del old[key]
    for token in old["tokens"]:
        del token["token_extra_id"]

    assert [BlocksStored(0, None, (EngineBlock(1, tuple(ONE)),))] == adapter.feed(engine.stored(None, old))


# -- groups ----------------------------------------------------------------------------------------


def test_created_tells_each_group_with_none_for_the_global_one(
    adapter: TrtllmEventAdapter, engine: Engine
) -> None:
    told = feed(adapter, engine.created(8, 0), engine.created(8192, 1))

    assert [GroupCreated(0, 8), GroupCreated(1, None)] == told


@pytest.mark.parametrize(
    "declared",
    [
        (CacheGroup(0, None, 4),),
        (CacheGroup(0, None, 4), CacheGroup(1, 8, 4)),
        (CacheGroup(0, 4, 4), CacheGroup(1, None, 4)),
        (CacheGroup(0, 16, 4), CacheGroup(1, None, 4)),
    ],
)
def test_created_corrects_what_was_declared(declared: tuple[CacheGroup, ...], engine: Engine) -> None:
    adapter = TrtllmEventAdapter(CacheLayout(declared, "trtllm_v2", "m"))
    last: dict[int, int | None] = {}
    for told in feed(adapter, engine.created(8, 0), engine.created(8192, 1)):
        assert isinstance(told, GroupCreated)
        last[told.group_id] = told.window_size

    assert last == {0: 8, 1: None}
    assert [BlocksRemoved(1, (5,))] == adapter.feed(engine.removed(5, group=1))


def test_without_a_layer_group_id_events_are_joined_by_window(
    adapter: TrtllmEventAdapter, engine: Engine
) -> None:
    told = feed(
        adapter,
        engine.created(8),
        engine.created(8192),
        engine.removed(1, group=None, window_size=8),
        engine.removed(2, group=None, window_size=8192),
        engine.removed(3, group=None, window_size=4096),
    )

    assert [
        GroupCreated(0, 8),
        GroupCreated(1, None),
        BlocksRemoved(0, (1,)),
        BlocksRemoved(1, (2,)),
        BlocksRemoved(1, (3,)),
    ] == told


def test_with_one_group_no_window_is_needed(engine: Engine) -> None:
    adapter = TrtllmEventAdapter(CacheLayout((CacheGroup(3, None, 4),), "trtllm_v2", "m"))

    assert [BlocksRemoved(3, (1,))] == adapter.feed(engine.removed(1, group=None))


# -- ids -------------------------------------------------------------------------------------------


def test_a_skipped_id_is_told_before_the_event(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    feed(adapter, engine.removed(1))
    engine.next_id = 4

    assert [EventsLost(1, 4), BlocksRemoved(0, (2,))] == adapter.feed(engine.removed(2))
    assert [BlocksRemoved(0, (3,))] == adapter.feed(engine.removed(3))


def test_the_first_id_is_zero_and_a_smaller_one_is_a_loss_too(
    adapter: TrtllmEventAdapter, engine: Engine
) -> None:
    engine.next_id = 2
    told = feed(adapter, engine.removed(1), Engine().removed(2))

    assert [EventsLost(0, 2), EventsLost(3, 0)] == [event for event in told if isinstance(event, EventsLost)]


def test_ids_count_per_attention_dp_rank(adapter: TrtllmEventAdapter) -> None:
    ranks = [Engine(), Engine()]
    told = [adapter.feed(ranks[r].removed(5, attention_dp_rank=r)) for r in (0, 1, 1, 0)]

    assert [[BlocksRemoved(0, (5,), dp_rank=r)] for r in (0, 1, 1, 0)] == told


def test_ids_of_events_that_tell_nothing_count(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    told = feed(adapter, engine.updated(1, None), engine.stored(None, block(1, [1])), engine.removed(2))

    assert [BlocksRemoved(0, (2,))] == told


def test_an_event_that_cannot_be_read_consumes_its_id(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    with pytest.raises(ProtocolError):
        adapter.feed(engine.event({"type": "novel"}))

    assert [BlocksRemoved(0, (2,))] == adapter.feed(engine.removed(2))


def test_a_loss_seen_with_an_event_that_cannot_be_read_is_told_next(
    adapter: TrtllmEventAdapter, engine: Engine
) -> None:
    engine.next_id = 7
    with pytest.raises(ProtocolError):
        adapter.feed(engine.event({"type": "novel"}))

    assert [EventsLost(0, 7), BlocksRemoved(0, (2,))] == adapter.feed(engine.removed(2))


# -- a real manager --------------------------------------------------------------------------------


def test_a_recorded_engine_is_followed_exactly() -> None:
    """From the events alone, in whole blocks, what the recorded manager reused for each prompt."""
    with gzip.open(DATA / "trtllm-v2-gemma3-1b-head.jsonl.gz", "rt") as lines:
        header, *records = map(json.loads, lines)
    bs, window = header["tokens_per_block"], header["max_attention_window"]
    groups = (CacheGroup(0, window, bs), CacheGroup(1, None, bs))
    adapter = TrtllmEventAdapter(CacheLayout(groups, "trtllm_v2", "m"))
    held: dict[int, set[int | str]] = {0: set(), 1: set()}
    names: dict[tuple[Any, ...], int | str] = {}
    expected, predicted = [], []
    for record in records:
        if record["type"] == "event":
            before = copy.deepcopy(record["event"])
            for told in adapter.feed(record["event"]):
                follow(told, held, names)
            assert before == record["event"], "an event is not changed by reading it"
        else:
            expected.append(record["cached_tokens"] // bs)
            predicted.append(resumable_blocks(record["token_ids"], held, names, bs, window))

    assert len(expected) == 26
    assert any(expected)
    assert expected == predicted


def follow(
    told: EngineEvent, held: dict[int, set[int | str]], names: dict[tuple[Any, ...], int | str]
) -> None:
    if isinstance(told, BlocksStored):
        parent = told.parent_hash
        for stored in told.blocks:
            assert stored.hash not in held[told.group_id], "stored twice"
            held[told.group_id].add(stored.hash)
            names[parent, stored.token_ids] = parent = stored.hash
    elif isinstance(told, BlocksRemoved):
        for block_hash in told.hashes:
            held[told.group_id].remove(block_hash)
    else:
        assert isinstance(told, GroupCreated)


def resumable_blocks(
    prompt: list[int],
    held: dict[int, set[int | str]],
    names: dict[tuple[Any, ...], int | str],
    bs: int,
    window: int,
) -> int:
    chain: list[int | str] = []
    for i in range(0, len(prompt) - bs + 1, bs):
        name = names.get((chain[-1] if chain else None, tuple(prompt[i : i + bs])))
        if name is None:
            break
        chain.append(name)
    best = 0
    for blocks in range(len(chain) + 1):
        end = min(blocks * bs, len(prompt) - 1)
        sliding = chain[max(0, end - window + 1) // bs : blocks]
        if held[1].issuperset(chain[:blocks]) and held[0].issuperset(sliding):
            best = end // bs
    return best


# -- the hook --------------------------------------------------------------------------------------


def test_the_plugin_answers_for_its_format_only() -> None:
    assert isinstance(plugin.vswa_event_adapter("trtllm", LAYOUT), TrtllmEventAdapter)
    assert plugin.vswa_event_adapter("vllm", LAYOUT) is None
