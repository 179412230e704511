"""TensorRT-LLM's event JSON: what is left out, and what is refused as malformed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from tests.trtllm_events_helpers import ONE, TWO, Engine, block, feed
from tests.trtllm_events_helpers import adapter as adapter
from tests.trtllm_events_helpers import engine as engine
from vswa_plugin.engine.contract import BlocksMoved, BlocksRemoved, BlocksStored, EngineBlock, EventsLost
from vswa_plugin.errors import ProtocolError

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
