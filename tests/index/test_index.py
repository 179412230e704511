"""The window index: what people and routers see of it. Exactness under any events: test_index_machine.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.index_helpers import BLOCK, BOTH_PATHS, LAYOUTS, PLUGIN_RULES, NaiveIndex, groups, new_index
from vswa_plugin.blocks.hashing import block_hashes, sequence_hashes
from vswa_plugin.blocks.kernel import SWITCH, load_kernel
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import RULES
from vswa_plugin.errors import ConfigError, InvariantError, StreamError
from vswa_plugin.index import WindowIndex
from vswa_plugin.index.part import MAX_DEAD
from vswa_plugin.index.plans import plan_for
from vswa_plugin.wire.events import Cleared, Event, Layout, Moved, Rank, Removed, Stored

pytestmark = pytest.mark.parametrize("kernel", BOTH_PATHS)

A, B = Rank(10), Rank(11, 1)
#: The picture of the design: a sliding window of two blocks, and global attention.
SLIDING, GLOBAL = 0, 1
LAYOUT = CacheLayout(groups(4, None), "trtllm_v2", "gemma")
PROMPT = [101, 102, 103, 104, 105, 106, 107, 108]
LONGER = len(PROMPT) * BLOCK + 1


def hold(index: WindowIndex, rank: Rank, group: int, blocks: list[int], tier: str = "device") -> None:
    index.apply(rank, Stored(group, 0, None, tuple(PROMPT[block] for block in blocks), tier))


def picture(kernel: bool, **settings: Any) -> WindowIndex:
    """A holds all global blocks, and of the sliding ones 3, 4, 6 and 7."""
    index = WindowIndex(kernel=kernel, **settings)
    index.join(A, LAYOUT)
    hold(index, A, GLOBAL, list(range(8)))
    hold(index, A, SLIDING, [3, 4, 6, 7])
    return index


def test_a_prompt_is_resumed_where_every_window_still_holds_what_it_sees(kernel: bool) -> None:
    index = picture(kernel)

    assert {A: 16} == index.score(PROMPT, LONGER)
    assert {A: 10} == index.score(PROMPT[:6], 6 * BLOCK + 1)
    assert {} == index.score(PROMPT[:4], 4 * BLOCK + 1)
    assert {} == index.score([], 1)


def test_a_repeated_prompt_of_whole_blocks_is_resumed_one_token_before_its_end(kernel: bool) -> None:
    assert {A: 15} == picture(kernel).score(PROMPT, 16)


def test_a_prompt_scores_the_same_from_its_tokens(kernel: bool) -> None:
    index = WindowIndex(kernel=kernel)
    tokens = list(range(1_000, 1_017))
    hashes = sequence_hashes(block_hashes(tokens, BLOCK))
    other_scheme = CacheLayout(groups(None), "vllm", "gemma", "another")
    for rank, layout in [(A, LAYOUT), (B, other_scheme)]:
        index.join(rank, layout)
        for group in layout.groups:
            index.apply(rank, Stored(group.group_id, 0, None, tuple(hashes)))

    assert {A: 16, B: 16} == index.score(hashes, len(tokens))
    assert {A: 16} == index.score_tokens(tokens) == index.score_tokens(tuple(tokens), "gemma")
    assert {} == index.score_tokens(tokens, "another model")


def test_block_sizes_are_hashed_apart(kernel: bool) -> None:
    index = WindowIndex(kernel=kernel)
    tokens = list(range(48))
    for rank, size in [(A, 16), (B, 8)]:
        index.join(rank, CacheLayout((CacheGroup(0, None, size),), "vllm", "gemma"))
        index.apply(rank, Stored(0, 0, None, tuple(sequence_hashes(block_hashes(tokens, size)))))

    assert {A: 32, B: 40} == index.score_tokens(tokens)


def test_models_are_scored_apart_and_a_rank_has_one(kernel: bool) -> None:
    index = picture(kernel)
    index.join(B, CacheLayout(groups(None), "vllm", "other"))
    hold(index, B, 0, [0, 1])

    assert {A: 16} == index.score(PROMPT, LONGER, "gemma")
    assert {B: 4} == index.score(PROMPT, LONGER, "other")
    assert {A: 16, B: 4} == index.score(PROMPT, LONGER)

    index.join(A, CacheLayout(groups(None), "vllm", "other"))
    assert {} == index.score(PROMPT, LONGER, "gemma")


def test_joining_again_keeps_blocks_and_a_layout_event_begins_from_empty(kernel: bool) -> None:
    index = picture(kernel)
    index.join(A, LAYOUT)
    assert {A: 16} == index.score(PROMPT, LONGER)

    index.apply(A, Layout(LAYOUT.groups, LAYOUT.rule, LAYOUT.hash_scheme, LAYOUT.model))
    assert {} == index.score(PROMPT, LONGER)
    assert {0: {"device": 0}, 1: {"device": 0}} == index.blocks(A)


def test_a_rank_that_is_not_scored_keeps_its_blocks_and_its_state_through_a_new_layout(kernel: bool) -> None:
    index = picture(kernel)
    index.set_scored(A, False)
    hold(index, A, SLIDING, [5])
    assert {} == index.score(PROMPT, LONGER)
    assert (1, 0) == (index.stats().ranks, index.stats().scored)

    index.set_scored(A, True)
    assert {A: 12} == index.score(PROMPT[:6], 6 * BLOCK + 1)

    index.set_scored(A, False)
    index.join(A, LAYOUTS[0])
    assert 0 == index.stats().scored
    index.check()


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (
            Stored(7, 0, None, (1,)),
            r"unknown cache group 7 of rank 10/0; .* 0 \(window 4\), 1 \(window global\)",
        ),
        (Removed(7, (1,)), "unknown cache group 7"),
        (Moved(7, (1,), "host"), "unknown cache group 7"),
        (Cleared(7), "unknown cache group 7"),
        (Stored(GLOBAL, 0, None, (1,), "tape"), "expected a tier of device, host, disk, got 'tape'"),
        (Moved(GLOBAL, (101,), "tape"), "got 'tape'"),
        (Stored(GLOBAL, 0, None, (1, -1)), "rank 10/0, group 1: a sequence hash"),
        (Stored(GLOBAL, 0, None, (1, 2**64)), "a sequence hash"),
        (Removed(GLOBAL, (101, "x")), "a sequence hash"),  # type: ignore[arg-type]
    ],
)
def test_an_event_that_cannot_be_applied_changes_nothing(kernel: bool, event: Event, said: str) -> None:
    index = picture(kernel)
    before = index.dump()

    with pytest.raises(StreamError, match=said):
        index.apply(A, event)
    assert before == index.dump()
    index.check()


def test_a_rank_that_never_joined_is_refused(kernel: bool) -> None:
    index = picture(kernel)

    for event in (Stored(GLOBAL, 0, None, (1,)), Removed(GLOBAL, (1,)), Cleared()):
        with pytest.raises(StreamError, match=r"rank 11/1 is not in the index; its layout must come first"):
            index.apply(B, event)
    index.drop(B)
    assert [A] == list(index.ranks)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (CacheLayout(groups(4), "trtlm_v2", "m"), "did you mean 'trtllm_v2'"),
        (CacheLayout((), "vllm", "m"), "at least one cache group"),
        (CacheLayout((CacheGroup(0, None, 2), CacheGroup(1, 4, 4)), "vllm", "m"), "one block size"),
        (CacheLayout(groups(5), "trtllm_v2", "m"), "multiple of the block size"),
    ],
)
def test_a_layout_that_cannot_be_used_leaves_all_as_it_was(
    kernel: bool, layout: CacheLayout, said: str
) -> None:
    index = picture(kernel)

    with pytest.raises(ConfigError, match=said):
        index.join(A, layout)
    assert {A: 16} == index.score(PROMPT, LONGER)
    index.check()


def test_a_block_counts_in_the_slowest_tier_that_must_be_loaded(kernel: bool) -> None:
    index = picture(kernel)
    index.apply(A, Moved(GLOBAL, (101, 102, 107), "host"))
    index.apply(A, Moved(SLIDING, (103, 104, 108, 999), "disk"))

    assert {"host": 3, "device": 4, "disk": 1} == index.tiers(A, PROMPT, 16)
    assert {"host": 3, "device": 4} == index.tiers(A, PROMPT, 15)
    assert {"host": 2, "disk": 1, "device": 2} == index.tiers(A, PROMPT, 10)
    assert {} == index.tiers(A, PROMPT, 0)
    assert {0: {"device": 2, "disk": 2}, 1: {"device": 5, "host": 3}} == index.blocks(A)


def test_storing_on_the_device_and_removing_end_a_slower_tier(kernel: bool) -> None:
    index = picture(kernel)
    index.apply(A, Moved(GLOBAL, (101, 102), "host"))
    hold(index, A, GLOBAL, [0])
    index.apply(A, Removed(GLOBAL, (102,)))
    hold(index, A, GLOBAL, [1])

    assert {"device": 8} == index.tiers(A, PROMPT, 16)


def test_explain_names_what_is_held_what_won_and_what_spoilt_the_next(kernel: bool) -> None:
    index = picture(kernel)

    [explained] = index.explain(PROMPT[:6], 6 * BLOCK + 1)
    assert (A, True, 6, 5, 10) == (
        explained.rank,
        explained.scored,
        explained.boundaries,
        explained.boundary,
        explained.cached_tokens,
    )
    sliding, everything = explained.groups
    assert (((3, 5),), (3, 5), 5) == (sliding.held, sliding.needed, sliding.spoilt)
    assert (((0, 6),), (0, 5), None) == (everything.held, everything.needed, everything.spoilt)

    [short] = index.explain(PROMPT[:3], 3 * BLOCK + 1)
    assert (0, None, 0) == (short.boundary, short.groups[0].needed, short.groups[0].spoilt)


def test_a_dump_is_plain_data_and_holds_everything(kernel: bool) -> None:
    index = picture(kernel)
    index.join(B, LAYOUTS[1])
    index.apply(B, Stored(2, 0, None, (2**64 - 1, 0), "host"))
    index.set_scored(B, False)
    dumped = index.dump()

    loaded = WindowIndex.load(json.loads(json.dumps(dumped)), kernel=kernel)
    assert dumped == loaded.dump()
    assert (index.score(PROMPT, LONGER), index.blocks(B)) == (loaded.score(PROMPT, LONGER), loaded.blocks(B))


@pytest.mark.parametrize("bad", [{}, [], {"version": 2, "ranks": [{}]}, {"version": 1, "ranks": []}])
def test_what_is_no_dump_is_refused(kernel: bool, bad: Any) -> None:
    with pytest.raises(ConfigError, match="expected a dump"):
        WindowIndex.load(bad, kernel=kernel)


def test_a_full_index_leaves_out_counts_and_never_promises_more(kernel: bool) -> None:
    index = picture(kernel, max_blocks=12)
    index.join(B, LAYOUT)
    hold(index, B, GLOBAL, list(range(8)))
    index.apply(B, Stored(SLIDING, 8, 108, (999,), "host"))
    index.apply(B, Moved(SLIDING, (999,), "disk"))
    assert 1 == index.stats().left_out
    assert {0: {}, 1: dict.fromkeys(PROMPT, "device")} == index.contents(B)

    # What was left out may be removed, and comes in when there is room and it is stored again.
    index.apply(B, Removed(SLIDING, (999,)))
    index.apply(A, Removed(SLIDING, (104,)))
    index.apply(B, Stored(SLIDING, 8, 108, (999, 998)))
    assert 2 == index.stats().left_out
    assert {999: "device"} == index.contents(B)[SLIDING]
    index.check()


def test_room_for_no_block_at_all_is_refused(kernel: bool) -> None:
    with pytest.raises(ConfigError, match="at least one block"):
        WindowIndex(kernel=kernel, max_blocks=0)


def test_what_a_dropped_rank_held_scores_nothing_at_once_and_is_swept_by_later_events(kernel: bool) -> None:
    index = picture(kernel)
    index.join(B, LAYOUT)
    for block in range(2_000):
        index.apply(A, Stored(GLOBAL, 0, None, (10**6 + block,)))
    index.drop(A)
    index.join(A, LAYOUT)
    assert {} == index.score(PROMPT, LONGER)
    assert 2_012 == sum(index.stats().blocks.values())

    for _ in range(20):
        index.apply(B, Removed(GLOBAL, (1,)))
        index.check()
    assert 0 == sum(index.stats().blocks.values())
    assert index.sweep(1)


def test_clearing_one_group_in_the_middle_of_a_sweep_does_not_end_the_sweep(kernel: bool) -> None:
    index = picture(kernel)
    index.join(B, LAYOUT)
    hold(index, B, GLOBAL, [0])
    index.drop(A)
    index.sweep(1)
    index.apply(B, Cleared(GLOBAL))
    while not index.sweep(1):
        index.check()
    index.join(A, LAYOUT)

    assert {SLIDING: {}, GLOBAL: {}} == index.contents(A)
    index.check()


def test_ranks_that_come_and_go_do_not_make_masks_ever_longer(kernel: bool) -> None:
    index = picture(kernel)
    for number in range(5 * MAX_DEAD):
        index.join(Rank(number + 100), LAYOUT)
        hold(index, Rank(number + 100), GLOBAL, [0])
        index.drop(Rank(number + 100))
    [part] = index._parts.values()

    assert len(part._ranks) <= MAX_DEAD + 3
    assert {A: 16} == index.score(PROMPT, LONGER)
    index.check()


def test_a_rank_that_comes_under_the_bit_of_one_that_left_scores_under_its_own_name(kernel: bool) -> None:
    index = picture(kernel)
    assert {A: 16} == index.score(PROMPT, LONGER)
    for group in (GLOBAL, SLIDING):
        index.apply(A, Removed(group, tuple(PROMPT)))
    index.join(B, LAYOUT)
    index.drop(A)
    index.join(A._replace(dp_rank=7), LAYOUT)
    for group in (GLOBAL, SLIDING):
        hold(index, A._replace(dp_rank=7), group, list(range(8)))

    assert {A._replace(dp_rank=7): 16} == index.score(PROMPT, LONGER)
    index.check()


def test_saying_of_a_rank_what_is_so_already_changes_nothing(kernel: bool) -> None:
    index = picture(kernel)
    for number in range(100, 200):
        index.join(Rank(number), LAYOUT)
        index.set_scored(Rank(number), number % 2 == 0)
    [part] = index._parts.values()
    before = part._wanted
    for number in range(100, 200):
        index.set_scored(Rank(number), number % 2 == 0)

    assert part._wanted is before, "not even an equal number is made"
    assert 51 == index.stats().scored


def test_the_last_rank_takes_its_part_with_it(kernel: bool) -> None:
    index = picture(kernel)
    index.drop(A)

    assert (0, {}, 0) == (index.stats().ranks, index.stats().blocks, index.stats().nbytes)
    assert {} == index.score(PROMPT, LONGER)


def test_hundreds_of_ranks_at_staggered_depths(kernel: bool) -> None:
    index, naive = new_index(kernel), NaiveIndex()
    prompt = list(range(1, 201))
    for number in range(200):
        rank = Rank(number)
        for each in (index, naive):
            each.join(rank, LAYOUT)
            for group in (SLIDING, GLOBAL):
                each.apply(rank, Stored(group, 0, None, tuple(prompt[: number + 1])))
            each.apply(rank, Removed(SLIDING, tuple(prompt[number - number % 7 : number])))

    expected = naive.score(prompt, 401)
    assert len(expected) > 150
    assert expected == index.score(prompt, 401)
    index.check()


@given(st.sampled_from(LAYOUTS), st.integers(1, 60), st.data())
def test_plans_say_what_the_rules_say(
    kernel: bool, layout: CacheLayout, prompt_len: int, data: st.DataObject
) -> None:
    """The closed form that spares asking the built-in rules, and the numbers that stand for first_needed."""
    rule = PLUGIN_RULES[layout.rule]
    plan = plan_for(rule, layout, prompt_len)
    boundaries = rule.boundaries(layout, prompt_len)
    if plan is None or boundaries == 0:
        return
    boundary = data.draw(st.integers(1, boundaries))
    assert (boundaries, layout.rule not in RULES) == (plan.boundaries, plan.asks_tokens)
    if not plan.asks_tokens:
        assert rule.tokens(layout, boundary, prompt_len) == min(boundary * plan.unit, plan.limit)
    needs = plan.at_end if plan.at_end and boundary == boundaries else plan.trailing
    for group, need in zip(layout.groups, needs, strict=True):
        first = 0 if need is None else max(0, boundary - need)
        assert rule.first_needed(group, boundary, prompt_len) == first


def test_check_finds_what_must_not_be(kernel: bool) -> None:
    for spoil in (
        lambda part: part.members[A].counts.__setitem__(GLOBAL, 3),
        lambda part: part.members[A].slow[GLOBAL].update({5: "host"}),
        lambda part: part.table.add(GLOBAL, 60, [1], -1),
        lambda part: part._free.append(0),
        lambda part: setattr(part, "_wanted", 0),
        lambda part: setattr(part.members[A], "scored", False),
    ):
        index = picture(kernel)
        index.check()
        spoil(next(iter(index._parts.values())))
        with pytest.raises(InvariantError, match="please report"):
            index.check()


def test_the_switch_turns_the_kernel_off(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel == WindowIndex(kernel=kernel).stats().kernel
    assert (load_kernel() is not None) == WindowIndex().uses_kernel

    monkeypatch.setenv(SWITCH, "0")
    assert not WindowIndex().uses_kernel
    with pytest.raises(ConfigError, match="compiled kernel"):
        WindowIndex(kernel=True)
