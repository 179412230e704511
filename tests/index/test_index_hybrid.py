"""The index over groups of any kind and block size, against the rule applied to each rank alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hybrid_helpers import layouts, partial_layouts
from tests.properties import examples
from vswa_plugin.blocks.hashing import prefix_names
from vswa_plugin.blocks.hybrid import Need
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.reuse import RULES, Needs, resumable
from vswa_plugin.index import WindowIndex
from vswa_plugin.wire.events import Moved, Rank, Stored

RANKS = [Rank(1), Rank(2), Rank(3)]
RULE = RULES["vllm_hybrid"]


def filled(
    layout: CacheLayout, tokens: list[int], held: dict[Rank, dict[int, list[bool]]], *, kernel: bool
) -> WindowIndex:
    """Every rank holds the names that its flags say, by group and position."""
    index = WindowIndex(kernel=None if kernel else False)
    names = prefix_names(tokens, layout.hash_block_size, layout.lookahead)
    for rank, by_group in held.items():
        index.join(rank, layout)
        for group_id, flags in by_group.items():
            hashes = tuple(name for name, flag in zip(names, flags, strict=False) if flag)
            if hashes:
                index.apply(rank, Stored(group_id, 0, None, hashes))
    index.check()
    return index


@examples(400)
@given(
    layouts() | partial_layouts(),
    st.integers(0, 60),
    st.randoms(use_true_random=False),
    st.sampled_from([0.6, 0.9, 0.97, 1.0]),
    st.booleans(),
)
def test_every_rank_scores_what_the_rule_says_of_it_alone(
    layout: CacheLayout, prompt_len: int, random: st.random.Random, share: float, kernel: bool
) -> None:
    tokens = [random.randrange(1000) for _ in range(prompt_len)]
    held = {
        rank: {group.group_id: [random.random() < share for _ in range(64)] for group in layout.groups}
        for rank in RANKS
    }
    index = filled(layout, tokens, held, kernel=kernel)

    known = len(prefix_names(tokens, layout.hash_block_size, layout.lookahead))
    alone = {
        rank: resumable(RULE, layout, {g: flags[:known] for g, flags in of.items()}, prompt_len)
        for rank, of in held.items()
    }
    scores = index.score_tokens(tokens)
    assert {rank: tokens for rank, tokens in alone.items() if tokens} == scores

    names = prefix_names(tokens, layout.hash_block_size, layout.lookahead)
    explained = {each.rank: each for each in index.explain(names, prompt_len)}
    assert alone == {rank: each.cached_tokens for rank, each in explained.items()}
    for rank, each in explained.items():
        for group in each.groups:
            stride = group.group.block_size // layout.hash_block_size
            blocks = held[rank][group.group.group_id][:known][stride - 1 :: stride]
            runs = [block for first, end in group.held for block in range(first, end)]
            assert [block for block, is_held in enumerate(blocks) if is_held] == runs


class ByNumbers:
    """A plugin's rule for layouts of one group: what its numbers say, also at the very end of a prompt."""

    name = "by_numbers"
    provenance = "read"

    def __init__(self, needs: Needs) -> None:
        self._needs = needs

    def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
        return prompt_len // layout.block_size

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        return min(boundary * layout.block_size, prompt_len - 1)

    def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
        raise AssertionError("need says it")

    def need(self, layout: CacheLayout, group: CacheGroup, boundary: int, prompt_len: int) -> Need:
        end, size = boundary * layout.block_size // group.block_size, group.block_size
        at_end = boundary * layout.block_size == prompt_len
        trailing = (self._needs.at_prompt_end if at_end else self._needs.trailing)[0]
        chunk = self._needs.chunks[0] if self._needs.chunks else None
        first = 0 if trailing is None else max(0, end - trailing)
        first = end // chunk * chunk if chunk else first
        after = self._needs.after[0] if self._needs.after else 0
        return Need(range((first + 1) * size, (end + after) * size + 1, size))

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs:
        return self._needs


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("resumption", [None, Resumption(32, 16)])
@pytest.mark.parametrize(
    "needs",
    [
        Needs((1,), (1,), after=(1,)),
        Needs((1,), (2,), after=(1,)),
        Needs((1,), (2,)),
        Needs((None,), (None,), chunks=(4,)),
        Needs((1,), (2,), chunks=(4,)),
    ],
)
def test_numbers_of_a_plugins_rule_are_used_whatever_the_layout(
    needs: Needs, resumption: Resumption | None, kernel: bool
) -> None:
    rule = ByNumbers(needs)
    layout = CacheLayout((CacheGroup(0, None, 16),), rule.name, "m", resumption=resumption)
    for prompt_len in (128, 130):
        tokens = list(range(prompt_len))
        names = prefix_names(tokens, 16)
        for number in range(2**8):
            flags = [bool(number >> block & 1) for block in range(8)]
            index = WindowIndex(kernel=None if kernel else False, rules={**RULES, rule.name: rule})
            index.join(RANKS[0], layout)
            hashes = tuple(name for name, flag in zip(names, flags, strict=True) if flag)
            index.apply(RANKS[0], Stored(0, 0, None, hashes))
            expected = resumable(rule, layout, {0: flags}, prompt_len)
            assert expected == index.score(names, prompt_len).get(RANKS[0], 0), (prompt_len, flags)


