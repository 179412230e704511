"""Reuse rules against the engines' own walks, and what they refuse."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, target
from hypothesis import strategies as st

from tests.properties import examples
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import RULES, Needs, ReuseRule, is_hybrid, resumable, rule_named
from vswa_plugin.errors import ConfigError
from vswa_plugin.testing.cases import ReuseCase, random_case
from vswa_plugin.testing.walks import (
    MAX_SIBLINGS,
    WALKS,
    BlockTree,
    Tokens,
    trtllm_v1_one_pass,
    walk_trtllm_v2,
)

GEMMA = CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 32)), "trtllm_v2", "gemma")
SMALL = CacheLayout((CacheGroup(0, 8, 4), CacheGroup(1, None, 4)), "trtllm_v2", "small")
V1_RULES = ("trtllm_v1", "trtllm_v1_contiguous")
WORLDS = 5000
A = tuple(range(10, 42))  # eight blocks of four tokens


# -- against the walks -----------------------------------------------------------------------------


def exception_of(case: ReuseCase, rule: str) -> str:
    """Why hashes cannot show what the engine does here, from what its walk knows; empty where they can.

    ``a``: it ends one token short of the edge of a block that is not the prompt's own. ``b``: it knows the
    last block of a prompt of whole blocks, and matched another one, or none, in its place.
    """
    size = case.tree.block_size
    if rule != "trtllm_v2" or size == 1:
        return ""
    walk = walk_trtllm_v2(case.layout, case.tree, case.prompt, case.partial_reuse)
    own = case.tree.own_blocks(case.prompt)
    if walk.tokens % size == size - 1:
        block = walk.tokens // size
        if block >= len(own) or walk.ends_in is not own[block]:
            return "a"
    repeated = len(case.prompt) % size == 0 and len(own) == len(case.prompt) // size > 0
    return "b" if repeated and walk.matched is not own[-1] else ""


def compare(case: ReuseCase, name: str) -> tuple[str, int, int]:
    """The exception that applies and the tokens that rule and engine say, after checking how they relate."""
    engine = WALKS[name](case.layout, case.tree, case.prompt, case.partial_reuse).tokens
    ours = resumable(RULES[name], case.layout, case.held(), len(case.prompt))
    exception = exception_of(case, name)
    blocks = (engine // case.tree.block_size, ours // case.tree.block_size)
    if not exception:
        assert blocks[0] == blocks[1], (name, case)
    assert ours >= engine if exception == "b" else name in V1_RULES or ours <= engine, (name, case)
    return exception, engine, ours


@pytest.mark.parametrize("name", RULES)
@examples(60)
@given(rng=st.randoms(use_true_random=False))
def test_a_rule_says_in_whole_blocks_what_the_engines_walk_reuses(name: str, rng: random.Random) -> None:
    case = random_case(rng)
    _, engine, _ = compare(case, name)
    target(float(engine // case.tree.block_size), label=name)


@pytest.mark.parametrize("name", RULES)
def test_rule_and_walk_agree_over_many_worlds_and_exceptions_are_rare_and_of_both_kinds(name: str) -> None:
    seen: Counter[str] = Counter()
    differ: Counter[str] = Counter()
    for seed in range(WORLDS):
        case = random_case(random.Random(seed))
        exception, engine, ours = compare(case, name)
        size = case.tree.block_size
        seen[exception or "none"] += 1
        seen["deep"] += engine >= 3 * size
        seen["cut"] += size <= engine < (len(case.prompt) - 1) // size * size
        differ[exception] += engine // size != ours // size

    assert WORLDS // 5 < seen["deep"] and WORLDS // 5 < seen["cut"]
    if name == "trtllm_v2":
        assert 20 < seen["a"] < WORLDS // 10 and 20 < seen["b"] < WORLDS // 10
        assert 5 < differ["a"] and 5 < differ["b"]
    else:
        assert WORLDS == seen["none"]


@examples(60)
@given(rng=st.randoms(use_true_random=False))
def test_v1s_one_pass_is_the_rule_for_one_sliding_window_and_never_below_it_for_more(
    rng: random.Random,
) -> None:
    case = random_case(rng)
    size = case.tree.block_size
    engine = trtllm_v1_one_pass(case.layout, case.tree, case.prompt, case.partial_reuse) // size
    ours = resumable(RULES["trtllm_v1"], case.layout, case.held(), len(case.prompt)) // size

    sliding = [group for group in case.layout.groups if group.window_size is not None]
    assert ours <= engine
    assert ours == engine or len(sliding) > 1


def test_v1s_one_pass_over_two_sliding_windows_promises_what_the_first_has_lost() -> None:
    layout = CacheLayout(
        (CacheGroup(0, 8, 4), CacheGroup(1, 12, 4), CacheGroup(2, None, 4)), "trtllm_v1", "m"
    )
    tree = BlockTree(4)
    tree.store(A, [2])
    for position, node in tree.blocks():
        node.pages.update({0} if position > 5 else {1} if position > 2 else set())
    prompt = (*A, 1, 2)
    held = ReuseCase(layout, tree, prompt, True).held()

    assert 24 == trtllm_v1_one_pass(layout, tree, prompt, True)
    assert 0 == resumable(RULES["trtllm_v1"], layout, held, len(prompt))


# -- worked examples -------------------------------------------------------------------------------


def blocks(*ranges: tuple[int, int]) -> list[bool]:
    """Residency by inclusive ranges of blocks."""
    return [any(first <= i <= last for first, last in ranges) for i in range(125)]


@pytest.mark.parametrize(
    ("sliding", "global_", "contiguous", "v1", "v2"),
    [
        ([(0, 124)], [(0, 124)], 4000, 4000, 4000),
        ([(109, 124)], [(0, 124)], 0, 4000, 4000),
        ([(110, 124)], [(0, 124)], 0, 0, 0),
        ([(0, 50), (110, 124)], [(0, 124)], 1632, 1632, 1632),
        ([(0, 60), (100, 110)], [(0, 124)], 1952, 1952, 1952),
        ([(0, 60), (90, 110)], [(0, 124)], 1952, 3552, 3552),
        ([(0, 50), (100, 124)], [(0, 124)], 1632, 4000, 4000),
        ([], [(0, 124)], 0, 0, 0),
        ([(0, 124)], [(0, 59)], 1920, 1920, 1920),
        ([(0, 40), (109, 124)], [(0, 59)], 1312, 1312, 1312),
    ],
)
def test_the_worked_numbers_of_gemma_3_1b(
    sliding: list[tuple[int, int]], global_: list[tuple[int, int]], contiguous: int, v1: int, v2: int
) -> None:
    held = {0: blocks(*sliding), 1: blocks(*global_)}
    expected = {"trtllm_v1_contiguous": contiguous, "trtllm_v1": v1, "trtllm_v2": v2}
    by_rule = {name: resumable(RULES[name], GEMMA, held, 4001) for name in expected}
    prompt = tuple(range(4001))
    tree = BlockTree(32)
    tree.store(prompt[:4000], [])
    for node, slides, sees_all in zip(tree.own_blocks(prompt), held[0], held[1], strict=True):
        node.pages.update([0] * slides + [1] * sees_all)

    assert expected == by_rule
    assert expected == {name: WALKS[name](GEMMA, tree, prompt, True).tokens for name in expected}


@pytest.mark.parametrize(
    ("name", "window", "block_size", "trailing", "at_prompt_end"),
    [
        ("trtllm_v2", 512, 32, 16, 16),
        ("trtllm_v2", 4, 1, 3, 4),
        ("trtllm_v2", 32, 32, 1, 1),
        ("trtllm_v1", 512, 32, 16, 17),
        ("trtllm_v1", 4, 1, 4, 5),
        ("trtllm_v1_contiguous", 512, 32, None, None),
        ("vllm", 128, 16, 8, 8),
        ("vllm", 1024, 16, 64, 64),
        ("vllm", 4, 1, 3, 3),
    ],
)
def test_how_many_blocks_a_sliding_group_must_hold(
    name: str, window: int, block_size: int, trailing: int | None, at_prompt_end: int | None
) -> None:
    groups = (CacheGroup(3, None, block_size), CacheGroup(5, window, block_size))
    needs = RULES[name].needs(CacheLayout(groups, name, "m"), 1000)

    assert Needs((None, trailing), (None, at_prompt_end)) == needs


@pytest.mark.parametrize(
    ("name", "prompt_len", "expected"),
    [
        ("trtllm_v2", 32, 31),
        ("trtllm_v2", 37, 32),
        ("trtllm_v1", 32, 31),
        ("trtllm_v1_contiguous", 32, 31),
        ("vllm", 32, 28),
        ("vllm", 37, 32),
        ("vllm", 33, 32),
    ],
)
def test_prompts_of_equal_hashes_and_different_lengths_differ_in_what_is_reused(
    name: str, prompt_len: int, expected: int
) -> None:
    held = {0: [True] * 8, 1: [True] * 8}

    assert expected == resumable(RULES[name], SMALL, held, prompt_len)


def test_a_missing_sliding_block_costs_a_repeated_prompt_one_block_more_in_v1_than_in_v2() -> None:
    """Eight blocks of four tokens, window 8: at 31 tokens V2 needs blocks 6 and 7, V1 also block 5."""
    held = {0: [True] * 5 + [False, True, True], 1: [True] * 8}

    assert [31, 20] == [resumable(RULES[name], SMALL, held, 32) for name in ("trtllm_v2", "trtllm_v1")]


@pytest.mark.parametrize("name", RULES)
def test_a_window_of_one_token_needs_a_block_as_evidence(name: str) -> None:
    layout = CacheLayout((CacheGroup(0, 1, 1),), name, "m")

    assert 0 == resumable(RULES[name], layout, {0: []}, 9)
    assert 5 == resumable(RULES[name], layout, {0: [True] * 5}, 9)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("prompt_len", [0, 1])
def test_a_prompt_of_no_or_one_token_reuses_nothing(name: str, prompt_len: int) -> None:
    for size in (1, 4):
        layout = CacheLayout((CacheGroup(0, 8, size), CacheGroup(1, None, size)), name, "m")

        assert 0 == resumable(RULES[name], layout, {0: [True], 1: [True]}, prompt_len)


def test_residency_may_be_a_function_and_a_group_left_out_holds_nothing() -> None:
    rule = RULES["trtllm_v2"]

    assert 20 == resumable(rule, SMALL, {0: lambda block: block >= 3, 1: lambda block: block < 5}, 40)
    assert 0 == resumable(rule, SMALL, {1: lambda block: True}, 40)


# -- the two exceptions ----------------------------------------------------------------------------


def world(prompt: Tokens, *stored: Tokens, partial_reuse: bool = True) -> ReuseCase:
    """Sliding pages of block 5 are gone, as in the example above; global ones are all there."""
    tree = BlockTree(4)
    for tokens in stored:
        tree.store(tokens, [0, 1])
    for position, node in tree.blocks():
        if position == 5:
            node.pages.discard(0)
    return ReuseCase(SMALL, tree, prompt, partial_reuse)


def test_exception_a_another_block_that_matches_all_but_one_token_is_not_seen_in_hashes() -> None:
    longer = (*A[:31], 99, 100)

    assert ("a", 31, 20) == compare(world(longer, A), "trtllm_v2")


def test_exception_a_a_partial_tail_one_token_short_of_a_block_is_not_seen_in_hashes() -> None:
    assert ("a", 31, 20) == compare(world(A, A[:31]), "trtllm_v2")


@pytest.mark.parametrize("siblings", [MAX_SIBLINGS - 1, MAX_SIBLINGS])
def test_exception_b_among_too_many_siblings_a_repeated_prompt_is_not_matched_to_its_end(
    siblings: int,
) -> None:
    others = [A[:28] + (100 + i,) * 4 for i in range(siblings - 1)]
    expected = ("b", 20, 31) if siblings == MAX_SIBLINGS else ("", 31, 31)

    assert expected == compare(world(A, A, *others), "trtllm_v2")


def test_exception_b_without_partial_reuse_a_repeated_prompt_is_not_matched_to_its_end() -> None:
    assert ("b", 20, 31) == compare(world(A, A, partial_reuse=False), "trtllm_v2")


def test_exception_b_a_tied_sibling_that_came_first_is_matched_and_its_pages_may_be_gone() -> None:
    twin = (*A[:31], 99)
    first = world(A, twin, A)
    first.tree.own_blocks(twin)[-1].pages.clear()
    last = world(A, A, twin)
    last.tree.own_blocks(twin)[-1].pages.clear()

    assert ("b", 20, 31) == compare(first, "trtllm_v2")
    assert ("", 31, 31) == compare(last, "trtllm_v2")


# -- names and refusals ----------------------------------------------------------------------------


def test_rules_say_whether_they_have_been_run_against_the_engine() -> None:
    v1 = dict.fromkeys(("trtllm_v1", "trtllm_v1_contiguous"), "transcribed")
    expected = {"trtllm_v2": "run", **v1, "vllm": "run", "vllm_hybrid": "run"}

    assert expected == {name: rule.provenance for name, rule in RULES.items()}
    assert list(RULES) == [rule.name for rule in RULES.values()]


def test_an_unknown_rule_lists_the_known_ones_and_a_given_one_is_found() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown reuse rule 'trtllm_v3': did you mean 'trtllm_v2'.* Known: .*vllm"
    ):
        rule_named("trtllm_v3")

    assert rule_named("vllm") is RULES["vllm"]
    assert rule_named("mine", {"mine": RULES["vllm"]}) is RULES["vllm"]


PLAIN_RULES = [rule for rule in RULES.values() if not is_hybrid(rule)]


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_only_tensorrt_llm_refuses_a_window_that_is_no_multiple_of_the_block_size(rule: ReuseRule) -> None:
    layout = CacheLayout((CacheGroup(0, 500, 32), CacheGroup(1, None, 32)), rule.name, "m")
    for ask in (lambda: rule.needs(layout, 100), lambda: resumable(rule, layout, {}, 100)):
        if rule.name.startswith("trtllm"):
            with pytest.raises(ConfigError, match="window that is a multiple of the block size"):
                ask()
        else:
            ask()


@pytest.mark.parametrize("rule", PLAIN_RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize(
    "other",
    [CacheGroup(1, None, 16), CacheGroup(1, None, 32, "recurrent"), CacheGroup(1, 64, 32, drops_last=True)],
)
def test_what_only_a_hybrid_rule_knows_is_refused(rule: ReuseRule, other: CacheGroup) -> None:
    layout = CacheLayout((CacheGroup(0, 512, 32), other), rule.name, "m")
    for ask in (
        lambda: rule.needs(layout, 100),
        lambda: rule.boundaries(layout, 100),
        lambda: resumable(rule, layout, {}, 100),
    ):
        with pytest.raises(ConfigError, match=r"expected full and sliding groups of one block size, got 0: "):
            ask()
