"""The event adapters of this project, each in the suite for adapters."""

from __future__ import annotations

from typing import Any

from vswa_plugins.trtllm_events import TrtllmEventAdapter
from vswa_plugins.vllm_events import VllmEventAdapter

from tests import vllm_events_helpers as vllm
from tests.trtllm_events_helpers import LAYOUT, ONE, TWO, Engine, block
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import EventAdapter
from vswa_plugin.testing.conformance import EventAdapterConformance


def trtllm_samples(*groups: int | None) -> list[dict[str, Any]]:
    """Two groups are created, a chain grows in both, moves and goes.

    :param groups: the ``layer_group_id`` of the sliding and of the global group; None: manager V1 gives none.
    """
    engine = Engine()
    sliding, whole = groups
    cold = block("aa", ONE, cache_level=1)
    events = [engine.created(8, sliding), engine.created(64, whole)]
    for group, window in ((sliding, 8), (whole, 64)):
        events.append(engine.stored(None, block(11, ONE), group=group, window_size=window))
        events.append(engine.stored(11, block(12, TWO), cold, group=group, window_size=window))
    events.append({**engine.removed(12, group=sliding), "window_size": 8})
    events.append({**engine.updated("aa", {"old_value": 1, "new_value": 0}, group=whole), "window_size": 64})
    events.append(engine.stored(11, block(13, [9, 9, 9]), group=whole, window_size=64))
    events.append({**engine.removed("aa", 12, group=whole), "window_size": 64})
    return events


class TestTrtllmEventsOfManagerV2(EventAdapterConformance):
    layout = LAYOUT
    samples = trtllm_samples(0, 1)

    def new_adapter(self) -> EventAdapter:
        return TrtllmEventAdapter(self.layout)


class TestTrtllmEventsOfManagerV1(TestTrtllmEventsOfManagerV2):
    layout = CacheLayout(LAYOUT.groups, "trtllm_v1", "m")
    samples = trtllm_samples(None, None)


class TestTrtllmEventsOfManagerV1Contiguous(TestTrtllmEventsOfManagerV1):
    layout = CacheLayout(LAYOUT.groups, "trtllm_v1_contiguous", "m")


class TestVllmEvents(EventAdapterConformance):
    layout = vllm.layout_of(None, 8)
    samples = [  # noqa: RUF012
        vllm.stored("abc"),
        vllm.stored("abc", group=1, listed=(1, 2)),
        vllm.stored("abcd", 3, kv_cache_spec_kind="full_attention"),
        vllm.stored("abcd", 3, group=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=8),
        vllm.removed("ab", group=1),
        vllm.stored("ax", 1, lora_name="tuned", lora_id=1),
        vllm.removed("abcd", "abc"),
        vllm.CLEARED,
        vllm.stored("b"),
    ]

    def new_adapter(self) -> EventAdapter:
        return VllmEventAdapter(self.layout)


class TestVllmEventsOfBlocksOfTwoUnits(TestVllmEvents):
    """Full blocks of two letters, sliding ones of one."""

    layout = CacheLayout(
        (CacheGroup(0, None, 2 * vllm.SIZE), CacheGroup(1, 8, vllm.SIZE)), "vllm_hybrid", "m"
    )
    samples = [  # noqa: RUF012
        vllm.stored("abcd", listed=(1, 3), block_size=2 * vllm.SIZE),
        vllm.stored("abcd", group=1, listed=(1, 2)),
        vllm.stored("abcde", 4, kv_cache_spec_kind="full_attention"),
        vllm.stored("abcde", 4, group=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=8),
        vllm.removed("abc", group=1),
        vllm.removed("abcd", "ab"),
        vllm.CLEARED,
        vllm.stored("b", group=1),
    ]


class TestVllmEventsBefore024(TestVllmEvents):
    samples = [vllm.as_array(each) for each in TestVllmEvents.samples]  # noqa: RUF012


def test_a_vllm_event_with_a_parent_that_is_none_costs_no_other_event() -> None:
    """An event that lists fewer blocks than its tokens cover waits for the next one, which is a good one."""
    suite = TestVllmEvents()
    rank = suite.rank()
    rank.takes({**vllm.stored("abc", group=1, listed=(1, 2)), "parent_block_hash": []})

    assert 1 == len(rank.refused)
    assert {(0, vllm.name_of(chain)) for chain in ("a", "ab", "abc")} == rank.announced([vllm.stored("abc")])
    assert 1 == len(rank.refused)


def test_a_vllm_event_with_a_parent_that_is_none_counts_no_copies() -> None:
    """Found by the suite: the copies were counted before the parent was looked at."""
    suite = TestVllmEvents()
    rank = suite.rank()
    rank.takes({**vllm.stored("b", group=1), "parent_block_hash": []})

    assert 1 == len(rank.refused)
    assert {(0, vllm.name_of("b"))} == rank.announced([vllm.stored("b")])
