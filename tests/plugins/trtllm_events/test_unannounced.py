"""What manager V1 leaves out of its events, one inference at a time, on events written by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vswa_plugins.trtllm_events import TrtllmEventAdapter, chain_keys, hashing
from vswa_plugins.trtllm_events.hashing import block_key
from vswa_plugins.trtllm_events.searches import MAX_SEARCHED_AT_ONCE
from vswa_plugins.trtllm_events.unannounced import _MAX_REMEMBERED

from tests.trtllm_events_helpers import Engine, block
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksMoved, BlocksRemoved, BlocksStored, EngineEvent

SIZE, WINDOW, LONGEST = 4, 8, 32768
TEXT = list(range(100, 180))
KEYS = chain_keys(TEXT, SIZE)


class V1(Engine):
    """An engine of manager V1 beside the adapter that follows it.

    :param alone: there is no global window.
    """

    def __init__(self, sliding: int = 100, rule: str = "trtllm_v1", *, alone: bool = False) -> None:
        super().__init__()
        groups = (CacheGroup(0, WINDOW, SIZE), CacheGroup(1, None, SIZE))[: 1 if alone else 2]
        self.adapter = TrtllmEventAdapter(CacheLayout(groups, rule, "m"))
        #: Group id -> names that are published as held.
        self.held: dict[int, set[Any]] = {group.group_id: set() for group in groups}
        for window, blocks in ((WINDOW, sliding), (LONGEST, 1000))[: len(groups)]:
            self.give(self.of(window, type="created", num_blocks_per_cache_level=[blocks, 0]))

    def of(self, window: int, **data: Any) -> dict[str, Any]:
        return self.event(data, None, window_size=window)

    def give(self, raw: dict[str, Any]) -> list[EngineEvent]:
        events = self.adapter.feed(raw)
        for event in events:
            if isinstance(event, BlocksStored):
                self.held[event.group_id].update(each.hash for each in event.blocks)
            elif isinstance(event, BlocksRemoved):
                self.held[event.group_id].difference_update(event.hashes)
        return events

    def store(self, window: int, parent: Any, *pairs: tuple[int, list[int]]) -> list[EngineEvent]:
        blocks = [block(*pair) for pair in pairs]
        return self.give(self.stored(parent, *blocks, group=None, window_size=window))

    def both(self, parent: Any, *pairs: tuple[int, list[int]]) -> None:
        """Blocks of a prompt, as after a chunk: the widest window first."""
        self.store(LONGEST, parent, *pairs)
        self.store(WINDOW, parent, *pairs)

    def at_the_end_of(self, prompt: tuple[int, list[int]], answer: list[list[int]]) -> list[int]:
        """What is stored with the last token: in the sliding window what it still shows, two blocks.

        :returns: the true names of the answer's blocks.
        """
        names = [prompt[0]]
        for tokens in answer:
            names.append(block_key(tokens, names[-1]))
        behind_gap = block_key(answer[-2], prompt[0])
        self.store(WINDOW, None, (behind_gap, answer[-2]), (block_key(answer[-1], behind_gap), answer[-1]))
        self.store(LONGEST, prompt[0], *zip(names[1:], answer, strict=True))
        return names[1:]

    def remove(self, window: int, *names: int) -> list[EngineEvent]:
        return self.give(self.removed(*names, group=None, window_size=window))


def part(index: int) -> tuple[int, list[int]]:
    """(name, tokens) of one block of ``TEXT``."""
    return KEYS[index], TEXT[index * SIZE : index * SIZE + SIZE]


def single(first: int) -> tuple[int, list[int]]:
    """A prompt of one block that begins with that token."""
    tokens = [first, 0, 0, 0]
    return block_key(tokens, None), tokens


# -- names behind a gap ----------------------------------------------------------------------------


def test_a_sliding_block_behind_a_gap_gets_the_name_of_its_whole_prefix() -> None:
    engine = V1()
    engine.both(None, part(0), part(1))
    tokens = part(4)[1]
    behind_gap = block_key(tokens, KEYS[1])

    assert [] == engine.store(WINDOW, None, (behind_gap, tokens)), "not known before the widest window says"
    engine.store(LONGEST, KEYS[1], part(2), part(3), part(4))

    assert {KEYS[0], KEYS[1], KEYS[4]} == engine.held[0]


def test_blocks_that_hang_on_one_behind_a_gap_follow_it() -> None:
    engine = V1()
    engine.both(None, part(0), part(1))
    first = block_key(part(4)[1], KEYS[1])
    second = block_key(part(5)[1], first)
    engine.store(WINDOW, None, (first, part(4)[1]), (second, part(5)[1]))
    engine.store(LONGEST, KEYS[1], *(part(i) for i in range(2, 6)))

    assert {KEYS[i] for i in (0, 1, 4, 5)} == engine.held[0]


def test_events_about_a_block_behind_a_gap_are_about_its_published_name() -> None:
    engine = V1()
    engine.both(None, part(0))
    engine.store(LONGEST, KEYS[0], part(1), part(2))
    name = block_key(part(2)[1], KEYS[0])
    engine.store(WINDOW, None, (name, part(2)[1]))
    change = {"type": "event_diff", "old_value": 0, "new_value": 1}
    moved = engine.give(engine.of(WINDOW, type="updated", block_hash=name, cache_level=change))

    assert [BlocksMoved(0, (KEYS[2],), "host")] == moved
    assert [BlocksRemoved(0, (KEYS[2],))] == engine.remove(WINDOW, name)


def test_a_block_whose_predecessor_is_given_is_not_taken_for_one_behind_a_gap() -> None:
    """The same tokens behind the same block, once right behind it and once with a block between."""
    engine = V1()
    tokens = part(2)[1]
    engine.both(None, part(0))
    engine.store(LONGEST, KEYS[0], part(1), part(2))
    direct = block_key(tokens, KEYS[0])

    assert [] == engine.store(WINDOW, KEYS[0], (direct, tokens))
    engine.store(LONGEST, KEYS[0], (direct, tokens))
    assert {KEYS[0], direct} == engine.held[0]


def test_a_block_behind_a_gap_is_not_taken_for_one_right_behind_the_block_before_it() -> None:
    engine = V1()
    tokens = part(2)[1]
    direct = block_key(tokens, KEYS[0])
    engine.both(None, part(0))
    engine.store(LONGEST, KEYS[0], (direct, tokens))
    engine.store(WINDOW, None, (direct, tokens))
    engine.store(LONGEST, KEYS[0], part(1), part(2))

    assert {KEYS[0], KEYS[2]} == engine.held[0]


def test_equal_tokens_are_told_apart_by_the_block_before_the_gap() -> None:
    """Both prompts have the same third block; the name shows behind which one this window stored it."""
    engine = V1()
    other = single(7)
    middle = block_key([1, 1, 1, 1], other[0])
    third = part(2)[1]
    engine.both(None, part(0), part(1), part(2))
    engine.both(None, other)
    engine.store(LONGEST, other[0], (middle, [1, 1, 1, 1]), (block_key(third, middle), third))
    engine.store(WINDOW, None, (block_key(third, other[0]), third))

    assert block_key(third, middle) in engine.held[0]


def test_a_block_waits_for_the_next_event_of_the_widest_window_alone() -> None:
    """That one is of the same sequence; what comes later is another's."""
    engine = V1()
    engine.both(None, part(0))
    tokens = part(2)[1]
    engine.store(WINDOW, None, (block_key(tokens, KEYS[0]), tokens))
    engine.store(LONGEST, None, single(1))
    engine.store(LONGEST, KEYS[0], part(1), part(2))

    assert {KEYS[0]} == engine.held[0]


