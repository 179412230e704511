"""What ranks hold by last use, and what the next evictions are worth, against a plain count."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.placement import holdings
from vswa_plugins.placement.holdings import SAMPLE, Holdings
from vswa_plugins.placement.odds import ReuseOdds

from tests.properties import examples
from vswa_plugin.blocks import CacheGroup, CacheLayout, Memory, Pool
from vswa_plugin.wire import Cleared, Rank, Removed, Stored, layout_event

A, B, C = Rank(1), Rank(2), Rank(3)
TWO = CacheLayout((CacheGroup(0, 128, 32), CacheGroup(1, None, 32)), "trtllm_v2", "m")
WHOLE = CacheLayout((CacheGroup(0, None, 32),), "trtllm_v2", "m")


class Fixed(ReuseOdds):
    """A chance that falls with the age in a way that is easy to count."""

    def __init__(self) -> None:
        super().__init__(1_000)

    def chance(self, age: int) -> float:
        return 1 / (1 + age)


@pytest.fixture(autouse=True)
def every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "SAMPLE", 1)


def of_ranks(layout: CacheLayout, *ranks: Rank, blocks: int | None = None) -> Holdings:
    made = Holdings(Fixed(), copy_worth=0.1)
    memory = None
    if blocks is not None:
        memory = Memory(tuple(Pool((group.group_id,), blocks) for group in layout.groups))
    for rank in ranks:
        made.apply(rank, layout_event(layout, memory=memory))
    return made


def store(made: Holdings, rank: Rank, names: range, group: int = 0) -> None:
    made.apply(rank, Stored(group, 0, None, tuple(names), "device"))


def test_nothing_is_evicted_while_there_is_room() -> None:
    made = of_ranks(WHOLE, A, blocks=100)
    store(made, A, range(60))

    assert (0.0, 0.0) == made.victims(A, 40)
    assert 10 == made.victims(A, 50)[0]
    assert (0.0, 0.0) == made.victims(B, 50)


def test_where_the_size_is_not_stated_a_rank_is_full_from_its_first_eviction() -> None:
    made = of_ranks(WHOLE, A)
    store(made, A, range(100))
    assert (0.0, 0.0) == made.victims(A, 50) and made.capacity(A) is None

    made.apply(A, Removed(0, (0,)))
    assert 50 == made.victims(A, 50)[0]
    assert 100 == made.capacity(A)


def test_the_oldest_blocks_go_first_and_those_used_again_go_last() -> None:
    made, odds = of_ranks(WHOLE, A, blocks=30), None
    odds = made._odds
    for first in (0, 10, 20):
        odds.seen([])
        store(made, A, range(first, first + 10))
    odds.seen([])
    made.used(A, range(0, 10), 10)

    # Of ages 2, 1 and 0 now: the second ten, the third ten, the first ten.
    assert pytest.approx((10, 10 / 3)) == made.victims(A, 10)
    assert pytest.approx((20, 10 / 3 + 10 / 2)) == made.victims(A, 20)
    assert pytest.approx((30, 10 / 3 + 10 / 2 + 10)) == made.victims(A, 90)


def test_a_block_that_another_rank_holds_is_worth_a_tenth_until_that_rank_loses_it() -> None:
    made = of_ranks(WHOLE, A, B, C, blocks=10)
    store(made, A, range(10))
    assert pytest.approx((10, 10)) == made.victims(A, 10)

    store(made, B, range(10))
    store(made, C, range(10))
    assert pytest.approx((10, 1)) == made.victims(A, 10)

    made.apply(B, Removed(0, tuple(range(10))))
    assert pytest.approx((10, 1)) == made.victims(A, 10)
    made.apply(C, None)
    assert pytest.approx((10, 10)) == made.victims(A, 10)


def test_a_block_keeps_its_age_when_another_rank_takes_a_copy() -> None:
    made = of_ranks(WHOLE, A, B, blocks=2)
    store(made, A, range(0, 1))
    made._odds.seen([])
    store(made, A, range(1, 2))
    store(made, B, range(0, 1))

    assert pytest.approx((1, 0.1 / 2)) == made.victims(A, 1)


def test_only_the_window_before_the_boundary_is_used_of_a_sliding_group() -> None:
    made = of_ranks(TWO, A, blocks=20)
    for group in (0, 1):
        store(made, A, range(20), group)
    made._odds.seen([])
    made.used(A, range(20), 16)  # a window of four blocks

    sliding, whole = made._ranks[A].pools
    assert [16, 4] == [sum(counts) for counts in sliding.ages.values()]
    assert [4, 16] == [sum(counts) for counts in whole.ages.values()]


def test_groups_of_one_pool_share_its_room() -> None:
    layout = CacheLayout((CacheGroup(0, 128, 32), CacheGroup(1, None, 32)), "vllm", "m")
    made = of_ranks(layout, A)
    for group in (0, 1):
        store(made, A, range(50), group)
    made.apply(A, Removed(0, (3,)))

    assert 50 == made.capacity(A)
    assert 1 == len(made._ranks[A].pools)


def test_a_rank_that_begins_anew_holds_nothing_and_has_room() -> None:
    for event in (Cleared(None), layout_event(WHOLE)):
        made = of_ranks(WHOLE, A)
        store(made, A, range(20))
        made.apply(A, Removed(0, (1,)))
        made.apply(A, event)

        assert (0.0, 0.0) == made.victims(A, 20)
        assert not made._ranks[A].pools[0].used and not made._holders
        store(made, A, range(10))
        assert (0.0, 0.0) == made.victims(A, 5)


@given(st.data())
@examples(100)
def test_the_counts_by_age_are_those_of_the_blocks_after_any_events(data: st.DataObject) -> None:
    made = of_ranks(TWO, A, B, C)
    ranks, names = (
        st.sampled_from((A, B, C)),
        st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True),
    )
    for _ in range(data.draw(st.integers(1, 40))):
        made._odds.seen([])
        rank, some, group = data.draw(ranks), data.draw(names), data.draw(st.integers(0, 1))
        match data.draw(st.integers(0, 5)):
            case 0 | 1:
                made.apply(rank, Stored(group, 0, None, tuple(some), "device"))
            case 2:
                made.apply(rank, Removed(group, tuple(some)))
            case 3:
                made.used(rank, some, len(some))
            case 4:
                made.apply(rank, Cleared(group))
            case 5:
                made.apply(rank, layout_event(TWO))

    held = {rank: [dict(pool.used) for pool in made._ranks[rank].pools] for rank in made.ranks()}
    holders = {
        key: {rank for rank, pools in held.items() if any(key in pool for pool in pools)}
        for pools in held.values()
        for pool in pools
        for key in pool
    }
    assert {key: len(ranks) for key, ranks in holders.items()} == {
        key: mask.bit_count() for key, mask in made._holders.items()
    }
    for rank, pools in held.items():
        for pool, used in zip(made._ranks[rank].pools, pools, strict=True):
            expected: dict[int, list[int]] = {}
            for key, request in used.items():
                expected.setdefault(request, [0, 0])[len(holders[key]) > 1] += 1
            assert expected == dict(pool.ages)
            assert list(pool.ages) == sorted(pool.ages)


def test_a_sample_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "SAMPLE", SAMPLE)
    rng, found = random.Random(5), []
    for _ in range(20):
        made = of_ranks(WHOLE, A)
        made.apply(A, Stored(0, 0, None, tuple(rng.getrandbits(64) for _ in range(4_096)), "device"))
        made.apply(A, Removed(0, (1,)))
        found.append(made.capacity(A) or 0.0)

    assert pytest.approx(4_096, rel=0.05) == sum(found) / len(found)
    assert pytest.approx((100, 100)) == made.victims(A, 100)