def test_an_explanation_counts_the_blocks_of_each_group() -> None:
    layout = CacheLayout((CacheGroup(0, 64, 32), CacheGroup(1, None, 16)), "vllm_hybrid", "m")
    tokens = list(range(200))
    held = {RANKS[0]: {0: [False, True] * 4, 1: [True] * 9}}
    (rank,) = filled(layout, tokens, held, kernel=True).explain(prefix_names(tokens, 16), 200)

    assert (rank.boundaries, rank.boundary, rank.cached_tokens) == (6, 4, 128)
    sliding, full = rank.groups
    assert (sliding.held, sliding.needed, sliding.spoilt) == (((0, 4),), (2, 4), 4)
    assert (full.held, full.needed, full.spoilt) == (((0, 9),), (0, 8), 9)


def test_a_reused_block_counts_in_the_slowest_tier_of_what_must_be_loaded_for_it() -> None:
    layout = CacheLayout((CacheGroup(0, 64, 32), CacheGroup(1, None, 16)), "vllm_hybrid", "m")
    tokens = list(range(130))
    names = prefix_names(tokens, 16)
    index = filled(layout, tokens, {RANKS[0]: {0: [True] * 8, 1: [True] * 8}}, kernel=True)
    index.apply(RANKS[0], Moved(1, (names[0], names[6]), "host"))
    index.apply(RANKS[0], Moved(0, (names[1], names[7]), "disk"))  # the first of them is not read any more

    assert {RANKS[0]: 128} == index.score(names, 130)
    assert {"host": 1, "disk": 1, "device": 2} == index.tiers(RANKS[0], names, 128)


def test_tokens_that_the_engine_does_not_reuse_are_not_promised() -> None:
    replayed = CacheLayout(
        (CacheGroup(0, None, 16),), "vllm_hybrid", "m", resumption=Resumption(16, 16, least_tokens=32)
    )
    twice = CacheLayout(
        (CacheGroup(0, 100, 16, drops_last=True), CacheGroup(1, None, 64)), "vllm_hybrid", "m"
    )
    for layout, expected in ((replayed, {33: 0, 49: 48}), (twice, {100: 0, 200: 128})):
        for prompt_len, cached_tokens in expected.items():
            tokens = list(range(prompt_len))
            everything = {group.group_id: [True] * 64 for group in layout.groups}
            index = filled(layout, tokens, {RANKS[0]: everything}, kernel=True)

            assert cached_tokens == index.score_tokens(tokens).get(RANKS[0], 0)
