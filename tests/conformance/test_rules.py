"""Every first-party reuse rule passes the conformance suite of reuse rules."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.blocks.test_reuse import exception_of
from tests.index_helpers import HalfTokens
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.reuse import RULES, ReuseRule, is_hybrid, rule_named
from vswa_plugin.host.host import PluginHost
from vswa_plugin.testing.cases import ReuseCase, random_layout
from vswa_plugin.testing.rules import ReuseRuleConformance, ReuseWalk
from vswa_plugin.testing.walks import WALKS, BlockTree, TreeBlock

EXAMPLE = Path(__file__).parents[2] / "plugins/examples/chunked_rule.py"


def layouts_of(rule: str) -> list[CacheLayout]:
    """One to four groups in any order, blocks of one token too, a window of one block, no global group."""
    windows = [
        (4, (8, None)),
        (4, (None, 4, 12)),
        (2, (4, 8)),
        (1, (3, None)),
        (3, (None,)),
        (2, (6, None, 2, None)),
    ]
    return [
        CacheLayout(tuple(CacheGroup(7 * n % 5, each, size) for n, each in enumerate(some)), rule, "m")
        for size, some in windows
    ]


class _OfOurs(ReuseRuleConformance):
    @pytest.fixture
    def layouts(self, rule: ReuseRule) -> Sequence[CacheLayout]:
        return layouts_of(rule.name)

    @pytest.fixture
    def refused(self, rule: ReuseRule) -> Sequence[CacheLayout]:
        return [CacheLayout((CacheGroup(0, 18, 4), CacheGroup(1, None, 4)), rule.name, "m")]


class TestBuiltInRules(_OfOurs):
    @pytest.fixture(params=RULES)
    def rule(self, request: pytest.FixtureRequest) -> ReuseRule:
        return RULES[request.param]

    @pytest.fixture
    def layouts(self, rule: ReuseRule) -> Sequence[CacheLayout]:
        some = [random_layout(random.Random(seed)) for seed in range(10)]
        return [*layouts_of(rule.name), *(msgspec.structs.replace(each, rule=rule.name) for each in some)]

    @pytest.fixture
    def refused(self, rule: ReuseRule) -> Sequence[CacheLayout]:
        mixed = CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 16)), rule.name, "m")
        inside = msgspec.structs.replace(mixed, resumption=Resumption(16, 16, partial=True))
        return [inside if is_hybrid(rule) else mixed]

    @pytest.fixture
    def walk(self, rule: ReuseRule) -> ReuseWalk:
        def reused(case: ReuseCase) -> int | None:
            if exception_of(case, rule.name):
                return None
            return WALKS[rule.name](case.layout, case.tree, case.prompt, case.partial_reuse).tokens

        return reused


class TestARuleWithTokensOfItsOwn(_OfOurs):
    """The index asks such a rule for the tokens of the boundary; the built-in ones it does not ask."""

    @pytest.fixture
    def rule(self) -> ReuseRule:
        return HalfTokens()


class TestChunkedExample(_OfOurs):
    @pytest.fixture
    def rule(self) -> Iterator[ReuseRule]:
        with PluginHost() as host:
            host.load_local(str(EXAMPLE))
            yield rule_named("chunked", host.reuse_rules())

    @pytest.fixture
    def walk(self) -> ReuseWalk:
        return walk_chunked


def walk_chunked(case: ReuseCase) -> int | None:
    """The greatest length of which all tokens that those from there on attend to are held."""
    own, size = case.tree.own_blocks(case.prompt), case.layout.block_size
    if all(group.window_size is not None for group in case.layout.groups):
        return None  # at a chunk's edge nothing shows that the engine knows the prefix
    for length in range((len(case.prompt) - 1) // size * size, 0, -size):
        if length // size <= len(own) and _sees_only_held(case, own, length):
            return length
    return 0


def _sees_only_held(case: ReuseCase, own: list[TreeBlock], length: int) -> bool:
    prompt_len = len(case.prompt)
    return all(
        group.group_id in own[key // group.block_size].pages
        for group in case.layout.groups
        for token in range(length, prompt_len)
        for key in range(length)
        if key // (group.window_size or prompt_len) == token // (group.window_size or prompt_len)
    )


def test_walks_and_trees_name_the_blocks_of_a_tree() -> None:
    """The lowest positions come first, and a partial tail is a block as well."""
    tree = BlockTree(2)
    tree.store((1, 2, 3, 4, 5), [0])
    tree.store((1, 2, 9), [0, 1])

    listed = [(position, block.tokens) for position, block in tree.blocks()]
    assert [(0, (1, 2)), (1, (3, 4)), (1, (9,)), (2, (5,))] == listed
    assert [{0, 1}, {0}] == [block.pages for block in tree.own_blocks((1, 2, 3, 4, 5))]
