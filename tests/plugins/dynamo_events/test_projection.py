"""The projection equals its definition after any events, in steps that Dynamo's own tree can follow."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.dynamo_events.projection import Projection

from tests.dynamo_events_helpers import (
    SIZE,
    DynamoTree,
    Held,
    Path,
    announced,
    feed,
    layout_of,
    name,
    spelt,
    tokens_of,
    told,
)
from tests.properties import examples
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import Needs, TrtllmV2
from vswa_plugin.engine.contract import BlocksStored, EngineBlock
from vswa_plugin.errors import ConfigError
from vswa_plugin.wire.events import Cleared, Moved, Removed, Stored, Unknown, layout_event

LAYOUTS = {
    "window 2 and global": layout_of(2, None),
    "windows 1, 3 and global": layout_of(1, None, 3),
    "two windows": layout_of(2, 3),
    "V1, a whole window": layout_of(2, None, rule="trtllm_v1"),
    "contiguous": layout_of(2, None, rule="trtllm_v1_contiguous"),
    "global alone": layout_of(None),
    "two windows as vLLM": layout_of(2, None, 3, rule="vllm"),
}

#: A limit that is always exceeded.
FORGET = -1_000_000
PATHS = st.text("abc", min_size=1, max_size=4) | st.text("ab", min_size=4, max_size=7)


class Script:
    """A projection, Dynamo's tree behind it, and what both should hold."""

    def __init__(self, layout: CacheLayout, mode: str = "boundary", spare: int = 1024) -> None:
        self.held = Held(layout, mode)
        self.projection = Projection(mode, layout, spare=spare)
        self.dynamo = DynamoTree()
        self.seen: set[Path] = set()

    def tell(self, *events: list[Any]) -> list[str]:
        """Feed one batch; what Dynamo was told of it."""
        for batch in events:
            feed(self.projection, batch)
        self.seen |= {path[: n + 1] for path in self.held.known for n in range(len(path))}
        changes = told(self.projection)
        self.dynamo.take(changes)
        return spelt(changes, sorted(self.seen))

    def store(self, path: Path, *groups: int, first: int = 0) -> list[Any]:
        groups = groups or tuple(self.held.held)
        return [event for group_id in groups for event in self.held.store(group_id, path, first)]

    def remove(self, *paths: Path, group: int) -> list[Any]:
        return self.held.remove(group, *paths)

    def check(self) -> None:
        expected = self.held.published()
        assert {name(path) for path in expected} == self.projection.published_hashes()
        assert len(expected) == self.projection.published
        self.projection.check()
        for path in self.seen:
            for prompt in (path, path + "xx"):
                assert self.held.match(prompt) == self.dynamo.match(tokens_of(prompt)), prompt


@st.composite
def scripts(draw: st.DrawFn, groups: int) -> list[tuple[Any, ...]]:
    """Batches of events: (group, path, first) stores, ("gone", group, path) removes, and epochs."""
    some_group = st.integers(0, groups - 1)
    store = st.tuples(
        st.just("store"),
        st.just(range(groups)) | st.lists(some_group, min_size=1, max_size=3),
        PATHS,
        st.sampled_from([0, 0, 0, 1, 2, 3]),
    )
    remove = st.tuples(st.just("remove"), some_group, st.integers(0, 99))
    subtree = st.tuples(st.just("subtree"), some_group, PATHS)
    rare = st.tuples(st.sampled_from(["epoch", "cleared", "group cleared"]), some_group)
    step = st.one_of(
        store, store, store, remove, remove, subtree, st.just(("tell",)), st.just(("tell",)), rare
    )
    return draw(st.lists(step, min_size=10, max_size=40))


def run(script: Script, steps: list[tuple[Any, ...]]) -> None:
    for step in [*steps, ("tell",)]:
        match step:
            case ("store", groups, path, first):
                feed(script.projection, script.store(path, *groups, first=min(first, len(path) - 1)))
            case ("remove", group, number):
                held = sorted(script.held.held[group])
                gone = held[number % len(held) :][:1] if held else []
                feed(script.projection, script.remove(*gone, group=group))
            case ("subtree", group, path):
                below = [each for each in script.held.held[group] if each.startswith(path)]
                feed(script.projection, script.remove(*sorted(below), group=group))
            case ("epoch", _):
                feed(script.projection, script.held.begin())
            case ("cleared", _):
                script.held.begin()
                feed(script.projection, [Cleared()])
            case ("group cleared", group):
                script.held.held[group].clear()
                feed(script.projection, [Cleared(group)])
            case ("tell",):
                script.tell()
                script.check()


