"""The load book against lists of what is under way."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.properties import examples
from vswa_plugin.errors import InvariantError
from vswa_plugin.selection import Load, LoadBook, Projection
from vswa_plugin.wire.events import Rank

RANKS = [Rank(1, 0), Rank(1, 1), Rank(2, 0)]
SIZE = 4
#: Prompts of a small tree: they share prefixes, as sequence hashes of real prompts do.
PROMPTS = [
    [f"{a}", f"{a}{b}", f"{a}{b}{c}"][:depth] for a in "xy" for b in "xy" for c in "xy" for depth in range(4)
]
HASHES = [[hash(block) for block in prompt] for prompt in PROMPTS]


def test_shared_blocks_count_once_and_stay_until_the_last_request_ends() -> None:
    book = LoadBook(16)
    book.add("a", RANKS[0], [1, 2, 3], 50, 50)
    book.add("b", RANKS[0], [1, 2, 4], 50, 18)

    assert book.load(RANKS[0]) == Load(4, 68, 2)
    assert book.projected(RANKS[0], [1, 2, 3, 5]) == Projection(Load(4, 68, 2), 1, 3)
    assert book.projected(RANKS[2], [1, 2]) == Projection(Load(), 2, 0)
    book.first_token("a")
    assert book.load(RANKS[0]) == Load(4, 18, 2)
    book.free("a")
    assert book.load(RANKS[0]) == Load(3, 18, 1)
    book.free("b")
    assert book.load(RANKS[0]) == Load()


def test_a_prompt_that_shares_with_nobody_counts_whole() -> None:
    book = LoadBook(16)
    book.add("a", RANKS[0], [1, 2, 3], 50, 50)
    book.add("b", RANKS[0], [1, 2], 40, 40, shared=False)

    assert book.load(RANKS[0]).blocks == 5
    assert book.projected(RANKS[0], [1, 2, 3]) == Projection(book.load(RANKS[0]), 0, 3)
    assert book.projected(RANKS[0], [1, 2, 3], shared=False) == Projection(book.load(RANKS[0]), 3, 3)


def test_blocks_in_flight_are_those_behind_the_cached_ones_until_the_first_token() -> None:
    book = LoadBook(16)
    book.add("a", RANKS[0], [1, 2, 3, 4], 70, 38, cached_blocks=2)

    assert book.projected(RANKS[0], [1, 2, 3, 9], 2).in_flight_blocks == 1
    assert book.projected(RANKS[0], [1, 2, 3, 4, 5], 2).in_flight_blocks == 2
    assert book.projected(RANKS[0], [1, 2, 3, 4], 4).in_flight_blocks == 0
    assert book.projected(RANKS[0], [1, 2, 3, 4], 0).in_flight_blocks == 0
    book.first_token("a")
    assert book.projected(RANKS[0], [1, 2, 3, 4, 5], 2) == Projection(Load(4, 0, 1), 1, 0)


def test_output_takes_a_block_at_each_edge_that_it_crosses() -> None:
    book = LoadBook(16)
    book.add("a", RANKS[0], [1, 2], 47, 47)
    grown = []
    for _ in range(19):
        book.output("a", 1)
        grown.append(book.load(RANKS[0]).blocks - 2)

    # The prompt's own last block is not full and not counted, as in Dynamo.
    assert grown == [0] + [1] * 16 + [2] * 2
    book.output("a", 100)
    book.free("a")
    assert book.load(RANKS[0]) == Load()


def test_a_worker_that_is_gone_takes_its_load_and_what_comes_late_does_nothing() -> None:
    book = LoadBook(16)
    for key, rank in enumerate(RANKS):
        book.add(key, rank, [1, 2], 40, 40)
    book.drop(1)

    assert [book.load(rank).requests for rank in RANKS] == [0, 0, 1]
    assert len(book) == 1
    book.first_token(0)
    book.output(0, 5)
    book.free(0)
    assert book.load(RANKS[2]) == Load(2, 40, 1)


def test_a_key_is_booked_once() -> None:
    book = LoadBook(16)
    book.add("a", RANKS[0], [], 3, 3)
    with pytest.raises(InvariantError, match="'a' again"):
        book.add("a", RANKS[0], [], 3, 3)


class BookMachine(RuleBasedStateMachine):
    """``under_way``: key -> what a reader of the rules would note down."""

    def __init__(self) -> None:
        super().__init__()
        self.book = LoadBook(SIZE)
        self.under_way: dict[int, dict[str, Any]] = {}
        self.numbers = 0

    @rule(
        rank=st.sampled_from(RANKS),
        hashes=st.sampled_from(HASHES),
        tail=st.integers(0, 3),
        shared=st.booleans(),
    )
    def add(self, rank: Rank, hashes: list[int], tail: int, shared: bool) -> None:
        self.numbers += 1
        prompt_len = len(hashes) * SIZE + tail
        self.book.add(self.numbers, rank, hashes, prompt_len, prompt_len, shared=shared)
        noted = {"rank": rank, "hashes": hashes, "shared": shared, "prompt": prompt_len}
        self.under_way[self.numbers] = {**noted, "prefill": prompt_len, "out": 0}

    def one(self, number: int) -> int:
        return sorted(self.under_way)[number % len(self.under_way)]

    @precondition(lambda self: self.under_way)
    @rule(number=st.integers(0, 99))
    def first_token(self, number: int) -> None:
        self.book.first_token(self.one(number))
        self.under_way[self.one(number)]["prefill"] = 0

    @precondition(lambda self: self.under_way)
    @rule(number=st.integers(0, 99), tokens=st.integers(1, 9))
    def output(self, number: int, tokens: int) -> None:
        self.book.output(self.one(number), tokens)
        self.under_way[self.one(number)]["out"] += tokens

    @precondition(lambda self: self.under_way)
    @rule(number=st.integers(0, 99))
    def free(self, number: int) -> None:
        key = self.one(number)
        self.book.free(key)
        del self.under_way[key]
        self.book.free(key)

    @rule(worker_id=st.integers(1, 3))
    def drop(self, worker_id: int) -> None:
        self.book.drop(worker_id)
        self.under_way = {k: v for k, v in self.under_way.items() if v["rank"].worker_id != worker_id}

    @invariant()
    def equals_the_lists(self) -> None:
        assert len(self.book) == len(self.under_way)
        for rank in RANKS:
            mine = [each for each in self.under_way.values() if each["rank"] == rank]
            names = {name for each in mine if each["shared"] for name in each["hashes"]}
            unnamed = sum(len(each["hashes"]) for each in mine if not each["shared"])
            output = sum(-(-(e["prompt"] + e["out"]) // SIZE) - -(-e["prompt"] // SIZE) for e in mine)
            load = Load(len(names) + unnamed + output, sum(each["prefill"] for each in mine), len(mine))

            assert self.book.load(rank) == load
            for hashes in HASHES:
                new = len([name for name in hashes if name not in names])
                computing = {name for each in mine if each["prefill"] for name in each["hashes"]}
                in_flight = len([name for name in hashes if name in computing])
                assert self.book.projected(rank, hashes) == Projection(load, new, in_flight)

    @invariant()
    def nothing_stays_behind(self) -> None:
        if not self.under_way:
            assert Counter(self.book._shelves) == Counter()


BookMachine.TestCase.settings = examples(40, stateful_step_count=30)
TestBookMachine = BookMachine.TestCase
