"""What manager V1 reuses and keeps: both rules, what is evicted, what is stored when."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from vswa_plugins.gemma3_cpu.cache.spec import GroupSpec
from vswa_plugins.gemma3_cpu.cache.v1 import CacheManagerV1

from tests.gemma3_v1_helpers import (
    GLOBAL,
    SLIDING,
    compute,
    lose,
    misnamed,
    names,
    nodes_of,
    opened,
    predicted,
    run,
    short,
    tokens,
    two_windows,
    walked,
)
from vswa_plugin.errors import ConfigError, InvalidRequest, InvariantError

both = pytest.mark.parametrize("contiguous", [False, True], ids=["past holes", "contiguous"])


@pytest.mark.parametrize(
    ("sliding", "held_globally", "contiguous", "past_holes"),
    [
        ([range(125)], 125, 4000, 4000),
        ([range(109, 125)], 125, 0, 4000),
        ([range(110, 125)], 125, 0, 0),
        ([range(51), range(110, 125)], 125, 1632, 1632),
        ([range(61), range(100, 111)], 125, 1952, 1952),
        ([range(61), range(90, 111)], 125, 1952, 3552),
        ([range(51), range(100, 125)], 125, 1632, 4000),
        ([], 125, 0, 0),
        ([range(125)], 60, 1920, 1920),
        ([range(41), range(109, 125)], 60, 1312, 1312),
    ],
)
def test_a_prompt_of_gemma_3_1b_is_resumed_where_both_windows_can(
    sliding: list[range], held_globally: int, contiguous: int, past_holes: int
) -> None:
    found = []
    for rule in (True, False):
        groups = [GroupSpec(0, 512, 200), GroupSpec(1, None, 200)]
        manager = CacheManagerV1(groups, 32, 8192, contiguous=rule)
        run(manager, tokens(4001))
        keys = [tuple(range(i, i + 32)) for i in range(0, 4000, 32)]
        path = nodes_of(manager, None, keys)
        for window, kept in ((0, {b for held in sliding for b in held}), (1, set(range(held_globally)))):
            for block, node in enumerate(path):
                if block not in kept and node.pages[window] is not None:
                    next(w for w in manager.windows if w.index == window)._lose(node.page_of(window))
        manager.check()
        found.append(opened(manager, tokens(4001)).cached_tokens)

    assert [contiguous, past_holes] == found


@both
def test_the_answer_is_reused_too_and_the_last_token_never(contiguous: bool) -> None:
    manager = two_windows(contiguous=contiguous)
    run(manager, tokens(10), [100, 101, 102, 103])

    assert 9 == opened(manager, tokens(10)).cached_tokens
    assert 13 == opened(manager, [*tokens(10), 100, 101, 102, 103, 7]).cached_tokens


@both
def test_part_of_a_block_that_goes_on_differently_is_copied(contiguous: bool) -> None:
    moves = []
    manager = two_windows(contiguous=contiguous, mover=lambda *move: moves.append(move))
    run(manager, tokens(12))
    sequence = opened(manager, [0, 1, 2, 3, 4, 5, 99, 98])

    assert 6 == sequence.cached_tokens
    assert {0, 1} == {group for group, _, _ in moves}
    for group, source, target in moves:
        assert source != target and sequence.tables[group][1] == target.page


@both
def test_part_of_a_block_on_which_nothing_hangs_is_taken_over_and_no_event_says_so(contiguous: bool) -> None:
    moves = []
    manager = two_windows(contiguous=contiguous, mover=lambda *move: moves.append(move))
    run(manager, tokens(12))
    last = names(tokens(12))[2]
    manager.flush_events()
    sequence = opened(manager, [*tokens(10), 99, 98])

    assert 10 == sequence.cached_tokens
    assert [] == moves == manager.flush_events()
    assert all(last not in held for held in manager.resident().values())
    assert 8 == opened(manager, [*tokens(10), 97]).cached_tokens


@both
def test_a_block_that_another_sequence_holds_is_copied(contiguous: bool) -> None:
    moves = []
    manager = two_windows(contiguous=contiguous, mover=lambda *move: moves.append(move))
    run(manager, tokens(12))
    first = opened(manager, [*tokens(12), 50])
    second = opened(manager, [*tokens(10), 99])

    assert (12, 10) == (first.cached_tokens, second.cached_tokens)
    assert {0, 1} == {group for group, _, _ in moves}
    assert all(names(tokens(12))[2] in held for held in manager.resident().values())


@pytest.mark.parametrize("host", [0, 1])
def test_a_block_that_lies_on_the_last_page_gives_it_to_its_copy(host: int) -> None:
    manager = two_windows(global_=3, host=host)
    run(manager, tokens(8))
    lose(manager, GLOBAL, tokens(8), [1])
    other = opened(manager, tokens(7, 50))
    sequence = opened(manager, [0, 1, 99])

    assert (0, 2) == (other.cached_tokens, sequence.cached_tokens)
    assert host == len(manager.resident()[GLOBAL]), "it has moved to the host, or is lost"
    assert set(sequence.tables[GLOBAL]).isdisjoint(other.tables[GLOBAL])
    manager.check()


@pytest.mark.parametrize("contiguous", [False, True])
def test_copying_from_a_block_postpones_its_end_but_not_in_the_contiguous_kind(contiguous: bool) -> None:
    manager = two_windows(sliding=8, global_=8, window=4, contiguous=contiguous)
    run(manager, tokens(8))
    run(manager, tokens(4, 50))
    assert 2 == run(manager, [0, 1, 99])
    run(manager, tokens(24, 100))
    copied_from, other = names(tokens(4)), names(tokens(4, 50))

    for held in manager.resident().values():
        assert contiguous == (other[0] in held)
        assert contiguous == (copied_from[0] not in held)


@both
def test_without_partial_reuse_only_blocks_that_go_on_alike_count(contiguous: bool) -> None:
    manager = two_windows(contiguous=contiguous, enable_partial_reuse=False)
    run(manager, tokens(12))

    assert 4 == opened(manager, [0, 1, 2, 3, 4, 5, 99, 98]).cached_tokens


@both
def test_without_block_reuse_nothing_outlives_its_sequence(contiguous: bool) -> None:
    manager = two_windows(contiguous=contiguous, enable_block_reuse=False)
    run(manager, tokens(12))

    assert 0 == run(manager, tokens(12))
    assert {0: {}, 1: {}} == manager.resident()


@both
def test_a_salt_keeps_tenants_apart(contiguous: bool) -> None:
    manager = two_windows(contiguous=contiguous)
    run(manager, tokens(12), salt="a")

    assert 0 == opened(manager, tokens(12), salt="b").cached_tokens
    assert 0 == opened(manager, tokens(12)).cached_tokens
    assert 11 == opened(manager, tokens(12), salt="a").cached_tokens
    assert set(names(tokens(8), salt="a")) <= set(manager.resident()[GLOBAL])


def test_losing_a_block_past_holes_costs_only_that_block() -> None:
    manager = two_windows()
    run(manager, tokens(20))
    lose(manager, GLOBAL, tokens(20), [1])

    assert set(names(tokens(20))) - {names(tokens(20))[1]} == set(manager.resident()[GLOBAL])
    assert 4 == run(manager, tokens(20))
    assert 19 == opened(manager, tokens(20)).cached_tokens


def test_losing_a_block_of_a_contiguous_window_costs_all_below_it_there() -> None:
    manager = two_windows(contiguous=True)
    run(manager, tokens(20))
    lose(manager, SLIDING, tokens(20), [1])

    assert names(tokens(20))[:1] == list(manager.resident()[SLIDING])
    assert names(tokens(20)) == list(manager.resident()[GLOBAL])


@both
def test_pages_given_back_first_are_taken_first(contiguous: bool) -> None:
    manager = two_windows(sliding=8, global_=8, window=4, contiguous=contiguous)
    run(manager, tokens(8))
    run(manager, tokens(8, 100))
    run(manager, tokens(8, 200), tokens(10, 300))

    assert set(names(tokens(8, 100))) <= set(manager.resident()[GLOBAL])
    assert not set(names(tokens(8))) <= set(manager.resident()[GLOBAL])


@both
def test_a_hit_makes_all_that_it_reuses_the_last_to_go_slid_out_or_not(contiguous: bool) -> None:
    manager = two_windows(sliding=16, window=4, contiguous=contiguous)
    run(manager, tokens(16))
    run(manager, tokens(4, 50))
    run(manager, tokens(17))
    run(manager, tokens(44, 100))

    assert names(tokens(4))[0] in manager.resident()[SLIDING]


def test_a_contiguous_manager_stores_nothing_at_the_end_once_others_took_what_slid_out() -> None:
    manager = two_windows(sliding=20, window=4, contiguous=True)
    long = opened(manager, tokens(8), 30)
    compute(long, 30)
    run(manager, tokens(52, 500))
    long.close(tokens(23, 100))

    assert names(tokens(8)) == [name for name in names(tokens(20)) if name in manager.resident()[GLOBAL]]


def test_a_contiguous_manager_stores_at_the_end_what_slid_out_and_is_still_there() -> None:
    manager = two_windows(window=4, contiguous=True)
    text = tokens(30)
    run(manager, text[:8], text[8:])

    assert set(names(text[:29])) <= set(manager.resident()[SLIDING])


def test_past_holes_what_was_generated_and_slid_out_is_gone_and_what_follows_it_is_misnamed() -> None:
    manager = two_windows(window=8)
    text = tokens(40)
    run(manager, text[:8], text[8:])
    chain = names(text)

    assert set(chain[:9]) <= set(manager.resident()[GLOBAL])
    assert not set(chain[2:]) & set(manager.resident()[SLIDING])
    assert set(names(text[:8] + text[28:36])) <= set(manager.resident()[SLIDING])
    stored = [event["data"] for event in manager.flush_events() if event["window_size"] == 8][-1]
    assert stored["parent_hash"] is None, "the window does not hold the block before the hole's end"
    assert misnamed(manager, text, None)
    assert 39 == opened(manager, text).cached_tokens


def test_a_block_behind_a_hole_may_get_the_name_of_another_block() -> None:
    manager = two_windows(window=4)
    text = tokens(37)
    # Its third block has the name that the one behind the hole gets.
    run(manager, text[:8] + text[32:36])
    manager.flush_events()
    run(manager, text[:8], text[8:])
    name = names(text[:8] + text[32:36])[2]
    stored = [event for event in manager.flush_events() if event["data"]["type"] == "stored"]

    assert name in [name for event in stored if event["window_size"] == 4 for name in short(event)[2]]
    assert 2 == sum(page.hash == name for page in manager.windows[0].pool.pages)


@both
def test_a_transfer_brings_all_global_blocks_and_the_last_window_of_sliding_ones(contiguous: bool) -> None:
    manager = two_windows(contiguous=contiguous)
    sequence = opened(manager, tokens(30), 3)

    assert (range(5, 8), range(8)) == sequence.reserve_transfer()
    assert [-1] * 5 == sequence.tables[SLIDING][:5]
    with pytest.raises(InvariantError, match="transferred"):
        sequence.reserve(31)
    sequence.receive()
    manager.check()
    compute(sequence, 32)
    sequence.close([1, 2, 3])
    manager.check()
    chain = names(tokens(28))
    kept = [] if contiguous else chain[5:]
    assert kept == [name for name in chain if name in manager.resident()[SLIDING]]
    assert chain == [name for name in chain if name in manager.resident()[GLOBAL]]
    assert (0 if contiguous else 29) == opened(manager, tokens(30)).cached_tokens


def test_a_transfer_brings_only_what_is_lacking() -> None:
    manager = two_windows()
    run(manager, tokens(22))

    assert (range(5, 8), range(5, 8)) == opened(manager, tokens(30)).reserve_transfer()


def test_a_transfer_is_for_the_beginning() -> None:
    sequence = opened(two_windows(), tokens(30))
    compute(sequence, 4)

    with pytest.raises(InvariantError, match="right after opening"):
        sequence.reserve_transfer()
    with pytest.raises(InvariantError, match="never begun"):
        sequence.receive()


@pytest.mark.parametrize(
    ("contiguous", "expected"),
    [
        (False, {"exact": 393, "misnamed": 7}),
        (True, {"exact": 400}),
    ],
)
def test_predictions_from_names_are_exact_in_whole_blocks_but_where_blocks_are_misnamed(
    contiguous: bool, expected: dict[str, int]
) -> None:
    rng = random.Random(7)
    manager = two_windows(sliding=60, global_=120, window=16, contiguous=contiguous)
    texts = [tokens(60)]
    found: Counter[str] = Counter()
    for _ in range(400):
        old = rng.choice(texts[-12:])
        prompt = old[: rng.randint(1, len(old))] + [rng.randint(0, 1) for _ in range(rng.randint(1, 24))]
        output = [rng.randint(0, 1) for _ in range(rng.choice([1, 4, 8, 30]))]
        promised, excepted = predicted(manager, prompt, None), misnamed(manager, prompt, None)
        expected_tokens = walked(manager, prompt, None, True)
        actual = run(manager, prompt, output)
        assert expected_tokens // 4 == actual // 4
        if promised // 4 == actual // 4:
            found["exact"] += 1
        else:
            assert excepted
            found["misnamed"] += 1
        texts.append((prompt + output)[:120])

    assert expected == dict(found)


@both
def test_a_request_that_can_never_run_is_refused(contiguous: bool) -> None:
    manager = two_windows(sliding=30, global_=20, contiguous=contiguous)

    with pytest.raises(InvalidRequest, match="window global, which has 20"):
        manager.open(tokens(80), 1)
    with pytest.raises(InvalidRequest, match="8193, but a sequence has at most 8192"):
        manager.check_fits(8192, 1)
    with pytest.raises(InvalidRequest, match="at least one token each"):
        manager.open([], 1)


def test_a_second_sequence_waits_while_the_first_may_still_need_the_pages() -> None:
    manager = two_windows(sliding=12)
    first = opened(manager, tokens(40), 4)

    assert manager.open(tokens(40, 100), 4) is None
    first.close()
    assert manager.open(tokens(40, 100), 4) is not None


def test_more_than_was_admitted_is_a_bug() -> None:
    sequence = opened(two_windows(), tokens(8), 2)

    with pytest.raises(InvariantError, match="at most 16 tokens a step and 10 in all"):
        sequence.reserve(11)
    with pytest.raises(InvariantError, match="at most 0 computed tokens"):
        sequence.advance(1)
    sequence.close()
    with pytest.raises(InvariantError, match="closed"):
        sequence.reserve(1)


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ([], "at least one cache group"),
        ([GroupSpec(0, 8, 5), GroupSpec(1, 8, 5)], "each window once"),
        ([GroupSpec(0, 64, 5), GroupSpec(1, None, 5)], "each window once"),
        ([GroupSpec(0, 68, 5)], "at most max_seq_len"),
        ([GroupSpec(0, 6, 5)], "multiple of the block size"),
        ([GroupSpec(0, 8, 0)], "a block at least"),
        ([GroupSpec(0, 8, 5, host_blocks=-1)], "no negative number on the host"),
    ],
)
def test_sizes_that_cannot_work_are_refused(groups: list[GroupSpec], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        CacheManagerV1(groups, 4, 64, contiguous=False)
