"""Each scorer against its definition in plain sets, on random streams of events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.vllm_events_helpers import SIZE, sequence_hash, tokens_of
from vswa_plugin.accuracy.scorers import (
    Approximate,
    Exact,
    GlobalOnly,
    MinOfLastBoundaries,
    MixedGroups,
    built_in_scorers,
)
from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import resumable, rule_named
from vswa_plugin.engine.predicted import Prompt, Scorer
from vswa_plugin.wire.events import Cleared, Event, Moved, Removed, Stored

#: By group, the paths that it holds; and all as one index without groups would have them.
Held: TypeAlias = dict[int, set[str]]
PATHS = [f"{a}{b}{c}{d}" for a in "ab" for b in "ab" for c in "ab" for d in "ab"]
PREFIXES = sorted({path[:n] for path in PATHS for n in range(1, 5)})
MIXED = -1


def layout_of(rule: str, *windows: int | None) -> CacheLayout:
    return CacheLayout(tuple(CacheGroup(n, w, SIZE) for n, w in enumerate(windows)), rule, "m")


LAYOUTS = [
    layout_of("vllm", 2 * SIZE, None),
    layout_of("trtllm_v2", 2 * SIZE, None),
    layout_of("trtllm_v2", SIZE, 3 * SIZE, None),
    layout_of("vllm", SIZE, 3 * SIZE),
]


def prompt(path: str, more: int) -> Prompt:
    tokens = [*tokens_of(path), *range(more)]
    return Prompt(tokens, sequence_hashes_of_tokens(tokens, SIZE))


def prefix(held: set[str], path: str, layout: CacheLayout, more: int) -> int:
    """All blocks from the root on, and one token is left."""
    n = next((n for n in range(len(path)) if path[: n + 1] not in held), len(path))
    size = len(path) * SIZE + more
    tokens = min(n * SIZE, size - 1)
    return tokens if layout.rule == "trtllm_v2" else tokens // SIZE * SIZE


def exact(held: Held, path: str, layout: CacheLayout, more: int, groups: Any = None) -> int:
    chosen = layout.groups if groups is None else groups
    part = CacheLayout(tuple(chosen), layout.rule, layout.model)
    flags = {g.group_id: [path[: n + 1] in held[g.group_id] for n in range(len(path))] for g in chosen}
    return resumable(rule_named(layout.rule), part, flags, len(path) * SIZE + more)


def global_only(held: Held, path: str, layout: CacheLayout, more: int) -> int:
    widest = max(layout.groups, key=lambda group: (group.window_size is None, group.window_size or 0))
    return prefix(held[widest.group_id], path, layout, more)


def mixed(held: Held, path: str, layout: CacheLayout, more: int) -> int:
    return prefix(held[MIXED], path, layout, more)


def least(held: Held, path: str, layout: CacheLayout, more: int) -> int:
    return min(exact(held, path, layout, more, [group]) for group in layout.groups)


@st.composite
def scripts(draw: st.DrawFn) -> tuple[CacheLayout, list[Event | tuple[str, int]]]:
    """Net changes as the wire has them, and prompts: a path and tokens behind it."""
    layout = draw(st.sampled_from(LAYOUTS))
    held: Held = {group.group_id: set() for group in layout.groups}
    script: list[Event | tuple[str, int]] = []
    for _ in range(draw(st.integers(1, 30))):
        group = draw(st.sampled_from(sorted(held)))
        kind = draw(st.sampled_from(["store", "store", "remove", "prompt", "prompt", "move", "clear"]))
        there = sorted(held[group])
        if kind == "prompt":
            script.append((draw(st.sampled_from(PREFIXES)), draw(st.sampled_from([0, 1, SIZE - 1]))))
        elif kind == "clear":
            which = draw(st.sampled_from([group, None, "no"]))
            if which != "no":
                script.append(Cleared(which))
        elif kind == "store":
            path = draw(st.sampled_from(PATHS))
            for n in range(draw(st.integers(0, 3)), 4):
                script.append(Stored(group, n, None, (sequence_hash(path[: n + 1]),)))
                held[group].add(path[: n + 1])
        elif there:
            path = draw(st.sampled_from(there))
            if kind == "move":
                script.append(Moved(group, (sequence_hash(path),), "host"))
            else:
                script.append(Removed(group, (sequence_hash(path),)))
                held[group].discard(path)
    return layout, script


def follow(held: Held, event: Event) -> None:
    """What groups hold after ``event``, and what an index without groups would."""
    names = {sequence_hash(path): path for path in PREFIXES}
    match event:
        case Stored():
            for group in (event.group_id, MIXED):
                held[group].update(names[each] for each in event.sequence_hashes)
        case Removed():
            for group in (event.group_id, MIXED):
                held[group].difference_update(names[each] for each in event.sequence_hashes)
        case Cleared():
            for group in held if event.group_id is None else (event.group_id, MIXED):
                held[group].clear()
        case _:
            assert isinstance(event, Moved)


@pytest.mark.parametrize(
    ("make", "definition"),
    [
        (Exact, exact),
        (GlobalOnly, global_only),
        (MixedGroups, mixed),
        (MinOfLastBoundaries, least),
    ],
    ids=["exact", "global only", "mixed groups", "min of last boundaries"],
)
@given(script=scripts())
@examples(50)
def test_a_scorer_predicts_what_its_definition_says(
    make: Callable[[], Scorer],
    definition: Callable[[Held, str, CacheLayout, int], int],
    script: tuple[CacheLayout, list[Event | tuple[str, int]]],
) -> None:
    layout, steps = script
    scorer = make()
    held: Held = {group.group_id: set() for group in layout.groups} | {MIXED: set()}
    scorer.begin(layout)
    for step in steps:
        if isinstance(step, tuple):
            path, more = step
            assert definition(held, path, layout, more) == scorer.predict(prompt(path, more))
        else:
            scorer.apply(step)
            follow(held, step)


@given(
    st.lists(st.tuples(st.sampled_from(PREFIXES), st.sampled_from([0, 1])), max_size=25), st.integers(1, 6)
)
@examples(60)
def test_the_approximate_scorer_remembers_prompts_for_so_many_requests(
    asked: list[tuple[str, int]], ttl: int
) -> None:
    scorer, layout = Approximate(ttl), LAYOUTS[0]
    scorer.begin(layout)
    for number, (path, more) in enumerate(asked):
        recent = {other[:n] for other, _ in asked[max(0, number - ttl) : number] for n in range(1, 5)}
        recent = {
            each
            for each in recent
            if any(o.startswith(each) for o, _ in asked[max(0, number - ttl) : number])
        }
        assert prefix(recent, path, layout, more) == scorer.predict(prompt(path, more))


def test_the_approximate_scorer_keeps_its_memory_when_an_engine_starts_again() -> None:
    scorer = Approximate()
    scorer.begin(LAYOUTS[0])
    scorer.predict(prompt("ab", 1))
    scorer.begin(LAYOUTS[0])

    assert 2 * SIZE == scorer.predict(prompt("ab", 1))


def test_the_least_of_the_last_boundaries_need_not_be_a_boundary() -> None:
    """The sliding group allows block 3 only, the global one up to block 2: together, neither."""
    scorers: list[Scorer] = [Exact(), MinOfLastBoundaries()]
    for scorer in scorers:
        scorer.begin(LAYOUTS[0])
        for path in ("ab", "aba"):
            scorer.apply(Stored(0, len(path) - 1, None, (sequence_hash(path),)))
        for path in ("a", "ab"):
            scorer.apply(Stored(1, len(path) - 1, None, (sequence_hash(path),)))

    assert [0, 2 * SIZE] == [scorer.predict(prompt("aba", 1)) for scorer in scorers]


def test_without_a_global_group_the_largest_window_is_taken_for_one() -> None:
    """What a router does that knows of prefixes only: a block that has slid out ends them."""
    scorer = GlobalOnly()
    scorer.begin(LAYOUTS[3])
    for path in ("aba", "abaa", "ab"):
        scorer.apply(Stored(1, len(path) - 1, None, (sequence_hash(path),)))
    assert 0 == scorer.predict(prompt("abaa", 1))

    scorer.apply(Stored(1, 0, None, (sequence_hash("a"),)))
    assert 4 * SIZE == scorer.predict(prompt("abaa", 1))


def test_scorers_have_names_of_their_own_and_ours_is_the_first() -> None:
    names = [scorer.name for scorer in built_in_scorers(ttl=7)]

    assert ("exact", "approximate (TTL 7)") == (names[0], names[-1])
    assert len(set(names)) == len(names) == 7