def test_a_block_that_was_known_by_its_name_alone_is_known_by_its_prefix_once_it_is_stored() -> None:
    engine = V1()
    engine.store(LONGEST, KEYS[1], part(2))
    engine.store(LONGEST, None, part(0), part(1))
    tokens = part(2)[1]
    engine.store(WINDOW, None, (block_key(tokens, KEYS[0]), tokens))

    assert {KEYS[2]} == engine.held[0]


# -- blocks that leave without an event ------------------------------------------------------------


def test_orphans_beyond_what_the_engine_has_are_dropped_the_oldest_first() -> None:
    engine = V1(sliding=7)
    engine.both(None, *(part(i) for i in range(5)))
    engine.remove(WINDOW, KEYS[0])
    for first in (1, 2):
        engine.both(None, single(first))
    assert {KEYS[1], KEYS[2], KEYS[3], KEYS[4], single(1)[0], single(2)[0]} == engine.held[0]

    engine.both(None, single(3), (block_key([9] * 4, single(3)[0]), [9] * 4))

    assert KEYS[1] not in engine.held[0], "its predecessor has left, and it slid out first"
    assert {KEYS[2], KEYS[3], KEYS[4]} <= engine.held[0]
    assert {KEYS[i] for i in range(5)} <= engine.held[1], "the widest window announces all it evicts"


def test_what_was_released_before_an_evicted_block_has_left_where_it_is_an_orphan() -> None:
    engine = V1()
    engine.both(None, *(part(i) for i in range(5)))
    engine.both(None, single(1))

    # The order of eviction: 0, 1 and 2 slid out, then from the end 4 and 3, then the other prompt.
    engine.remove(WINDOW, KEYS[0])
    assert {KEYS[i] for i in (1, 2, 3, 4)} <= engine.held[0]
    engine.remove(WINDOW, KEYS[4])
    engine.both(None, single(2))
    assert {KEYS[3]} == engine.held[0] & set(KEYS), "1 and 2 were before 4"
    engine.remove(WINDOW, single(1)[0])
    engine.both(None, single(3))
    assert {single(2)[0], single(3)[0]} == engine.held[0]


