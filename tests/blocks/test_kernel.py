"""The compiled kernel against the xxhash package, the pure hashes and the pure table."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tests.index_helpers import KERNEL, needs_kernel
from tests.properties import examples
from vswa_plugin.blocks import hashing, kernel
from vswa_plugin.errors import ConfigError
from vswa_plugin.index.plans import ScorePlan
from vswa_plugin.index.python_table import PythonTable
from vswa_plugin.index.tables import KernelTable, Table
from vswa_plugin.wire.events import Rank

pytestmark = needs_kernel

TOKENS = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 300_000), max_size=300)
ODD = 0x9E3779B97F4A7C15
RANKS: list[Rank | None] = [Rank(number) for number in range(200)]


def compiled() -> Any:
    assert KERNEL is not None
    return KERNEL


def keys_of_one_tag(count: int, tag: int) -> list[int]:
    """Keys that the table's index cannot tell apart: key * odd agrees in its upper half."""
    return [(tag << 32 | low) * pow(ODD, -1, 2**64) % 2**64 for low in range(count)]


#: Ordinary hashes; 0 and the largest; tags that are equal, the lowest, and the highest (whose probes wrap).
KEYS = [
    *(random.Random(seed).getrandbits(64) for seed in range(12)),
    *(0, 2**64 - 1, 1, 2),
    *keys_of_one_tag(6, 77),
    *keys_of_one_tag(6, 2**32 - 1),
]
CHAIN = st.lists(st.sampled_from(KEYS), max_size=12, unique=True)


@pytest.mark.parametrize("seed", [0, 1337, 2**64 - 1, 0x0123456789ABCDEF])
def test_xxh3_equals_the_xxhash_package_at_every_length(seed: int) -> None:
    data = random.Random(seed).randbytes(2048)

    for length in range(2049):
        assert xxhash.xxh3_64_intdigest(data[:length], seed) == compiled().xxh3_64(data[:length], seed), (
            length
        )


@given(st.binary(max_size=5000), st.integers(0, 2**64 - 1))
def test_xxh3_equals_the_xxhash_package_for_any_bytes_and_seed(data: bytes, seed: int) -> None:
    assert xxhash.xxh3_64_intdigest(data, seed) == compiled().xxh3_64(data, seed)


@given(TOKENS, st.sampled_from([1, 2, 3, 16, 32, 60, 61, 64]))
def test_compiled_sequence_hashes_equal_the_pure_ones(tokens: list[int], block_size: int) -> None:
    expected = hashing.sequence_hashes(hashing.block_hashes(tokens, block_size))

    packed = b"".join(value.to_bytes(8, "little") for value in expected)
    assert packed == compiled().sequence_hashes(tokens, block_size)
    assert packed == compiled().sequence_hashes(tuple(tokens), block_size)


def test_blocks_too_large_for_the_stack_hash_alike() -> None:
    tokens = list(range(2_000))

    hashes = hashing.sequence_hashes(hashing.block_hashes(tokens, 600))
    assert array("Q", hashes).tobytes() == compiled().sequence_hashes(tokens, 600)


@pytest.mark.parametrize("switched_off", [False, True])
def test_hashing_tokens_is_the_same_with_and_without_the_kernel(
    switched_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if switched_off:
        monkeypatch.setattr(hashing, "_kernel", None)
    tokens = list(range(100))

    hashes = array("Q", hashing.sequence_hashes(hashing.block_hashes(tokens, 16)))
    assert hashes == hashing.sequence_hashes_of_tokens(tokens, 16)
    for bad in (-1, 2**32, 2**80):
        with pytest.raises(OverflowError):
            hashing.sequence_hashes_of_tokens([1, bad], 2)
    with pytest.raises(TypeError):
        hashing.sequence_hashes_of_tokens([1, "a"], 2)  # type: ignore[list-item]


def test_the_switch_and_an_old_build_leave_the_kernel_aside(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel, "VERSION", kernel.VERSION + 1)
    assert kernel.load_kernel() is None
    assert f"expected compiled kernel version {kernel.VERSION}" in caplog.text

    monkeypatch.undo()
    monkeypatch.setenv(kernel.SWITCH, "0")
    assert kernel.load_kernel() is None
    with pytest.raises(ConfigError, match="with a C compiler"):
        kernel.require_kernel()


#: The last two are of ranks that never held anything, beyond the words of the masks.
BITS = [0, 1, 63, 64, 150, 151, 700]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 1), st.sampled_from(BITS[:5]), CHAIN, st.integers(-1, 6)),
        st.tuples(st.just("discard"), st.integers(0, 1), st.sampled_from(BITS[:5]), CHAIN),
    ),
    max_size=25,
)


