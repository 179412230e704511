"""What holds for every cache manager of the embedded engine, whichever rules it keeps its blocks by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.cache import CacheManager, CacheSequence, GroupSpec
from vswa_plugins.gemma3_cpu.cache.hashing import block_key, salt_id
from vswa_plugins.gemma3_cpu.cache.v1 import CacheManagerV1
from vswa_plugins.gemma3_cpu.cache.v2 import CacheManager as CacheManagerV2

from vswa_plugin.errors import ConfigError, InvalidRequest, InvariantError

RULES: dict[str, Callable[..., CacheManager]] = {
    "trtllm_v2": CacheManagerV2,
    "trtllm_v1": partial(CacheManagerV1, contiguous=False),
    "trtllm_v1_contiguous": partial(CacheManagerV1, contiguous=True),
}
SLIDING, GLOBAL = 0, 1


@pytest.fixture(params=RULES)
def manager(request: pytest.FixtureRequest) -> CacheManager:
    return two_windows(request.param, sliding=100)


def two_windows(rule: str, sliding: int = 50, global_: int = 50, **options: Any) -> CacheManager:
    groups = [GroupSpec(0, 8, sliding, layers=5), GroupSpec(1, None, global_)]
    return RULES[rule](groups, 4, 8192, max_chunk_tokens=16, **options)


def tokens(n: int, first: int = 0) -> list[int]:
    return list(range(first, first + n))


def opened(manager: CacheManager, prompt: list[int], new: int = 1, salt: str | None = None) -> CacheSequence:
    sequence = manager.open(prompt, new, salt)
    assert sequence is not None
    return sequence


def compute(sequence: CacheSequence, upto: int) -> None:
    while sequence.computed_tokens < upto:
        step = min(16, upto - sequence.computed_tokens)
        sequence.reserve(sequence.computed_tokens + step)
        sequence.advance(step)


def run(manager: CacheManager, prompt: list[int], salt: str | None = None) -> int:
    """Tokens that a prompt reuses; it is computed and closed."""
    sequence = opened(manager, prompt, 1, salt)
    compute(sequence, len(prompt))
    sequence.close([7])
    manager.check()
    return sequence.cached_tokens


def test_block_keys_are_those_of_tensorrt_llm() -> None:
    first, salted = block_key([1, 2, 3, 4], None), block_key([1, 2, 3, 4], None, 123)

    assert (924206229973855, 6875034662206558884) == (first, block_key([5, 6], first))
    assert (6280297290684427985, 18177682803760873588) == (salted, block_key([5, 6], salted))


def test_a_salt_counts_in_the_first_block_only() -> None:
    assert block_key([5, 6], 7, salt_id("a")) == block_key([5, 6], 7)
    assert int.from_bytes(bytes.fromhex("ca978112ca1bbdca"), "little") == salt_id("a")


@given(
    bs=st.integers(1, 5),
    blocks=st.integers(1, 4),
    chunk=st.integers(1, 12),
    steps=st.lists(st.integers(1, 12), min_size=1, max_size=30),
)
def test_a_sliding_group_never_holds_more_than_is_reserved(
    bs: int, blocks: int, chunk: int, steps: list[int]
) -> None:
    group = GroupSpec(0, bs * blocks, 1)
    total = sum(min(step, chunk) for step in steps)
    most, computed = group.most_held(total, bs, chunk), 0
    for step in steps:
        upto = computed + min(step, chunk)
        first_visible = max(0, computed - bs * blocks + 1) // bs
        assert -(-upto // bs) - first_visible <= most
        computed = upto


@pytest.mark.parametrize(("bs", "window", "chunk"), [(32, 512, 256), (4, 8, 5), (1, 3, 2), (3, 3, 7)])
def test_the_reservation_of_a_sliding_group_is_not_larger_than_needed(
    bs: int, window: int, chunk: int
) -> None:
    group = GroupSpec(0, window, 1)
    held = max(-(-(h + chunk) // bs) - group.stale_end(h, bs) for h in range(10 * (window + chunk)))

    assert held == group.most_held(10**6, bs, chunk)


@pytest.mark.parametrize(
    ("prompt_len", "new", "words"),
    [
        (0, 5, "got 0 prompt tokens and max_tokens 5"),
        (5, 0, "got 5 prompt tokens and max_tokens 0"),
        (
            8000,
            200,
            "8000 prompt tokens and up to 200 output tokens make 8200, but a sequence has at most 8192",
        ),
        (300, 10, "need 78 blocks of 4 tokens in the pool of window global, which has 50"),
    ],
)
def test_a_request_that_never_fits_is_refused_with_the_numbers(
    manager: CacheManager, prompt_len: int, new: int, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        manager.check_fits(prompt_len, new)
    with pytest.raises(InvalidRequest, match=words):
        manager.open(tokens(prompt_len), new)


@pytest.mark.parametrize("rule", RULES)
def test_a_request_waits_until_those_that_run_leave_it_room(rule: str) -> None:
    manager = two_windows(rule, sliding=100, global_=10)
    first = opened(manager, tokens(20), new=4)

    assert manager.open(tokens(17, 100), 1) is None
    assert manager.open(tokens(16, 100), 1) is None
    assert manager.open(tokens(15, 100), 1) is not None
    first.close()
    assert manager.open(tokens(20, 200), 4) is not None


@pytest.mark.parametrize("rule", RULES)
def test_reused_blocks_count_as_room_taken(rule: str) -> None:
    manager = two_windows(rule, sliding=100, global_=8)
    run(manager, tokens(17))
    opened(manager, tokens(17))

    assert manager.open(tokens(17), 1) is None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("groups", "bs", "words"),
    [
        ([], 4, "at least one cache group"),
        ([GroupSpec(0, 8, 5), GroupSpec(0, None, 5)], 4, r"ids \[0, 0\]"),
        ([GroupSpec(0, 8, 0)], 4, "got 0"),
        ([GroupSpec(0, 10, 5)], 4, r"multiple of the block size \(4 tokens\), got 10"),
        ([GroupSpec(0, 8, 5)], 0, "block_size of at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_work_are_refused(rule: str, groups: list[GroupSpec], bs: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RULES[rule](groups, bs, 8192)


def test_more_than_was_admitted_is_a_bug(manager: CacheManager) -> None:
    sequence = opened(manager, tokens(8), new=4)
    compute(sequence, 12)

    with pytest.raises(InvariantError, match="12 in all"):
        sequence.reserve(13)
    with pytest.raises(InvariantError, match="got 1"):
        sequence.advance(1)
    sequence.close()
    sequence.close()
    with pytest.raises(InvariantError, match="closed"):
        sequence.reserve(4)


def test_a_step_longer_than_the_chunk_is_a_bug(manager: CacheManager) -> None:
    with pytest.raises(InvariantError, match="at most 16 tokens a step"):
        opened(manager, tokens(40)).reserve(17)


def test_tables_stay_the_same_lists_and_lose_what_left_the_window(manager: CacheManager) -> None:
    sequence = opened(manager, tokens(24), 2)
    before = list(sequence.tables)
    compute(sequence, 24)
    compute(sequence, 25)

    assert all(table is same for table, same in zip(sequence.tables, before, strict=True))
    assert [[True] * 4 + [False] * 3, [False] * 7] == [[p < 0 for p in table] for table in sequence.tables]


def test_the_last_token_of_a_prompt_is_always_computed(manager: CacheManager) -> None:
    assert [0, 15, 7, 0] == [run(manager, tokens(n)) for n in (16, 16, 8, 1)]


def test_salts_share_nothing(manager: CacheManager) -> None:
    runs = [run(manager, tokens(20), salt) for salt in (None, "a", "b", "a", None)]

    assert [0, 0, 0, 19, 19] == runs


@pytest.mark.parametrize("rule", RULES)
def test_without_reuse_nothing_outlives_its_sequence(rule: str) -> None:
    manager = two_windows(rule, enable_block_reuse=False)

    assert [0, 0] == [run(manager, tokens(20)) for _ in range(2)]
    assert {0: {}, 1: {}} == manager.resident()


def broken(name: str, manager: Any, sequence: Any) -> None:
    store = manager._store
    page = sequence.pages[GLOBAL][-1]
    if name == "holders":
        page.holders += 1
    elif name == "free":
        store.device[store.pool_of[GLOBAL]].free.append(page.number)
    elif name == "table":
        sequence.tables[SLIDING][-1] = sequence.tables[SLIDING][-2]
    elif name == "reservation":
        manager._reserved[SLIDING] -= 1
    elif name == "queue":
        store.pool(page).push(page)
    elif name == "node":
        sequence.tail.pages[SLIDING] = page
    elif name == "path":
        sequence.committed_blocks -= 1


@pytest.mark.parametrize("what", ["holders", "free", "table", "reservation", "queue", "node", "path"])
def test_the_check_of_manager_v2_finds_what_is_broken(what: str) -> None:
    manager = two_windows("trtllm_v2")
    sequence = opened(manager, tokens(22))
    compute(sequence, 22)
    manager.check()
    broken(what, manager, sequence)

    with pytest.raises(InvariantError, match="KV cache: "):
        manager.check()
