"""The layout follows the engine's ``created`` events: windows clamped, joined, parted, or never created.

TensorRT-LLM clamps each window to its longest sequence, and manager V1 to what memory allows; windows that
are equal then share a pool, of which one event tells.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from tests.trtllm_events_helpers import LAYOUT, Engine, block, feed
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import NO_SUCH_GROUP, BlocksRemoved, BlocksStored, EngineBlock, GroupCreated
from vswa_plugin.errors import ConfigError, ProtocolError
from vswa_plugin.publishing.publisher import Publisher, PublisherOptions
from vswa_plugin.publishing.residency import Residency, Restart
from vswa_plugin.wire.events import Event, Layout, Source, Stored, decode

ONE = [1, 2, 3, 4]
TWO_WINDOWS, GLOBAL_ONLY, SLIDING_ONLY = (8, None), (None,), (8,)
THREE_WINDOWS = (8, 16, None)


def layout_of(*windows: int | None) -> CacheLayout:
    groups = tuple(CacheGroup(group_id, window, 4) for group_id, window in enumerate(windows))
    return CacheLayout(groups, "trtllm_v2", "m")


def created(engine: Engine, windows: tuple[int, ...], *, named: bool) -> list[dict[str, Any]]:
    """As manager V2 names its groups, or as V1 does by their windows alone."""
    return [engine.created(window, number if named else None) for number, window in enumerate(windows)]


def settled(declared: tuple[int | None, ...], raw: list[dict[str, Any]]) -> dict[int, int | None]:
    """Windows by group once the first block has come, as a residency that follows the adapter has them."""
    layout = layout_of(*declared)
    adapter, residency = TrtllmEventAdapter(layout), Residency(layout)
    window = raw[0]["window_size"]
    group = raw[0].get("layer_group_id")
    engine = Engine()
    engine.next_id = len(raw)
    named = {"window_size": window} | ({} if group is None else {"layer_group_id": group})
    first = engine.stored(None, block(1, ONE), group=None, **named)
    for told in [event for each in (*raw, first) for event in adapter.feed(each)]:
        try:
            residency.apply(told)
        except Restart:
            continue
    assert sum(map(len, residency.resident().values())), "the first block is not lost with the correction"
    return {group.group_id: group.window_size for group in residency.layout.groups}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("declared", "windows", "expected"),
    [
        (TWO_WINDOWS, (8, 8192), [8, None]),
        (TWO_WINDOWS, (8, 8193), [8, None]),
        (TWO_WINDOWS, (4, 8192), [4, None]),
        # All windows clamped to one longest sequence: one pool, in which the global layers are too.
        (TWO_WINDOWS, (8,), [None]),
        (TWO_WINDOWS, (6,), [None]),
        (TWO_WINDOWS, (64,), [None]),
        (THREE_WINDOWS, (8, 12), [8, None]),
        (THREE_WINDOWS, (8,), [None]),
        # One token more than the window for the step of overlap: two pools where one was declared.
        (GLOBAL_ONLY, (8, 9), [8, None]),
        (GLOBAL_ONLY, (8192,), [None]),
        (GLOBAL_ONLY, (6,), [None]),
        # A model without global layers has none, whatever it has created.
        (SLIDING_ONLY, (8,), [8]),
        (SLIDING_ONLY, (4,), [4]),
    ],
)
def test_the_layout_is_what_the_engine_created(
    declared: tuple[int | None, ...], windows: tuple[int, ...], expected: list[int | None], named: bool
) -> None:
    told = settled(declared, created(Engine(), windows, named=named))

    assert expected == list(told.values())


def test_a_declared_group_is_gone_with_the_first_event_behind_the_created_ones() -> None:
    adapter, engine = TrtllmEventAdapter(layout_of(8, None)), Engine()

    assert [GroupCreated(0, 8)] == adapter.feed(engine.created(8, 0))
    assert [
        GroupCreated(0, None),
        GroupCreated(1, NO_SUCH_GROUP),
        BlocksStored(0, None, (EngineBlock(1, tuple(ONE)),)),
    ] == adapter.feed(engine.stored(None, block(1, ONE)))


def test_each_attention_dp_rank_is_told_of_it() -> None:
    adapter = TrtllmEventAdapter(layout_of(8, None))
    for rank in range(2):
        engine, dp = Engine(), {"attention_dp_rank": rank}
        told = adapter.feed(engine.created(8, 0) | dp) + adapter.feed(engine.removed(5) | dp)

        assert 1 == told.count(GroupCreated(1, NO_SUCH_GROUP, dp_rank=rank))
        assert [GroupCreated(0, None, dp_rank=rank), BlocksRemoved(0, (5,), dp_rank=rank)] == [
            event for event in told if event != GroupCreated(1, NO_SUCH_GROUP, dp_rank=rank)
        ][-2:]


@pytest.mark.parametrize("lost", [0, 1])
def test_where_created_events_may_be_lost_no_group_is_given_up(lost: int) -> None:
    adapter, engine = TrtllmEventAdapter(layout_of(8, None)), Engine()
    events = created(engine, (8, 8192), named=True)
    del events[lost]
    told = [told for raw in (*events, engine.removed(5, group=1)) for told in adapter.feed(raw)]

    assert GroupCreated(1, NO_SUCH_GROUP) not in told
    assert GroupCreated(0, NO_SUCH_GROUP) not in told
    assert BlocksRemoved(1, (5,)) == told[-1]


def test_without_created_events_the_declared_groups_stand() -> None:
    adapter, engine = TrtllmEventAdapter(layout_of(8, None)), Engine()

    assert [BlocksRemoved(0, (5,))] == adapter.feed(engine.removed(5))
    assert [BlocksRemoved(1, (5,))] == adapter.feed(engine.removed(5, group=1))


# -- residency and publisher -----------------------------------------------------------------------


def test_a_group_that_the_engine_has_not_created_leaves_the_layout_and_its_blocks_are_refused() -> None:
    residency = Residency(layout_of(8, None))
    with pytest.raises(
        Restart, match="cache group 0: expected window 8, the engine has not created it; the layout now"
    ):
        residency.apply(GroupCreated(0, NO_SUCH_GROUP))

    assert [1] == [group.group_id for group in residency.layout.groups]
    assert [] == residency.apply(GroupCreated(0, NO_SUCH_GROUP)), "said twice, it changes nothing"
    with pytest.raises(ConfigError, match="unknown cache group 0"):
        residency.apply(BlocksStored(0, None, (EngineBlock(1, tuple(ONE)),)))


def test_the_last_group_stays() -> None:
    residency = Residency(layout_of(None))

    with pytest.raises(ConfigError, match="at least one cache group"):
        residency.apply(GroupCreated(0, NO_SUCH_GROUP))
    assert [None] == [group.window_size for group in residency.layout.groups]


def published(raw: list[dict[str, Any]], *, late: bool) -> list[list[Event]]:
    """Events by epoch of a publisher that gets ``raw`` before or after its first batch."""
    layout = layout_of(8, None)
    epochs: dict[int, list[Event]] = {}

    async def send(payload: bytes) -> None:
        batch = decode(payload)
        epochs.setdefault(batch.epoch, []).extend(batch.events)  # type: ignore[arg-type]

    async def run() -> None:
        publisher = Publisher(
            Source("ns", "backend", 7),
            TrtllmEventAdapter(layout),
            Residency(layout),
            send,
            lambda source, batch: None,
            PublisherOptions(heartbeat_s=60),
        )
        if not late:
            publisher.offer(raw)
        running = asyncio.create_task(publisher.run())
        async with asyncio.timeout(5):
            while not epochs:
                await asyncio.sleep(0)
        if late:
            publisher.offer(raw)
        publisher.close()
        await running

    asyncio.run(run())
    return list(epochs.values())


@pytest.mark.parametrize("late", [False, True])
def test_readers_see_the_layout_as_it_is_and_the_first_block(late: bool) -> None:
    engine = Engine()
    raw = [engine.created(6), engine.stored(None, block(1, ONE), group=None, window_size=6)]
    *before, (layout, stored) = published(raw, late=late)

    assert isinstance(layout, Layout)
    assert [None] == [group.window_size for group in layout.groups]
    assert isinstance(stored, Stored)
    assert layout.groups[0].group_id == stored.group_id
    assert late == len(before), "one correction, one new epoch, and none before the first batch"


def test_what_a_refused_event_said_of_the_groups_comes_with_the_next_one() -> None:
    """Only one group is created, so that the first block closes the list of groups; that event is refused."""
    adapter, engine = TrtllmEventAdapter(LAYOUT), Engine()
    feed(adapter, engine.created(8, 0))
    with pytest.raises(ProtocolError):
        feed(adapter, engine.stored(11, block(11, ONE)))

    assert [GroupCreated(0, None), GroupCreated(1, NO_SUCH_GROUP), BlocksRemoved(0, (11,))] == feed(
        adapter, engine.removed(11)
    )