@pytest.mark.parametrize("case", LAYOUTS)
@given(data=st.data())
@examples(40)
def test_what_is_published_is_the_definition_after_any_events(case: str, data: st.DataObject) -> None:
    layout = LAYOUTS[case]
    run(Script(layout), data.draw(scripts(len(layout.groups))))


@given(steps=scripts(2))
@examples(80)
def test_it_holds_too_where_all_that_is_not_in_use_is_forgotten_at_once(steps: list[tuple[Any, ...]]) -> None:
    script = Script(layout_of(2, None), spare=FORGET)
    run(script, steps)
    script.tell()

    assert [] == [
        each for each in script.projection._tree.blocks.values() if not each.first_child and not each.held > 1
    ]


@given(steps=scripts(3))
@examples(40)
def test_the_global_projection_is_the_global_group_as_far_as_it_reaches(steps: list[tuple[Any, ...]]) -> None:
    run(Script(LAYOUTS["windows 1, 3 and global"], "global"), steps)


# -- step by step ----------------------------------------------------------------------------------


def script(*windows: int | None, mode: str = "boundary", spare: int = 1024) -> Script:
    """Group 0 is the first window, and so on; None is the global group."""
    return Script(layout_of(*(windows or (2, None))), mode, spare)


def test_a_block_is_published_when_all_groups_can_resume_at_it_or_below() -> None:
    script_ = script()

    assert [] == script_.tell(script_.store("abcd", 1))  # the global group alone
    assert ["+abcd"] == script_.tell(script_.store("abcd", 0, first=2))
    assert [] == script_.tell(script_.store("abcd", 0))  # more boundaries, nothing new to say
    script_.check()


def test_what_slides_out_above_a_boundary_changes_nothing() -> None:
    script_ = script()
    script_.tell(script_.store("abcdef"))

    assert [] == script_.tell(script_.remove("a", "ab", "abc", "abcd", group=0))
    assert ["-abcdef", "-abcde", "-abcd", "-abc", "-ab", "-a"] == script_.tell(
        script_.remove("abcde", group=0)
    )


def test_children_are_removed_before_their_parents_and_stored_after_them() -> None:
    script_ = script()

    assert ["+abcd", "ab+yz"] == script_.tell(script_.store("abcd"), script_.store("abyz"))
    gone = script_.tell(script_.remove("a", group=1))
    assert {"-abcd", "-abyz"} == set(gone[:2]) and ["-ab", "-a"] == gone[-2:]


def test_an_ancestor_that_comes_back_brings_its_subtree_along() -> None:
    script_ = script()
    script_.tell(script_.store("abcd"))
    script_.tell(script_.remove("ab", group=1))

    assert script_.held.published() == {"a"}
    assert ["a+bcd"] == script_.tell(script_.store("ab", 1))
    script_.check()


def test_a_block_that_leaves_and_returns_within_one_batch_is_not_mentioned() -> None:
    script_ = script()
    script_.tell(script_.store("abcd"))

    assert [] == script_.tell(script_.remove("abc", group=1), script_.store("abc", 1))
    assert [] == script_.tell(script_.store("abce"), script_.remove("abce", group=0))


def test_a_new_epoch_removes_everything_and_builds_it_again() -> None:
    script_ = script()
    script_.tell(script_.store("abcd"))

    assert ["-abcd", "-abc", "-ab", "-a"] == script_.tell(script_.held.begin())
    assert ["+abcd"] == script_.tell(script_.store("abcd"))
    assert [] == script_.tell(script_.held.begin(), script_.store("abcd")), "net of both"


