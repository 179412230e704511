"""The conformance suite of reuse rules: what every rule promises, as tests to inherit.

class TestMyRule(ReuseRuleConformance):
    @pytest.fixture
    def rule(self): return MyRule()

    @pytest.fixture
    def layouts(self): return [CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 32)), "mine", "m")]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeAlias

from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.blocks.kernel import load_kernel
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import ReuseRule, resumable
from vswa_plugin.errors import ConfigError
from vswa_plugin.index import WindowIndex
from vswa_plugin.testing.cases import ReuseCase, random_case
from vswa_plugin.wire.events import Rank, Stored

try:
    import pytest
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "vswa_plugin.testing.rules needs pytest and hypothesis: pip install 'vswa-plugin[test]'; most "
        "other modules of vswa_plugin.testing work without them"
    ) from error

__all__ = [
    "ReuseRuleConformance",
    "ReuseWalk",
]

#: Reused tokens of a case by the author's own walk; None: hashes cannot show what the engine does there.
ReuseWalk: TypeAlias = Callable[[ReuseCase], int | None]

_RANK = Rank(1)
_THREADS = 4
_MAX_BLOCKS = 24
_PROVENANCES = ("read", "run", "transcribed")
#: Of random states: drawn value by value, most of them would be nearly empty.
_SEEDS = st.integers(0, 2**32 - 1)


class ReuseRuleConformance:
    """What every reuse rule promises. An author subclasses it with fixtures.

    ``rule``: the :class:`~vswa_plugin.blocks.reuse.ReuseRule` under test.
    ``layouts``: layouts to which the rule applies; each names the rule and has one block size.
    ``refused`` (optional): layouts that the rule refuses besides those that no layout check lets pass.
    ``walk`` (optional): a :data:`ReuseWalk` of the engine, independent of the rule. It is compared with the
    rule in whole blocks on random cases over ``layouts``. :mod:`vswa_plugin.testing.walks` has examples.

    :cvar more_is_never_less: whether a rank that holds more blocks is never promised less. Where ``tokens``
        falls with a deeper boundary, it is False.
    :cvar examples: random examples per test.
    """

    more_is_never_less = True
    examples = 200

    @pytest.fixture
    def refused(self) -> Sequence[CacheLayout]:
        return ()

    @pytest.fixture
    def walk(self) -> ReuseWalk | None:
        return None

    # -- names -------------------------------------------------------------------------------------

    def test_layouts_name_the_rule_and_the_rule_says_where_it_is_from(
        self, rule: ReuseRule, layouts: Sequence[CacheLayout]
    ) -> None:
        assert layouts, "expected at least one layout in the fixture `layouts`, got none"
        assert [rule.name] * len(layouts) == [layout.rule for layout in layouts]
        assert rule.name and rule.provenance in _PROVENANCES, (rule.name, rule.provenance)

    # -- boundaries and tokens ---------------------------------------------------------------------

    def test_boundaries_grow_with_the_prompt_and_stay_within_its_whole_blocks(
        self, rule: ReuseRule, layouts: Sequence[CacheLayout]
    ) -> None:
        for layout in layouts:
            before = 0
            for prompt_len in _lengths(layout):
                deepest = rule.boundaries(layout, prompt_len)
                whole = prompt_len // layout.block_size
                assert 0 <= deepest <= whole, _text(layout, prompt_len, deepest, f"a boundary in 0..{whole}")
                assert before <= deepest, _text(layout, prompt_len, deepest, f"at least {before}, as before")
                before = deepest

    def test_cached_tokens_are_within_the_blocks_before_the_boundary_and_leave_one_to_compute(
        self, rule: ReuseRule, layouts: Sequence[CacheLayout]
    ) -> None:
        for layout, prompt_len, boundary in _boundaries(rule, layouts):
            tokens = rule.tokens(layout, boundary, prompt_len)
            most = min(boundary * layout.block_size, max(0, prompt_len - 1))
            at = f"boundary {boundary}: tokens in 0..{most}"
            assert 0 <= tokens <= most, _text(layout, prompt_len, tokens, at)

    def test_cached_tokens_do_not_fall_with_a_deeper_boundary(
        self, rule: ReuseRule, layouts: Sequence[CacheLayout]
    ) -> None:
        if not self.more_is_never_less:
            pytest.skip("the rule does not say so")
        for layout in layouts:
            for prompt_len in _lengths(layout):
                deepest = rule.boundaries(layout, prompt_len)
                tokens = [rule.tokens(layout, boundary, prompt_len) for boundary in range(deepest + 1)]
                assert sorted(tokens) == tokens, _text(layout, prompt_len, tokens, "tokens that never fall")

    # -- needed blocks -----------------------------------------------------------------------------

    def test_the_first_needed_block_is_before_the_boundary_or_at_it(
        self, rule: ReuseRule, layouts: Sequence[CacheLayout]
    ) -> None:
        for layout, prompt_len, boundary in _boundaries(rule, layouts):
            for group in layout.groups:
                first = rule.first_needed(group, boundary, prompt_len)
                at = f"a block in 0..{boundary} for group {group.group_id}"
                assert 0 <= first <= boundary, _text(layout, prompt_len, first, at)

    def test_needs_are_the_first_needed_blocks_as_numbers(
        self, rule: ReuseRule, layouts: Sequence[CacheLayout]
    ) -> None:
        for layout, prompt_len, boundary in _boundaries(rule, layouts):
            needs = rule.needs(layout, prompt_len)
            if needs is None:
                continue  # the index calls first_needed for each boundary
            at_end = 0 < boundary * layout.block_size == prompt_len
            numbers = needs.at_prompt_end if at_end else needs.trailing
            by_number = [0 if count is None else max(0, boundary - count) for count in numbers]
            by_group = [rule.first_needed(group, boundary, prompt_len) for group in layout.groups]
            at = f"boundary {boundary}: {by_group}, the blocks of first_needed"
            assert by_group == by_number, _text(layout, prompt_len, by_number, at)

    # -- state -------------------------------------------------------------------------------------

    def test_a_rule_answers_the_same_in_any_order_and_from_any_thread(
        self, rule: ReuseRule, layouts: Sequence[CacheLayout]
    ) -> None:
        questions = list(_boundaries(rule, layouts))
        answers = {question: _answers(rule, *question) for question in questions}

        def differing(seed: int) -> list[Any]:
            shuffled = random.Random(seed).sample(questions, len(questions))
            return [each for each in shuffled if _answers(rule, *each) != answers[each]]

        with ThreadPoolExecutor(_THREADS) as pool:
            for wrong in pool.map(differing, range(_THREADS)):
                assert not wrong, (
                    f"expected the answer of the first call again, got another one for {wrong[0]}"
                )

    # -- holdings ----------------------------------------------------------------------------------

    def test_the_index_scores_what_the_brute_force_over_all_boundaries_finds(
        self, rule: ReuseRule, layouts: Sequence[CacheLayout]
    ) -> None:
        kernels = (False, True) if load_kernel() is not None else (False,)

        @settings(max_examples=self.examples, deadline=None)
        @given(st.sampled_from(list(layouts)), _SEEDS)
        def check(layout: CacheLayout, seed: int) -> None:
            rng = random.Random(seed)
            prompt = _random_prompt(rng, layout)
            held = _random_holdings(rng, layout)
            expected = resumable(rule, layout, held, len(prompt))
            for kernel in kernels:
                scored = _index_score(rule, layout, held, prompt, kernel)
                assert expected == scored, _text(layout, len(prompt), scored, f"{expected} for {held}")

        check()

    def test_more_blocks_held_never_promise_less(
        self, rule: ReuseRule, layouts: Sequence[CacheLayout]
    ) -> None:
        if not self.more_is_never_less:
            pytest.skip("the rule does not say so")

        @settings(max_examples=self.examples, deadline=None)
        @given(st.sampled_from(list(layouts)), _SEEDS)
        def check(layout: CacheLayout, seed: int) -> None:
            rng = random.Random(seed)
            prompt_len = len(_random_prompt(rng, layout))
            fewer, others = _random_holdings(rng, layout), _random_holdings(rng, layout)
            more = {key: [a or b for a, b in zip(fewer[key], others[key], strict=True)] for key in fewer}
            before, after = (resumable(rule, layout, held, prompt_len) for held in (fewer, more))
            assert before <= after, _text(
                layout, prompt_len, after, f"at least {before}; {more} from {fewer}"
            )

        check()

    # -- refusals ----------------------------------------------------------------------------------

    def test_layouts_that_do_not_pass_the_layout_check_are_refused(self, rule: ReuseRule) -> None:
        for layout in _malformed(rule.name):
            _expect_refusal(rule, layout)

    def test_layouts_that_the_author_names_are_refused(
        self, rule: ReuseRule, refused: Sequence[CacheLayout]
    ) -> None:
        for layout in refused:
            _expect_refusal(rule, layout)

    def test_any_layout_is_served_or_refused_with_a_config_error(self, rule: ReuseRule) -> None:
        groups = st.builds(
            CacheGroup, st.integers(0, 4), st.one_of(st.none(), st.integers(1, 40)), st.integers(1, 8)
        )

        @settings(max_examples=self.examples, deadline=None)
        @given(st.lists(groups, max_size=4), st.integers(0, 100))
        def check(groups: list[CacheGroup], prompt_len: int) -> None:
            layout = CacheLayout(tuple(groups), rule.name, "m")
            with suppress(ConfigError):
                rule.needs(layout, prompt_len)
                for boundary in range(rule.boundaries(layout, prompt_len) + 1):
                    _answers(rule, layout, prompt_len, boundary)

        check()

    # -- the engine --------------------------------------------------------------------------------

    def test_the_rule_says_in_whole_blocks_what_the_engines_walk_reuses(
        self, rule: ReuseRule, layouts: Sequence[CacheLayout], walk: ReuseWalk | None
    ) -> None:
        if walk is None:
            pytest.skip("the subclass has no fixture `walk`")

        @settings(max_examples=self.examples, deadline=None)
        @given(st.sampled_from(list(layouts)), _SEEDS)
        def check(layout: CacheLayout, seed: int) -> None:
            rng = random.Random(seed)
            case = random_case(rng, layout)
            reused = walk(case)
            if reused is None:
                return
            size, prompt_len = layout.block_size, len(case.prompt)
            promised = resumable(rule, layout, case.held(), prompt_len)
            expected = f"{reused} as the walk has it, in whole blocks of {size}; {case}"
            assert reused // size == promised // size, _text(layout, prompt_len, promised, expected)

        check()


def _text(layout: CacheLayout, prompt_len: int, got: object, expected: str) -> str:
    groups = [(group.group_id, group.label) for group in layout.groups]
    return f"groups {groups}, prompt of {prompt_len} tokens: expected {expected}, got {got}"


def _lengths(layout: CacheLayout) -> range:
    """Prompt lengths over all windows: some at each place in a block, and each block's edge."""
    windows = [group.window_size or 0 for group in layout.groups]
    blocks = max(windows) // layout.block_size + 6
    return range(0, blocks * layout.block_size + 1)