def held(table: Table, group: int, bit: int) -> list[int]:
    return sorted(key for piece in table.held(group, bit, 5) for key in piece)


def same_contents(one: Table, other: Table) -> None:
    assert (None, None) == (one.check(), other.check())
    assert list(one.resident()) == list(other.resident())
    for group in range(2):
        assert dict(one.items(group)) == dict(other.items(group))
        assert one.masks(group, KEYS) == other.masks(group, KEYS)
        for bit in BITS:
            holds = sorted(key for key, mask in one.items(group) if mask >> bit & 1)
            assert (holds, holds) == (held(one, group, bit), held(other, group, bit))


@given(STEPS, st.integers(0, 2**151 - 1), st.sampled_from([-1, 0, 1]))
def test_both_tables_hold_the_same_after_every_step(steps: list[Any], dead: int, group: int) -> None:
    tables: list[Table] = [PythonTable(2), KernelTable(compiled(), 2)]
    for name, *arguments in steps:
        first, second = [getattr(table, name)(*arguments) for table in tables]
        assert first == second
        same_contents(*tables)
    for table in tables:
        table.rewind()
        while not table.sweep(dead, 3, group):
            pass
    same_contents(*tables)


NEED = st.none() | st.integers(0, 9)
NEEDS = st.tuples(NEED, NEED) | NEED.map(lambda need: (need, need))


