"""What vLLM finds where several kinds of groups give up a block, against recordings of its own search."""

from __future__ import annotations

import json
import lzma
from typing import Any

import pytest

from tests.accuracy_helpers import DATA
from vswa_plugin.blocks import hybrid
from vswa_plugin.blocks.hashing import prefix_names
from vswa_plugin.blocks.layout import CHUNKED, RECURRENT, SLIDING, CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.reuse import RULES, resumable, searching
from vswa_plugin.blocks.search import searches
from vswa_plugin.index import WindowIndex
from vswa_plugin.wire.events import Rank, Stored

RULE = RULES["vllm_hybrid"]
A, B = Rank(1), Rank(2)


def cases() -> list[dict[str, Any]]:
    with lzma.open(DATA / "vllm-0.33-search.jsonl.xz", "rt") as lines:
        return [json.loads(line) for line in lines]


def layout_of(case: dict[str, Any]) -> CacheLayout:
    groups = tuple(
        CacheGroup(
            number,
            reach if kind == SLIDING else None,
            size,
            kind if kind in (CHUNKED, RECURRENT) else None,
            reach if kind == CHUNKED else None,
            drops,
        )
        for number, (kind, reach, size, drops) in enumerate(case["groups"])
    )
    where = Resumption(case["alignment"], case["unit"], case["partial"])
    return CacheLayout(groups, RULE.name, "m", resumption=where).check()


def by_needs_alone(layout: CacheLayout, held: list[set[int]], prompt_len: int) -> int:
    for boundary in range(hybrid.deepest(layout, prompt_len), 0, -1):
        needs = [hybrid.need(layout, group, boundary, prompt_len) for group in layout.groups]
        if all(
            positions.issuperset(need.all_of)
            and (need.any_of is None or not positions.isdisjoint(need.any_of))
            for positions, need in zip(held, needs, strict=True)
        ):
            return boundary * hybrid.resumption_of(layout).alignment
    return 0


def test_what_is_reused_is_what_vllms_own_search_found() -> None:
    recorded, others, kinds = cases(), 0, set()
    for case in recorded:
        layout, held, unit = layout_of(case), [set(each) for each in case["held"]], case["unit"]
        holds = {
            number: [end in positions for end in range(unit, case["prompt"] + 1, unit)]
            for number, positions in enumerate(held)
        }

        assert searching(RULE, layout) is not None
        assert case["reused"] == resumable(RULE, layout, holds, case["prompt"]), case
        others += case["reused"] != by_needs_alone(layout, held, case["prompt"])
        kinds |= {(group.kind, group.drops_last, case["partial"]) for group in layout.groups}
    assert (600, 20) <= (len(recorded), others), "some are others than the needs of a boundary say"
    assert {("full", True), ("sliding", True), ("sliding", False), ("recurrent", False)} <= {
        (kind, drops) for kind, drops, partial in kinds if partial
    }


@pytest.mark.parametrize("kernel", [False, True])
def test_the_index_and_its_explanation_say_the_same(kernel: bool) -> None:
    found = 0
    for case in cases()[::10]:
        layout, tokens = layout_of(case), list(range(100, 100 + case["prompt"]))
        names = prefix_names(tokens, case["unit"])
        index = WindowIndex(kernel=kernel)
        for rank in (A, B):
            index.join(rank, layout)
        for group, positions in zip(layout.groups, case["held"], strict=True):
            held = tuple(names[end // case["unit"] - 1] for end in positions)
            index.apply(A, Stored(group.group_id, 0, None, held))
        expected = {A: case["reused"]} if case["reused"] else {}

        assert expected == index.score(names, len(tokens)) == index.score_tokens(tokens)
        assert [case["reused"], 0] == [each.cached_tokens for each in index.explain(names, len(tokens))]
        found += bool(expected)
    assert found > 30


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([CacheGroup(0, 32, 16, drops_last=True)], False),
        ([CacheGroup(0, 32, 16, drops_last=True), CacheGroup(1, None, 16)], False),
        # Alike, but more than one: vLLM takes a second turn.
        ([CacheGroup(0, 32, 16, drops_last=True), CacheGroup(1, 32, 16, drops_last=True)], True),
        ([CacheGroup(0, 32, 16, drops_last=True), CacheGroup(1, 64, 16), CacheGroup(2, None, 16)], True),
        ([CacheGroup(0, 32, 16), CacheGroup(1, 64, 16), CacheGroup(2, None, 16)], False),
    ],
)
def test_only_where_a_block_is_given_up_and_a_second_turn_is_taken(
    groups: list[CacheGroup], expected: bool
) -> None:
    layout = CacheLayout(tuple(groups), RULE.name, "m")

    assert expected == searches(layout) == (RULE.needs(layout, 64) is None)


@pytest.mark.parametrize(("prompt_len", "expected"), [(140, 0), (213, 64), (277, 192), (470, 384)])
def test_near_the_start_of_a_prompt_as_much_is_given_up_as_vllm_does(prompt_len: int, expected: int) -> None:
    """All is held; the numbers are those of vLLM 0.33."""
    groups = (
        CacheGroup(0, 40, 16, drops_last=True),
        CacheGroup(1, 140, 32, drops_last=True),
        CacheGroup(2, None, 64, drops_last=True),
    )
    layout = CacheLayout(groups, RULE.name, "m")

    assert expected == resumable(RULE, layout, dict.fromkeys(range(3), lambda unit: True), prompt_len)
