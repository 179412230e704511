"""Reuse rules with one planted fault each: their tests must fail. test_rule_faults.py runs them apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import Phase, settings

from tests.conformance.test_rules import layouts_of
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import Needs, ReuseRule, TrtllmV2, Vllm
from vswa_plugin.testing.rules import ReuseRuleConformance, ReuseWalk
from vswa_plugin.testing.walks import walk_vllm

settings.register_profile("faulty", phases=[Phase.generate], database=None, derandomize=True)
settings.load_profile("faulty")


class Sound(Vllm):
    name = "theirs"


class _Suite(ReuseRuleConformance):
    kind: type[ReuseRule] = Sound

    @pytest.fixture
    def rule(self) -> ReuseRule:
        return self.kind()

    @pytest.fixture
    def layouts(self) -> Sequence[CacheLayout]:
        return layouts_of(Sound.name)

    @pytest.fixture
    def walk(self) -> ReuseWalk:
        return lambda case: walk_vllm(case.layout, case.tree, case.prompt).tokens


class TestSound(_Suite):
    """As the others, without a fault."""


class TestOfAnotherName(_Suite):
    kind = Vllm


class TestOfUnknownProvenance(_Suite):
    class kind(Sound):
        provenance = "guessed"


class TestPastTheEnd(_Suite):
    class kind(Sound):
        def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
            return -(-prompt_len // layout.block_size)


class TestFewerForLonger(_Suite):
    class kind(Sound):
        def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
            return super().boundaries(layout, prompt_len) // (1 + (prompt_len > 3 * layout.block_size))


class TestNothingLeftToCompute(_Suite):
    class kind(TrtllmV2):
        name = "theirs"

        def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
            return boundary * layout.block_size


class TestFallingTokens(_Suite):
    class kind(Sound):
        def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
            return (1 if boundary % 2 == 0 else boundary) * layout.block_size if boundary else 0


class TestBeforeTheStart(_Suite):
    class kind(Sound):
        def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
            return boundary - (group.window_size or 0) // group.block_size if group.window_size else 0


class TestNumbersOfAnotherRule(_Suite):
    class kind(Sound):
        def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
            numbers = tuple(None if g.window_size is None else 1 for g in layout.check().groups)
            return Needs(numbers, numbers)


class TestCounting(_Suite):
    class kind(Sound):
        def __init__(self) -> None:
            self._calls = itertools.count()

        def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
            return 0 if next(self._calls) % 50 == 0 else super().first_needed(group, boundary, prompt_len)


class TestAcceptsAnything(_Suite):
    class kind(Sound):
        def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
            return None

    @pytest.fixture
    def refused(self) -> Sequence[CacheLayout]:
        return [CacheLayout((CacheGroup(0, 8, 4), CacheGroup(1, None, 8)), Sound.name, "m")]


class TestFailsOtherwise(_Suite):
    class kind(Sound):
        def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
            if len(layout.groups) > 3:
                raise ValueError("too many groups")
            return super().needs(layout, prompt_len)

    @pytest.fixture
    def layouts(self) -> Sequence[CacheLayout]:
        return [each for each in layouts_of(Sound.name) if len(each.groups) < 4]


class TestOneBlockTooFew(_Suite):
    """Sound in itself, and not what the engine does."""

    class kind(Sound):
        @staticmethod
        def _trailing(group: CacheGroup) -> int | None:
            blocks = Vllm._trailing(group)
            return None if blocks is None else max(1, blocks - 1)