def test_after_a_new_epoch_blocks_can_come_back_without_their_tokens() -> None:
    """What a finished request proves resident was not announced again."""
    script_ = script()
    script_.tell(script_.store("abc"))
    script_.tell(script_.held.begin())
    proven = [event for event in script_.store("abc") if not isinstance(event, tuple)]

    assert ["+abc"] == script_.tell(proven)


def test_what_is_no_longer_held_is_forgotten_but_not_at_once() -> None:
    script_ = script(spare=5)
    for letter in "abcdefgh":
        script_.tell(script_.store(letter * 3))
        for group in (0, 1):
            script_.tell(script_.remove(letter * 3, letter * 2, letter, group=group))
    script_.tell()

    assert 2 * 3 + 5 == script_.projection.blocks
    script_.check()


def test_after_a_new_epoch_what_does_not_come_back_is_forgotten() -> None:
    script_ = script(spare=FORGET)
    script_.tell(script_.store("abc"))
    script_.tell(script_.held.begin())
    script_.tell()

    assert 0 == script_.projection.blocks


def test_what_is_resident_is_not_forgotten_though_it_is_not_published_and_nothing_hangs_below() -> None:
    script_ = script(spare=FORGET)
    script_.tell(script_.store("abcd"))
    script_.tell(script_.remove("abcd", group=0))
    script_.tell()
    script_.check()
    for group in (0, 1):
        script_.tell(script_.remove("abcd", group=group))
    script_.tell(script_.remove("abc", group=0))
    script_.tell()
    script_.check()

    assert ["ab+c"] == script_.tell(script_.store("abc", 0, first=2))


def test_the_siblings_of_a_forgotten_block_stay_below_their_parent() -> None:
    script_ = script(spare=FORGET)
    for letter in "vwxyz":
        script_.tell(script_.store("ab" + letter))
    for letter in "xwz":
        script_.tell(*(script_.remove("ab" + letter, group=group) for group in (0, 1)))
        script_.tell()
        script_.check()

    assert {"-abv", "-aby", "-ab"} == set(script_.tell(script_.remove("ab", group=1)))


def test_blocks_of_a_group_that_does_not_count_are_forgotten_too() -> None:
    script_ = script(mode="global", spare=0)
    script_.tell(script_.store("a"))
    for letter in "bcdefgh":
        script_.tell(script_.store(letter, 0))

    assert 2 == script_.projection.blocks
    script_.check()


def test_what_hangs_above_something_held_is_not_forgotten() -> None:
    script_ = script(2, 3, spare=0)  # no global group: the path above a window is held by nobody
    script_.tell(script_.store("abcdef"))
    for group in (0, 1):
        script_.tell(script_.remove("a", "ab", "abc", group=group))
    for letter in "uvwxyz":
        script_.tell(script_.store(letter), *(script_.remove(letter, group=group) for group in (0, 1)))

    assert {"abcdef"[: n + 1] for n in range(6)} <= script_.held.published()
    script_.check()


def test_blocks_whose_tokens_are_not_known_are_not_published_nor_what_hangs_below() -> None:
    script_ = script()
    events = script_.store("abcd")
    projection = Projection("boundary", layout_of(2, None))
    feed(projection, [event for event in events if not isinstance(event, tuple)])
    projection.learn(*announced("ab"))

    assert ["+ab"] == spelt(told(projection), ["a", "ab"])
    projection.learn(*announced("abcd", 3))
    assert [] == spelt(told(projection), ["a", "ab"])
    projection.learn(*announced("abc", 2))
    assert ["ab+cd"] == spelt(told(projection), ["a", "ab", "abc", "abcd"])


def test_a_block_that_is_not_full_is_not_published() -> None:
    projection = Projection("boundary", layout_of(None))
    stored, nodes = announced("a")
    partial = BlocksStored(0, None, (EngineBlock(0, stored.blocks[0].token_ids[:-1]),))
    projection.learn(partial, nodes)
    feed(projection, [Stored(0, 0, None, (nodes[0].sequence_hash,))])

    assert not told(projection)


def test_another_tier_is_still_resident() -> None:
    script_ = script()
    script_.tell(script_.store("ab"))

    assert [] == script_.tell([Moved(0, (name("ab"),), "host"), Unknown("later")])
    script_.check()