def _boundaries(rule: ReuseRule, layouts: Sequence[CacheLayout]) -> Iterator[tuple[CacheLayout, int, int]]:
    """Layout, prompt length and boundary: every boundary of the lengths about each block's edge."""
    for layout in layouts:
        size = layout.block_size
        for prompt_len in _lengths(layout):
            if prompt_len % size in (0, 1, size - 1):
                for boundary in range(rule.boundaries(layout, prompt_len) + 1):
                    yield layout, prompt_len, boundary


def _answers(rule: ReuseRule, layout: CacheLayout, prompt_len: int, boundary: int) -> tuple[object, ...]:
    first = [rule.first_needed(group, boundary, prompt_len) for group in layout.groups]
    deepest, tokens = rule.boundaries(layout, prompt_len), rule.tokens(layout, boundary, prompt_len)
    return deepest, tokens, first, rule.needs(layout, prompt_len)


def _random_prompt(rng: random.Random, layout: CacheLayout) -> list[int]:
    size = layout.block_size
    edge = rng.randint(0, _MAX_BLOCKS) * size
    return list(range(max(0, edge + rng.choice((0, 0, 1, -1, rng.randint(0, size))))))


def _random_holdings(rng: random.Random, layout: CacheLayout) -> dict[int, list[bool]]:
    """Which leading blocks each group holds: most of them, with strays, a run or a tail missing."""
    held = {}
    common_end = rng.randint(0, _MAX_BLOCKS)
    for group in layout.groups:
        share = rng.choice((0.0, 0.5, 0.9, 1.0, 1.0))
        end, gap = rng.choice((common_end, rng.randint(0, _MAX_BLOCKS))), rng.randint(0, _MAX_BLOCKS)
        gone = range(gap, gap + rng.randint(0, 4))
        held[group.group_id] = [
            at < end and at not in gone and rng.random() < share for at in range(_MAX_BLOCKS)
        ]
    return held


