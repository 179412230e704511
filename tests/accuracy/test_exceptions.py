"""Which requests an exception explains where a prediction is wrong in whole blocks."""

from __future__ import annotations

from typing import cast

import msgspec

from vswa_plugin.accuracy.exceptions import PARTIAL_MATCH, exception_of
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.reuse import ReuseRule, rule_named
from vswa_plugin.index import Explanation, GroupExplanation
from vswa_plugin.wire.events import Rank

PLAIN = CacheLayout((CacheGroup(0, None, 16),), "trtllm_v2", "m")


class ResumesInsideBlocks:
    """A plugin's rule for layouts that are not plain, so that it says what is needed by ``need``."""

    def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
        return prompt_len // layout.block_size

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        return boundary * layout.block_size - 1


def two_of_three_blocks_are_held(layout: CacheLayout) -> Explanation:
    groups = tuple(GroupExplanation(group, ((0, 2),), None, None) for group in layout.groups)
    return Explanation(Rank(1), "m", layout.rule, True, 3, 2, 32, groups)


def test_a_match_up_to_one_token_before_an_edge_is_explained() -> None:
    rule = rule_named("trtllm_v2")
    explanation = two_of_three_blocks_are_held(PLAIN)

    assert PARTIAL_MATCH == exception_of(rule, PLAIN, explanation, 60, 47)
    assert exception_of(rule, PLAIN, explanation, 60, 46) is None


def test_nothing_is_explained_of_a_layout_whose_blocks_are_counted_otherwise() -> None:
    layout = msgspec.structs.replace(PLAIN, resumption=Resumption(16, 8))
    rule = cast("ReuseRule", ResumesInsideBlocks())

    assert exception_of(rule, layout, two_of_three_blocks_are_held(layout), 60, 47) is None