def test_what_it_never_heard_of_can_be_removed_or_be_of_another_group() -> None:
    projection = Projection("boundary", layout_of(2, None))
    feed(projection, [Removed(0, (5,)), Removed(7, (5,)), Stored(7, 0, None, (5,)), Cleared(7)])

    assert not told(projection)
    projection.check()


def test_the_order_of_groups_and_their_numbers_are_the_layouts() -> None:
    layout = CacheLayout((CacheGroup(7, None, SIZE), CacheGroup(3, 2 * SIZE, SIZE)), "trtllm_v2", "m")
    script_ = Script(layout)

    assert [] == script_.tell(script_.store("abcd", 7))
    assert ["+abcd"] == script_.tell(script_.store("abcd", 3, first=2))


def test_a_group_whose_window_was_corrected_needs_what_the_new_window_needs() -> None:
    script_ = script()
    script_.tell(script_.store("abcd", 1), script_.store("abcd", 0, first=2))
    wider = layout_of(3, None)
    script_.held = Held(wider)
    feed(script_.projection, [layout_event(wider)])

    script_.tell(script_.store("abcd", 1), script_.store("abcd", 0, first=2))
    assert set() == script_.held.published()
    script_.check()


# -- refused ---------------------------------------------------------------------------------------


class Chunked(TrtllmV2):
    name = "chunked"

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
        return None


class Nothing(TrtllmV2):
    name = "nothing"

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
        return Needs((0, 0), (0, 0))


RULES_HERE = {"chunked": Chunked(), "nothing": Nothing(), "trtllm_v2": TrtllmV2()}


@pytest.mark.parametrize("rule", ["chunked", "nothing"])
def test_a_rule_whose_needs_are_no_fixed_numbers_is_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match=f"'{rule}' cannot be projected"):
        Projection("boundary", layout_of(2, None, rule=rule), RULES_HERE)
    assert Projection("global", layout_of(2, None, rule=rule), RULES_HERE).blocks == 0


def test_a_rule_of_a_later_layout_that_is_refused_leaves_nothing_published() -> None:
    projection = Projection("boundary", layout_of(2, None), RULES_HERE)
    events = Held(layout_of(2, None)).store(1, "abc") + Held(layout_of(2, None)).store(0, "abc")
    feed(projection, events)
    assert ["+abc"] == spelt(told(projection), ["a", "ab", "abc"])

    with pytest.raises(ConfigError):
        projection.apply(layout_event(layout_of(2, None, rule="chunked")))
    feed(projection, [*events, announced("x")])

    assert ["-abc", "-ab", "-a"] == spelt(told(projection), ["a", "ab", "abc"])
    assert (not told(projection), 0) == (True, projection.published)


def test_unknown_projections_and_rules_and_a_missing_global_group_are_refused() -> None:
    for mode, layout, reason in (
        ("bounday", layout_of(2, None), "did you mean 'boundary'"),
        ("boundary", layout_of(2, None, rule="x"), "unknown reuse rule 'x'"),
        ("global", layout_of(2, 3), "no global group"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Projection(mode, layout)


# -- cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event", ["a leaf leaves", "a block below a leaf", "another branch", "a root block that no branch needs"]
)
def test_an_event_among_many_branches_looks_at_none_of_the_others(event: str) -> None:
    script_ = script()
    projection, looks = script_.projection, 0
    feed(projection, script_.store("root"))
    for n in range(1_000):
        feed(projection, script_.store("root" + chr(1_000 + n), first=4))
    told(projection)
    leaf = "root" + chr(1_500)

    def counted(*args: Any) -> Any:
        nonlocal looks
        looks += 1
        return original(*args)

    original = projection._grid.step
    projection._grid.step = counted  # type: ignore[method-assign]
    events = {
        "a leaf leaves": lambda: script_.remove(leaf, group=1),
        "a block below a leaf": lambda: script_.store(leaf + "x", first=5),
        "another branch": lambda: script_.store("root" + "y", first=4),
        "a root block that no branch needs": lambda: script_.remove("roo", group=0),
    }
    feed(projection, events[event]())
    told(projection)

    assert 0 < looks < 20