def _index_score(
    rule: ReuseRule, layout: CacheLayout, held: dict[int, list[bool]], prompt: list[int], kernel: bool
) -> int:
    index = WindowIndex(kernel=kernel, rules={rule.name: rule})
    index.join(_RANK, layout)
    names = sequence_hashes_of_tokens(list(range(_MAX_BLOCKS * layout.block_size)), layout.block_size)
    for group_id, flags in held.items():
        for at, is_held in enumerate(flags):
            if is_held:
                index.apply(_RANK, Stored(group_id, at, names[at - 1] if at else None, (names[at],)))
    hashes = sequence_hashes_of_tokens(prompt, layout.block_size)
    return index.score(hashes, len(prompt)).get(_RANK, 0)


def _malformed(rule: str) -> list[CacheLayout]:
    groups = [
        (),
        (CacheGroup(0, 8, 4), CacheGroup(0, None, 4)),
        (CacheGroup(0, -8, 4), CacheGroup(1, None, 4)),
        (CacheGroup(0, 0, 4), CacheGroup(1, None, 4)),
        (CacheGroup(0, None, 0),),
    ]
    return [CacheLayout(each, rule, "m") for each in groups]


def _expect_refusal(rule: ReuseRule, layout: CacheLayout) -> None:
    """The rule refuses ``layout`` where an index calls it first, and a rank of that layout cannot join."""
    with pytest.raises(ConfigError):
        rule.needs(layout, 100)
    with pytest.raises(ConfigError):
        WindowIndex(rules={rule.name: rule}).join(_RANK, layout)