def test_what_the_sequence_that_needed_room_has_claimed_stays() -> None:
    engine = V1()
    engine.both(None, *(part(i) for i in range(5)))
    engine.both(None, single(1))
    engine.remove(WINDOW, KEYS[0], single(1)[0])
    # A prompt that was resumed behind block 4 holds 3 and 4, and needed the room.
    engine.both(KEYS[4], part(5))

    assert {KEYS[i] for i in (1, 2, 3, 4, 5)} == engine.held[0] & set(KEYS)


def test_a_block_that_is_stored_again_under_another_name_had_left() -> None:
    engine = V1()
    engine.both(None, part(0), part(1))
    engine.store(LONGEST, KEYS[1], part(2), part(3))
    names = [block_key(part(3)[1], KEYS[n]) for n in (0, 1)]
    for name in names:
        engine.store(WINDOW, None, (name, part(3)[1]))

    assert [BlocksRemoved(0, (KEYS[3],))] == engine.remove(WINDOW, names[1])
    assert KEYS[3] not in engine.held[0]


def test_what_slid_out_before_it_was_stored_takes_up_room() -> None:
    engine = V1(sliding=7)
    engine.both(None, part(0), part(1), part(2))
    engine.remove(WINDOW, KEYS[0])
    prompt, answer = single(5), [[n, 7, 7, 7] for n in range(6, 11)]
    engine.both(None, prompt)
    assert {KEYS[1], KEYS[2], prompt[0]} == engine.held[0]

    names = engine.at_the_end_of(prompt, answer)

    assert {KEYS[2], prompt[0], *names[-2:]} == engine.held[0], "three more had slid out, unstored"


def test_what_was_never_stored_is_evicted_in_its_turn() -> None:
    engine = V1(sliding=7)
    prompt, answer = single(5), [[n, 7, 7, 7] for n in range(6, 11)]
    engine.both(None, prompt)
    engine.at_the_end_of(prompt, answer)
    first, last = {prompt[0]}, engine.held[0] - {prompt[0]}

    # Three of seven places were taken by what slid out: these go before the orphans, the last two blocks.
    for token in (20, 21, 22, 23):
        engine.both(None, single(token))

    assert 2 == len(last)
    assert first | last | {single(token)[0] for token in (20, 21, 22, 23)} == engine.held[0]


def test_without_a_global_window_orphans_leave_the_widest_one_too() -> None:
    engine = V1(sliding=6, alone=True)
    engine.store(WINDOW, None, *(part(i) for i in range(5)))
    engine.remove(WINDOW, KEYS[0])
    for first in range(1, 4):
        engine.store(WINDOW, None, single(first))

    assert {KEYS[2], KEYS[3], KEYS[4]} | {single(n)[0] for n in range(1, 4)} == engine.held[0]
    for first in range(4, 400):
        engine.store(WINDOW, None, single(first))
        engine.remove(WINDOW, single(first)[0])
    assert len(engine.held[0]) <= 6


def test_a_block_that_was_used_again_is_not_among_the_oldest() -> None:
    engine = V1(sliding=4)
    engine.both(None, part(0), part(1))
    engine.remove(WINDOW, KEYS[0])
    engine.both(None, single(1))
    engine.both(KEYS[1], part(2))
    engine.both(None, single(2), (block_key([9] * 4, single(2)[0]), [9] * 4))

    # The prompt was resumed behind block 1, so blocks 1 and 2 were released after the first other prompt.
    assert KEYS[1] not in engine.held[0]
    assert single(1)[0] in engine.held[0], "no orphan leaves without an event"


def test_a_removal_of_an_unknown_block_is_passed_on() -> None:
    """It may be known to readers from before a loss of events."""
    engine = V1()

    assert [BlocksRemoved(0, (5,))] == engine.remove(WINDOW, 5)


# -- blocks that are taken over --------------------------------------------------------------------


def test_a_leaf_whose_beginning_is_reused_is_taken_over() -> None:
    engine = V1()
    engine.both(None, part(0), part(1))
    fork = [*part(1)[1][:2], 1, 1]
    engine.both(KEYS[0], (block_key(fork, KEYS[0]), fork))

    assert {KEYS[0], block_key(fork, KEYS[0])} == engine.held[0] == engine.held[1]


