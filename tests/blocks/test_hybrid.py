"""The rule for groups of any kind and block size, against what each token can see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hybrid_helpers import layouts
from tests.properties import examples
from vswa_plugin.blocks import hybrid
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.reuse import RULES, resumable
from vswa_plugin.errors import ConfigError

RULE = RULES["vllm_hybrid"]
#: Group id -> positions at which a block of it is held.
HeldAt = dict[int, set[int]]


def hit(layout: CacheLayout, held: HeldAt, prompt_len: int) -> int:
    """The rule's answer, where groups hold what ends at these positions."""
    unit = layout.hash_block_size

    def of(group_id: int) -> Callable[[int], bool]:
        return lambda block: (block + 1) * unit in held[group_id]

    return resumable(
        RULE, layout, {group.group_id: of(group.group_id) for group in layout.groups}, prompt_len
    )


def seen_blocks(group: CacheGroup, length: int) -> set[int]:
    """Where the blocks end that the token after ``length`` tokens reads, token by token."""
    size = group.block_size
    if group.kind == "recurrent":
        return {length}
    tokens = range(length)
    if group.kind == "sliding":
        assert group.window_size is not None
        # The window contains the token itself; a block is needed as a proof where it is as short as that.
        tokens = range(min(max(0, length - group.window_size + 1), length - 1), length)
    if group.kind == "chunked":
        assert group.chunk_size is not None
        tokens = range(length - length % group.chunk_size, length)
    return {token // size * size + size for token in tokens}


def brute_force(layout: CacheLayout, held: HeldAt, prompt_len: int) -> int:
    """Every multiple of the alignment, from the longest: is all of it held that is read, and given up?"""
    where = hybrid.resumption_of(layout)
    for length in range(prompt_len - 1, 0, -1):
        if length % where.alignment or length + where.lookahead > prompt_len:
            continue
        needed = {group.group_id: seen_blocks(group, length) for group in layout.groups}
        for group in layout.groups:
            if group.drops_last and group.kind != "recurrent":
                needed[group.group_id].add(length + group.block_size)
        last = prompt_len - where.spare_last
        if any(end > last for ends in needed.values() for end in ends):
            continue
        if any(needed.values()) and all(ends <= held[group_id] for group_id, ends in needed.items()):
            return length
    return 0


@examples(600)
@given(layouts(), st.integers(0, 40), st.randoms(use_true_random=False), st.sampled_from([0.5, 0.9, 1.0]))
def test_the_rule_is_what_the_next_token_can_read(
    layout: CacheLayout, prompt_len: int, random: st.random.Random, share: float
) -> None:
    held = {
        group.group_id: {end for end in range(1, 50) if random.random() < share} for group in layout.groups
    }

    assert brute_force(layout, held, prompt_len) == hit(layout, held, prompt_len)


@examples(300)
@given(
    st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 40),
    st.randoms(use_true_random=False),
)
def test_where_a_layout_is_plain_it_is_the_plain_rule(
    windows: list[int | None], size: int, prompt_len: int, random: st.random.Random
) -> None:
    groups = tuple(CacheGroup(i, window, size) for i, window in enumerate(windows))
    held = {group.group_id: [random.random() < 0.9 for _ in range(12)] for group in groups}

    of = [
        resumable(RULES[name], CacheLayout(groups, name, "m"), held, prompt_len)
        for name in ("vllm", "vllm_hybrid")
    ]
    assert of[0] == of[1]


def everything(layout: CacheLayout) -> HeldAt:
    return {group.group_id: set(range(1, 10_000)) for group in layout.groups}


@pytest.mark.parametrize(
    ("groups", "where", "prompt_len", "expected"),
    [
        # Windows that are no multiple of their blocks: 32 blocks of 16 for 500 tokens, one for 7.
        ([CacheGroup(0, 500, 16), CacheGroup(1, None, 16)], None, 1000, 992),
        # Gemma 4: hits are multiples of the larger block.
        ([CacheGroup(0, 512, 32), CacheGroup(1, None, 16)], None, 1008, 992),
        # DeepSeek V4.
        (
            [CacheGroup(0, 128, 64), CacheGroup(1, None, 256), CacheGroup(2, 8, 4), CacheGroup(3, 128, 8)],
            None,
            1000,
            768,
        ),
        # A state every 64 tokens.
        ([CacheGroup(0, None, 64, "recurrent"), CacheGroup(1, None, 64)], None, 129, 128),
        ([CacheGroup(0, None, 64, "recurrent"), CacheGroup(1, None, 64)], None, 128, 64),
        # The next token is part of the last name, and the prompt has none after its last block.
        ([CacheGroup(0, None, 16)], Resumption(16, 16, lookahead=1), 49, 48),
        ([CacheGroup(0, None, 16)], Resumption(16, 16, lookahead=1), 48, 32),
        ([CacheGroup(0, None, 16)], Resumption(16, 16, lookahead=3), 50, 32),
        # The last block is given up; it may contain the last token, or must not.
        ([CacheGroup(0, None, 16, drops_last=True)], None, 64, 48),
        ([CacheGroup(0, None, 16, drops_last=True)], Resumption(16, 16, spare_last=True), 64, 32),
        # A sliding group that is finer than the alignment gives up twice near the start.
        ([CacheGroup(0, 100, 16, drops_last=True), CacheGroup(1, None, 64)], None, 100, 0),
        ([CacheGroup(0, 100, 16, drops_last=True), CacheGroup(1, None, 64)], None, 200, 128),
        # One that needs no more blocks than there are before the boundary does not.
        ([CacheGroup(0, 65, 16, drops_last=True), CacheGroup(1, None, 64)], None, 100, 64),
        # A window of one token needs nothing but the block that is given up, if all are looked up once.
        ([CacheGroup(0, 1, 16, drops_last=True)], Resumption(16, 16, spare_last=True), 49, 32),
        # A state is never given up.
        ([CacheGroup(0, None, 64, "recurrent", drops_last=True)], None, 65, 64),
        # Bounded replay: what is not longer than this is taken as nothing.
        ([CacheGroup(0, None, 16)], Resumption(16, 16, least_tokens=32), 33, 0),
        ([CacheGroup(0, None, 16)], Resumption(16, 16, least_tokens=32), 49, 48),
    ],
)
def test_a_prompt_of_which_all_is_held(
    groups: list[CacheGroup], where: Resumption | None, prompt_len: int, expected: int
) -> None:
    layout = CacheLayout(tuple(groups), RULE.name, "m", resumption=where)

    assert expected == hit(layout, everything(layout), prompt_len)