@examples(300)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0, 1, 70]), CHAIN), max_size=8),
    CHAIN,
    st.integers(0, 14),
    NEEDS,
    st.none() | NEEDS,
    st.integers(0, 2**71 - 1),
)
def test_both_tables_score_alike(
    stored: list[Any], prompt: list[int], boundaries: int, trailing: Any, at_end: Any, wanted: int
) -> None:
    plan = ScorePlan(boundaries, trailing, at_end, 4, 4 * boundaries - 1, False)
    tables: list[Table] = [PythonTable(2), KernelTable(compiled(), 2)]
    for table in tables:
        for group, bit, hashes in stored:
            table.add(group, bit, [*hashes, *prompt[: len(prompt) - len(hashes) // 2]], -1)
    first, second = [table.score(prompt, plan, wanted, RANKS) for table in tables]

    assert first == second
    assert first == tables[1].score(array("Q", prompt), plan, wanted, RANKS)


def test_long_prompts_score_alike() -> None:
    """Longer than a chunk of the walk and a piece of a window, with holes and staggered depths."""
    dice = random.Random(3)
    prompt = [dice.getrandbits(64) for _ in range(500)]
    tables: list[Table] = [PythonTable(2), KernelTable(compiled(), 2)]
    for bit in range(130):
        whole = prompt[: dice.randrange(501)]
        sliding = [h for h in whole if dice.random() < 0.97]
        for table in tables:
            table.add(0, bit, whole, -1)
            table.add(1, bit, sliding, -1)
    for trailing in [(None, 16), (16, 16), (40, 16), (None, None), (7, 450)]:
        plan = ScorePlan(500, trailing, (None, 17), 32, 16_000, False)
        first, second = [table.score(prompt, plan, 2**130 - 1, RANKS) for table in tables]
        assert first == second
        assert first


@pytest.mark.parametrize("churn", ["as stored", "backwards", "at random"])
def test_growing_and_shrinking_lose_nothing_and_give_memory_back(churn: str) -> None:
    table = KernelTable(compiled(), 1)
    dice = random.Random(1)
    keys = [dice.getrandbits(64) for _ in range(50_000)]
    for at in range(0, len(keys), 1000):
        table.add(0, 3, keys[at : at + 1000], -1)
    assert (dict.fromkeys(keys, 1 << 3), None) == (dict(table.items(0)), table.check())
    full = table.nbytes()
    gone = {"as stored": keys, "backwards": keys[::-1], "at random": dice.sample(keys, len(keys))}[churn][
        :-10
    ]
    for at in range(0, len(gone), 997):
        assert len(gone[at : at + 997]) == table.discard(0, 3, gone[at : at + 997])
    assert ([10], None) == (list(table.resident()), table.check())
    assert table.nbytes() < full / 10


def test_an_unused_row_is_never_taken_for_a_key_that_looks_like_its_links() -> None:
    table = KernelTable(compiled(), 1)
    table.add(0, 0, [7, 8], -1)
    table.discard(0, 0, [8])

    assert (1, 0) == table.add(0, 0, [7, 0], -1)
    assert ({7: 1, 0: 1}, None) == (dict(table.items(0)), table.check())


def test_a_run_of_rows_ends_at_an_unused_one_that_looks_like_the_next_key() -> None:
    table = KernelTable(compiled(), 1)
    table.add(0, 0, [0], -1)
    table.add(0, 0, [7, 8], -1)
    table.discard(0, 0, [8])  # of whose row the links are 0 now

    plan = ScorePlan(2, (None,), None, 1, 99, False)
    assert {RANKS[0]: 2} == table.score([7, 0], plan, 1, RANKS)


@pytest.mark.parametrize("run", [1, 6])
def test_keys_of_one_tag_are_distinct_where_a_run_of_rows_starts(run: int) -> None:
    """Whichever of them the index finds first; after long runs and short ones."""
    twins = keys_of_one_tag(3, 77)
    table = KernelTable(compiled(), 1)
    chain = list(range(1, 1 + run))
    for each in twins:
        table.add(0, 0, [each], -1)
        table.add(0, 1, [each + 10**6], -1)
    table.add(0, 0, chain, -1)

    plan = ScorePlan(run + 1, (None,), None, 1, 99, False)
    assert [{RANKS[0]: run + 1}] * 3 == [table.score([*chain, each], plan, 1, RANKS) for each in twins]


def test_chains_that_grow_into_unused_rows_leave_the_others_unused() -> None:
    """Blocks are stored behind ones that are held, so that rows leave the list of unused ones anywhere."""
    dice = random.Random(11)
    tables: list[Table] = [PythonTable(1), KernelTable(compiled(), 1)]
    keys = [dice.getrandbits(64) for _ in range(300)]
    for _ in range(1_500):
        start = dice.randrange(300)
        chain = keys[start : start + dice.randrange(1, 20)]
        if dice.random() < 0.5:
            gone = dice.sample(chain, len(chain) // 2)
            first, second = [table.discard(0, 0, gone) for table in tables]
        else:
            first, second = [sum(table.add(0, 0, chain, -1)) for table in tables]
        assert first == second
        assert tables[1].check() is None
    assert dict(tables[0].items(0)) == dict(tables[1].items(0))


@pytest.mark.parametrize("table", [PythonTable(2), *([KernelTable(KERNEL, 2)] if KERNEL else [])])
def test_what_a_rank_held_is_handed_out_as_of_one_moment(table: Table) -> None:
    """Rows move meanwhile: for longer masks, for more keys, and to give memory back."""
    dice = random.Random(5)
    keys = [dice.getrandbits(64) for _ in range(5_000)]
    table.add(1, 3, keys, -1)
    table.add(1, 4, keys[:10], -1)
    pieces = table.held(1, 3, 100)
    handed_out = [*next(pieces)]
    table.discard(1, 3, keys[100:])
    table.add(1, 200, keys, -1)
    table.add(1, 3, range(20_000), -1)
    handed_out += [key for piece in pieces for key in piece]

    assert sorted(keys) == sorted(handed_out)
    assert sorted([*keys[:100], *range(20_000)]) == held(table, 1, 3)
    assert ([], sorted(keys[:10])) == (held(table, 0, 3), held(table, 1, 4))


@pytest.mark.parametrize(("group", "bit"), [(1, 0), (-1, 0), (0, -1), (0, 1 << 20)])
def test_what_nobody_can_hold_is_no_place_in_memory(group: int, bit: int) -> None:
    with pytest.raises(ValueError, match=r"expected a (group|bit) of 0 to"):
        KernelTable(compiled(), 1).held(group, bit, 1)


def test_hashes_are_ints_of_any_sequence() -> None:
    table, seven = KernelTable(compiled(), 1), array("Q", range(7))
    kinds = [
        list(seven),
        tuple(seven),
        range(7),
        seven,
        memoryview(seven),
        memoryview(array("Q", range(14)))[::2],
        array("I", range(7)),
        bytes(range(7)),
    ]
    held = []
    for bit, hashes in enumerate(kinds):
        table.add(0, bit, hashes, -1)
        held.append(sorted(key for key, mask in table.items(0) if mask >> bit & 1))

    every_second = list(range(0, 14, 2))
    assert [every_second if at == 5 else list(range(7)) for at in range(len(kinds))] == held


def test_a_bad_hash_changes_nothing() -> None:
    table = KernelTable(compiled(), 1)
    for bad in (-1, 2**64, 2**200):
        with pytest.raises(OverflowError):
            table.add(0, 0, [1, bad], -1)
    with pytest.raises(TypeError):
        table.add(0, 0, [1, "a"], -1)  # type: ignore[list-item]
    with pytest.raises(ValueError):
        table.add(1, 0, [1], -1)

    assert [0] == list(table.resident())
