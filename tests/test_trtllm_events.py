"""TensorRT-LLM's event JSON, read into the host's engine events."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vswa_plugins.trtllm_events as plugin
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from vswa_plugin.engine import (
    BlocksMoved,
    BlocksRemoved,
    BlocksStored,
    EngineBlock,
    EngineEvent,
    EventsLost,
    GroupCreated,
)
from vswa_plugin.errors import ProtocolError
from vswa_plugin.layout import CacheGroup, CacheLayout

DATA = Path(__file__).parent / "data"
LAYOUT = CacheLayout((CacheGroup(0, 8, 4), CacheGroup(1, None, 4)), "trtllm_v2", "m")


class Engine:
    """Writes events with ids that count up, as the engine does."""

    def __init__(self) -> None:
        self.next_id = 0

    def event(self, data: dict[str, Any], group: int | None = 0, **extra: Any) -> dict[str, Any]:
        event: dict[str, Any] = {"event_id": self.next_id, "data": data, "hash_algo": "v1_block_key"}
        if group is not None:
            event |= {"layer_group_id": group, "window_size": [8, 8192][group]}
        self.next_id += 1
        return event | extra

    def stored(
        self, parent: Any, *blocks: dict[str, Any], group: int | None = 0, **extra: Any
    ) -> dict[str, Any]:
        return self.event({"type": "stored", "parent_hash": parent, "blocks": list(blocks)}, group, **extra)

    def removed(self, *hashes: Any, group: int | None = 0, **extra: Any) -> dict[str, Any]:
        return self.event({"type": "removed", "block_hashes": list(hashes)}, group, **extra)

    def updated(self, block_hash: Any, level: Any, group: int | None = 0) -> dict[str, Any]:
        data = {"type": "updated", "block_hash": block_hash, "cache_level": level, "priority": None}
        return self.event(data, group)

    def created(self, window: int, group: int | None = None) -> dict[str, Any]:
        data = {"type": "created", "num_blocks_per_cache_level": [5]}
        return self.event(
            data, None, window_size=window, **({} if group is None else {"layer_group_id": group})
        )


def block(name: Any, token_ids: list[Any], **extra: Any) -> dict[str, Any]:
    tokens = [{"type": "unique_token", "token_id": t, "token_extra_id": 0} for t in token_ids]
    return {
        "type": "stored_block",
        "block_hash": name,
        "tokens": tokens,
        "cache_level": 0,
        "priority": 35,
        "mm_keys": [],
    } | extra


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def adapter() -> TrtllmEventAdapter:
    return TrtllmEventAdapter(LAYOUT)


def feed(adapter: TrtllmEventAdapter, *events: dict[str, Any]) -> list[EngineEvent]:
    return [told for event in events for told in adapter.feed(event)]


ONE, TWO = [1, 2, 3, 4], [5, 6, 7, 8]


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


# -- what is left out ------------------------------------------------------------------------------


def test_partial_blocks_are_left_out_and_so_is_their_removal(
    adapter: TrtllmEventAdapter, engine: Engine
) -> None:
    told = feed(
        adapter,
        engine.stored(None, block(1, ONE), block(2, [5, 6])),
        engine.removed(2, 1),
        engine.updated(2, {"old_value": 0, "new_value": 1}),
        engine.removed(2),
    )

    assert [
        BlocksStored(0, None, (EngineBlock(1, tuple(ONE)),)),
        BlocksRemoved(0, (1,)),
        BlocksMoved(0, (2,), "host"),
        BlocksRemoved(0, (2,)),
    ] == told


def test_a_left_out_block_is_one_group_s_affair(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    told = feed(adapter, engine.stored(None, block(2, [5, 6])), engine.removed(2, group=1), engine.removed(2))

    assert [BlocksRemoved(1, (2,))] == told


def test_an_event_of_partial_blocks_only_tells_nothing(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    event = engine.stored(1, block(2, [5, 6]))

    assert feed(adapter, event, engine.updated(2, {"old_value": 0, "new_value": 1})) == []


MM = [{"type": "mm_key", "hash": "ab" * 32, "start_offset": 0}]
DIGEST = ["ab" * 32, 2, 3, 4]
EXTRA = [{"type": "unique_token", "token_id": t, "token_extra_id": 9} for t in ONE]


@pytest.mark.parametrize(
    "unnameable", [block(2, ONE, mm_keys=MM), block(2, DIGEST), block(2, ONE, tokens=EXTRA)]
)
def test_what_tokens_cannot_name_is_left_out_with_all_below_it(
    adapter: TrtllmEventAdapter, engine: Engine, unnameable: dict[str, Any]
) -> None:
    told = feed(
        adapter,
        engine.stored(None, block(1, ONE), unnameable, block(3, TWO)),
        engine.stored(3, block(4, ONE), group=1),
        engine.stored(1, block(5, TWO)),
        engine.removed(4, 3, 2, 5, 1),
        engine.removed(4, group=1),
    )

    assert [
        BlocksStored(0, None, (EngineBlock(1, tuple(ONE)),)),
        BlocksStored(0, 1, (EngineBlock(5, tuple(TWO)),)),
        # Block 4 was stored in the other group only.
        BlocksRemoved(0, (4, 5, 1)),
    ] == told


def test_a_loss_does_not_make_unnameable_blocks_nameable(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    feed(adapter, engine.stored(None, block(2, ONE, mm_keys=MM)))
    engine.next_id += 1

    assert [EventsLost(1, 2)] == adapter.feed(engine.stored(2, block(3, TWO)))


# -- what is not an event of this format -----------------------------------------------------------


def broken() -> Iterator[tuple[str, list[str]]]:
    """(python expression that spoils ``e``, words of the error)"""
    yield "e.pop('event_id')", ["expected the field event_id", "data"]
    yield "e.update(event_id='3')", ["event_id", "whole number", "'3'"]
    yield "e.update(event_id=True)", ["event_id", "True"]
    yield "e.update(event_id=-1)", ["event_id", "-1"]
    yield "e.update(attention_dp_rank='x')", ["attention_dp_rank", "'x'"]
    yield "e.pop('data')", ["event 0", "field data"]
    yield "e.update(data=[1])", ["event 0, data", "an object", "a list"]
    yield "e['data'].pop('type')", ["event 0, data", "field type"]
    yield "e['data'].update(type='storde')", ["event 0", "unknown event type 'storde'", "'stored'"]
    yield "e.update(layer_group_id=7)", ["layer_group_id", "0 (window 8) or 1 (window global)", "got 7"]
    yield "e.update(layer_group_id=None, window_size=5)", ["window_size", "0 (window 8)", "got window_size 5"]
    yield "e.update(layer_group_id=None, window_size=None)", ["window_size None"]
    yield "e['data'].pop('parent_hash')", ["field parent_hash"]
    yield "e['data'].update(parent_hash=1.5)", ["parent_hash", "64-bit number", "1.5"]
    yield "e['data'].update(parent_hash=2**64)", ["parent_hash", "64-bit number"]
    yield "e['data'].update(blocks=None)", ["blocks", "a list", "None"]
    yield "e['data'].update(blocks=[5])", ["block 0", "an object", "5"]
    yield "b.pop('block_hash')", ["block 0", "field block_hash"]
    yield "b.update(block_hash='')", ["block 0", "block_hash", "''"]
    yield "b.pop('tokens')", ["block 0", "field tokens"]
    yield "b.update(tokens=[])", ["block 0", "tokens", "1 to 4", "0 of them"]
    yield "b.update(tokens=b['tokens'] * 2)", ["block 0", "1 to 4", "8 of them"]
    yield "b.update(tokens=[1, 2, 3, 4])", ["block 0", "tokens", "token_id"]
    yield "b['tokens'][0].update(token_id=-1)", ["block 0", "token_id", "[0, 2**32)"]
    yield "b['tokens'][0].update(token_id=2**32)", ["token_id"]
    yield "b['tokens'][0].update(token_id='1e3')", ["token_id", "str"]
    yield "b['tokens'][0].update(token_id=None)", ["token_id", "NoneType"]
    yield "b.update(cache_level=3)", ["cache_level", "2 (disk)", "got 3"]
    yield "b.update(cache_salt=5)", ["cache_salt", "a string or null"]
    yield "b.update(cache_salt=[5])", ["cache_salt", "a string or null"]
    yield "e['data']['blocks'].append(dict(b, cache_salt='a'))", ["cache_salt", "one for all blocks", "got 2"]


@pytest.mark.parametrize(("spoil", "words"), list(broken()))
def test_a_malformed_event_is_refused_with_field_and_value(
    adapter: TrtllmEventAdapter, engine: Engine, spoil: str, words: list[str]
) -> None:
    event = engine.stored(None, block(1, ONE))
    eval(spoil, {"e": event, "b": event["data"]["blocks"][0]})
    with pytest.raises(ProtocolError) as caught:
        adapter.feed(event)

    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"type": "removed"}, "field block_hashes"),
        ({"type": "removed", "block_hashes": 5}, "block_hashes: expected a list, got 5"),
        ({"type": "removed", "block_hashes": [None]}, "block_hashes: expected a 64-bit number"),
        ({"type": "updated"}, "field block_hash"),
        ({"type": "updated", "block_hash": 1, "cache_level": 1}, "cache_level: expected an object"),
        ({"type": "updated", "block_hash": 1, "cache_level": {"old_value": 0}}, "field new_value"),
        ({"type": "updated", "block_hash": 1, "cache_level": {"new_value": 9}}, "cache_level: expected 0"),
    ],
)
def test_other_malformed_events_are_refused_too(
    adapter: TrtllmEventAdapter, engine: Engine, data: dict[str, Any], words: str
) -> None:
    with pytest.raises(ProtocolError, match=words):
        adapter.feed(engine.event(data))


@pytest.mark.parametrize("raw", [None, 5, "stored", [1]])
def test_what_is_not_an_object_is_refused(adapter: TrtllmEventAdapter, raw: Any) -> None:
    with pytest.raises(ProtocolError, match="an event: expected an object with event_id"):
        adapter.feed(raw)


def test_no_error_quotes_a_token_id(adapter: TrtllmEventAdapter, engine: Engine) -> None:
    for spoiled in ([987654321, "x987654321", 3, 4], [987654321, 2**40 + 987654321, 3, 4]):
        event = engine.stored(None, block(1, spoiled))
        with pytest.raises(ProtocolError) as caught:
            adapter.feed(event)

        assert "987654321" not in str(caught.value)


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