def test_prefixes_may_end_inside_blocks_of_a_full_group_where_an_entry_reaches_as_far() -> None:
    groups = (CacheGroup(0, None, 64, "recurrent"), CacheGroup(1, None, 64))
    layout = CacheLayout(groups, RULE.name, "m", resumption=Resumption(16, 16, partial=True))

    assert 80 == hit(layout, {0: {64, 80}, 1: {64, 96}}, 200), "an entry further inside the block covers it"
    assert 80 == hit(layout, {0: {64, 80}, 1: {64, 128}}, 200), "as the whole block does"
    assert 64 == hit(layout, {0: {64, 96}, 1: {64, 80}}, 200), "the state lies behind what is covered"
    assert 0 == hit(layout, {0: {80}, 1: {80}}, 200), "the block before must be whole"
    assert 64 == hit(layout, {0: {64, 80}, 1: {64, 96}}, 96), "the entry contains the last token"


def test_where_prefixes_end_inside_blocks_one_unit_is_given_up_and_not_a_block() -> None:
    groups = (CacheGroup(0, None, 64, "recurrent"), CacheGroup(1, None, 64, drops_last=True))
    layout = CacheLayout(groups, RULE.name, "m", resumption=Resumption(16, 16, partial=True))

    assert 80 == hit(layout, {0: {64, 80}, 1: {64, 96}}, 96), "it may contain the last token"
    assert 64 == hit(layout, {0: {64, 80}, 1: {64, 80}}, 96)


def test_a_group_of_a_kind_of_a_later_version_needs_all_that_any_kind_needs() -> None:
    layout = CacheLayout((CacheGroup(0, None, 16, "a later one"), CacheGroup(1, None, 16)), RULE.name, "m")
    whole = set(range(16, 160, 16))

    assert 80 == hit(layout, {0: whole, 1: whole}, 97), "one block more than is reused"
    assert 64 == hit(layout, {0: set(range(16, 96, 16)), 1: whole}, 97), "and it must be held"
    assert 0 == hit(layout, {0: whole - {16}, 1: whole}, 97), "and all before"


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_blocks_of_other_groups_are_units_where_prefixes_end_inside_blocks(kind: str) -> None:
    def layout(size: int) -> CacheLayout:
        group = CacheGroup(0, 33, size) if kind == "sliding" else CacheGroup(0, None, size, kind, 64)
        groups = (group, CacheGroup(1, None, 64), CacheGroup(2, None, 64, "recurrent"))
        return CacheLayout(groups, RULE.name, "m", resumption=Resumption(16, 16, partial=True))

    with pytest.raises(ConfigError, match=rf"hash units \(16 tokens\), got 0 \({kind} of 64 tokens\)"):
        RULE.needs(layout(64), 100)
    held = {0: {80, 96}, 1: {64, 128}, 2: {96, 112}}
    assert 96 == hit(layout(16), held, 200)
    assert 0 == hit(layout(16), {**held, 0: {64, 96}}, 200)


def test_a_window_of_one_token_needs_no_block_before_the_one_that_is_given_up() -> None:
    sliding, full = CacheGroup(0, 1, 16, drops_last=True), CacheGroup(1, None, 16)
    held = {0: {64}, 1: {16, 32, 48, 64}, 2: {16, 32, 48, 64}}

    def layout(*groups: CacheGroup) -> CacheLayout:
        return CacheLayout(groups, RULE.name, "m")

    assert [48, 48] == [hit(layout(*groups), held, 70) for groups in ((sliding,), (sliding, full))]
    # A third kind of group makes vLLM look a second time, without giving up a block, and for a proof.
    assert 0 == hit(layout(sliding, full, CacheGroup(2, 20, 16)), held, 70)
    assert 48 == hit(layout(sliding, full, CacheGroup(2, 20, 16)), {**held, 0: {48, 64}}, 70)