def test_a_block_on_which_others_hang_is_copied() -> None:
    engine = V1()
    engine.both(None, part(0), part(1), part(2))
    fork = [*part(1)[1][:2], 1, 1]
    engine.both(KEYS[0], (block_key(fork, KEYS[0]), fork))

    assert {KEYS[0], KEYS[1], KEYS[2], block_key(fork, KEYS[0])} == engine.held[0] == engine.held[1]


def test_an_engine_that_announces_the_removal_of_a_block_that_seemed_taken_over_copies() -> None:
    engine = V1()
    engine.both(None, part(0), part(1))
    fork = [*part(1)[1][:2], 1, 1]
    engine.both(KEYS[0], (block_key(fork, KEYS[0]), fork))
    engine.remove(LONGEST, KEYS[1])
    again = [*fork[:3], 2]
    engine.both(KEYS[0], (block_key(again, KEYS[0]), again))

    assert {KEYS[0], block_key(fork, KEYS[0]), block_key(again, KEYS[0])} == engine.held[1]


# -- bounds ----------------------------------------------------------------------------------------


def test_what_is_remembered_goes_with_the_blocks() -> None:
    engine, rng = V1(sliding=50), random.Random(1)
    names: dict[int, list[int]] = {LONGEST: [], WINDOW: []}
    for _ in range(300):
        prompt = [rng.randrange(3) for _ in range(SIZE * rng.randrange(1, 9))]
        keys = chain_keys(prompt, SIZE)
        pairs = [(key, prompt[i * SIZE : i * SIZE + SIZE]) for i, key in enumerate(keys)]
        engine.both(None, *pairs)
        for window in names:
            names[window] += [key for key in keys if key not in names[window]]
    for window, all_names in names.items():
        engine.remove(window, *all_names)
    followed = engine.adapter._ranks[0].unannounced

    assert {0: set(), 1: set()} == engine.held
    assert 0 == len(followed._prefixes) == sum(len(held) for held in followed._held.values())
    assert {} == followed._waiting


def test_blocks_that_the_widest_window_never_announces_are_forgotten() -> None:
    engine = V1()
    engine.store(LONGEST, None, part(0))
    for first in range(5000):
        engine.store(WINDOW, None, single(first))

    assert len(engine.adapter._ranks[0].unannounced._waiting) <= 4096
    assert set() == engine.held[0]


# -- searches --------------------------------------------------------------------------------------


class Hashes:
    """Counts the hashes that an adapter computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed = 0
        monkeypatch.setattr(hashing, "block_key", self._block_key)

    def _block_key(self, *given: Any) -> int:
        self.computed += 1
        return block_key(*given)


def repeated(first: int, blocks: int) -> list[tuple[int, list[int]]]:
    """(name, tokens) of a prompt whose blocks but the first hold the same tokens."""
    tokens = [first, 7, 7, 7] + [7] * (blocks - 1) * SIZE
    names = chain_keys(tokens, SIZE)
    return [(name, tokens[n * SIZE : n * SIZE + SIZE]) for n, name in enumerate(names)]


def test_a_prompt_of_the_same_block_again_and_again_is_named_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, blocks = V1(sliding=10_000), 1_000
    engine.both(None, part(0))  # a hash is that of its tokens
    prompts = [repeated(first, blocks) for first in (1, 2, 3)]
    hashes = Hashes(monkeypatch)

    for pairs in prompts:  # the window that slides announces them first
        engine.store(WINDOW, None, *pairs)
        engine.store(LONGEST, None, *pairs)
        names = {name for name, _ in pairs}
        assert names <= engine.held[0]
        assert names <= engine.held[1]

    assert 0 < hashes.computed < 6 * (MAX_SEARCHED_AT_ONCE + 3 * blocks)


@pytest.mark.parametrize("rule", ["trtllm_v1", "trtllm_v1_contiguous"])
def test_blocks_of_another_hash_that_are_announced_again_are_taken_within_bounds(
    monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    engine, hashes, blocks = V1(rule=rule), Hashes(monkeypatch), 1_000
    pairs = [(1_000_000 + n, [n, 7, 7, 7]) for n in range(blocks)]

    for _ in range(2):
        engine.store(LONGEST, None, *pairs)

    assert {name for name, _ in pairs} == engine.held[1]
    assert 0 < hashes.computed < 2 * (MAX_SEARCHED_AT_ONCE + 3 * blocks)


def test_what_waits_for_the_widest_window_is_bounded() -> None:
    engine = V1()
    engine.both(None, part(0))

    unannounced = engine.adapter._ranks[0].unannounced
    for first in range(20):
        engine.store(WINDOW, None, *repeated(first, 1_000))
        kept = [blocks for same in unannounced._waiting.values() for blocks in same.values()]
        assert unannounced._num_waiting == sum(map(len, kept)) <= _MAX_REMEMBERED
