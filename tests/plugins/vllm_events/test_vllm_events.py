"""vLLM's events, read into the host's engine events."""

from __future__ import annotations

from typing import Any

import pytest
import vswa_plugins.vllm_events as plugin
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.vllm_events import VllmEventAdapter

from tests.properties import examples
from tests.vllm_events_helpers import (
    CLEARED,
    SIZE,
    Copies,
    Rank,
    as_array,
    digest_of,
    layout_of,
    name_of,
    removed,
    stored,
    tokens_of,
)
from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.engine.contract import BlocksRemoved, BlocksStored, EngineBlock, EventsLost, GroupCreated
from vswa_plugin.errors import ProtocolError
from vswa_plugin.publishing.residency import Restart

TWO = layout_of(8, None)


def block(path: str) -> EngineBlock:
    return EngineBlock(name_of(path), tuple(tokens_of(path[-1])))


@pytest.fixture
def rank() -> Rank:
    return Rank(TWO)


# -- what events mean ------------------------------------------------------------------------------


def test_a_complete_store_names_its_blocks_below_the_parent_of_its_range(rank: Rank) -> None:
    rank.take(stored("a", group=1))

    assert [BlocksStored(1, name_of("a"), (block("ab"), block("abc")))] == rank.take(
        stored("abc", 1, group=1)
    )


def test_both_encodings_mean_the_same() -> None:
    events = [
        stored("ab", group=1),
        stored("abc", 2, group=1, lora_name="l", lora_id=3, extra_keys=[["l"]]),
        removed("ab", group=1),
        CLEARED,
    ]
    one, other = VllmEventAdapter(TWO), VllmEventAdapter(TWO)

    assert [one.feed(event) for event in events] == [other.feed(as_array(event)) for event in events]


def test_arrays_of_releases_with_fewer_fields_are_read() -> None:
    adapter = VllmEventAdapter(layout_of(None))

    assert [BlocksStored(0, None, (block("a"),))] == adapter.feed(
        ["BlockStored", [name_of("a")], None, tokens_of("a"), SIZE]
    )
    assert [BlocksRemoved(0, (name_of("a"),))] == adapter.feed(("BlockRemoved", [name_of("a")]))


def test_a_block_is_gone_with_its_last_copy(rank: Rank) -> None:
    rank.take(stored("a"), stored("a"))

    assert ([], {0: {"a"}, 1: set()}) == (rank.take(removed("a")), rank.holds("a"))
    rank.take(removed("a"))
    assert {0: set(), 1: set()} == rank.holds("a")


def test_copies_are_counted_by_group(rank: Rank) -> None:
    rank.take(stored("a", group=0), stored("a", group=1), removed("a", group=0))

    assert {0: set(), 1: {"a"}} == rank.holds("a")


def test_a_removal_of_what_was_never_announced_is_passed_on(rank: Rank) -> None:
    assert [BlocksRemoved(0, (name_of("x"),))] == rank.take(removed("x"))


def test_clearing_removes_everything_and_counting_begins_anew(rank: Rank) -> None:
    rank.take(stored("ab"), stored("ab"), stored("ab", group=1), CLEARED)
    assert {0: set(), 1: set()} == rank.holds(["a", "ab"])

    rank.take(stored("a"), removed("a"))
    assert {0: set(), 1: set()} == rank.holds(["a", "ab"])


def test_after_a_loss_no_copy_is_counted_on_and_none_is_left_behind(rank: Rank) -> None:
    rank.take(stored("ab"), stored("ab"), stored("ab", group=1))
    told = rank.adapter.lost(7, 9)
    assert [EventsLost(7, 9)] == told
    with pytest.raises(Restart, match="expected engine event id 7, got 9"):
        rank.residency.apply(told[0])
    assert {0: set(), 1: set()} == rank.holds(["a", "ab"])

    rank.take(stored("ab"))
    assert {0: {"a", "ab"}, 1: set()} == rank.holds(["a", "ab"])
    # Of the two copies from before the loss one may be left: gone too early, never too late.
    rank.take(removed("ab"))
    assert {0: {"a"}, 1: set()} == rank.holds(["a", "ab"])
    rank.take(removed("a"), removed("ab"), removed("a", "ab", group=1))
    assert {0: set(), 1: set()} == rank.holds(["a", "ab"])


def test_what_waited_for_its_names_when_events_were_lost_is_forgotten(rank: Rank) -> None:
    rank.adapter.feed(stored("abcd", listed=[1, 3]))
    rank.adapter.lost(1, 2)

    rank.take(stored("abcd", group=1))
    assert {0: set(), 1: {"a", "ab", "abc", "abcd"}} == rank.holds(["a", "ab", "abc", "abcd"])


def test_copies_outside_the_device_do_not_count(rank: Rank) -> None:
    rank.take(stored("a", group=1), stored("ab", group=1, medium="CPU"))
    rank.take(removed("a", group=1) | {"medium": "CPU"})

    assert {0: set(), 1: {"a"}} == rank.holds(["a", "ab"])


def test_digests_and_signed_numbers_are_names_too() -> None:
    adapter = VllmEventAdapter(layout_of(None))
    told = adapter.feed(stored("a", block_hashes=[digest_of("a")]) | {"group_idx": None})
    negative = adapter.feed(stored("b", block_hashes=[-1], group_idx=None))

    assert [digest_of("a").hex(), (1 << 64) - 1] == [e.blocks[0].hash for e in told + negative]  # type: ignore[union-attr]


# -- sparse stores ---------------------------------------------------------------------------------


def test_blocks_that_an_event_does_not_tell_apart_wait_for_the_global_group(rank: Rank) -> None:
    assert [] == rank.adapter.feed(stored("abcd", listed=[2, 3]))
    assert [BlocksStored(1, None, tuple(map(block, ["a", "ab", "abc", "abcd"])))] == rank.take(
        stored("abcd", group=1)
    )[:1]

    everything = ["a", "ab", "abc", "abcd"]
    assert {0: {"abc", "abcd"}, 1: set(everything)} == rank.holds(everything)


def test_blocks_that_are_named_already_need_not_wait(rank: Rank) -> None:
    rank.take(stored("abcd", group=1))

    assert [
        BlocksStored(0, name_of("a"), (block("ab"),)),
        BlocksStored(0, name_of("abc"), (block("abcd"),)),
    ] == (rank.take(stored("abcd", listed=[1, 3])))


def test_a_name_is_known_as_long_as_any_group_holds_the_block(rank: Rank) -> None:
    rank.take(stored("ab", group=1), stored("ab", listed=[1]), removed("ab"))

    assert [BlocksStored(0, name_of("a"), (block("ab"),))] == rank.take(stored("ab", listed=[1]))


def test_a_block_that_is_removed_while_it_waits_never_shows(rank: Rank) -> None:
    rank.take(stored("ab", listed=[1]), removed("ab"), stored("ab", group=1))

    assert {0: set(), 1: {"a", "ab"}} == rank.holds(["a", "ab"])


def test_copies_that_wait_are_counted(rank: Rank) -> None:
    rank.take(stored("ab", listed=[1]), stored("ab", listed=[1]), removed("ab"), stored("ab", group=1))

    assert {0: {"ab"}, 1: {"a", "ab"}} == rank.holds(["a", "ab"])


def test_without_a_global_group_hashes_are_computed() -> None:
    rank = Rank(layout_of(8))
    rank.take(stored("abcd", listed=[1, 3]), stored("x"))
    everything = ["a", "ab", "abc", "abcd", "x", "abcde", "abcdef"]
    assert {0: {"ab", "abcd", "x"}} == rank.holds(everything)

    rank.take(stored("abcdef", 4, listed=[5]), removed("x"))
    assert {0: {"ab", "abcd", "abcdef"}} == rank.holds(everything)


def test_hashes_are_computed_for_all_groups_that_wait() -> None:
    rank = Rank(layout_of(8, 8))
    rank.take(stored("abc", listed=[1]), stored("abc", group=1, listed=[2]), removed("x"))

    assert {0: {"ab"}, 1: {"abc"}} == rank.holds(["a", "ab", "abc"])


def test_hashes_of_another_algorithm_name_nothing() -> None:
    rank = Rank(layout_of(8))
    told = rank.take(stored("abcd", listed=[1], block_hashes=[5]), stored("x"))

    assert [BlocksStored(0, None, (block("x"),))] == told


# -- namespaces ------------------------------------------------------------------------------------


def test_a_salt_is_inherited_from_the_first_block() -> None:
    adapter = VllmEventAdapter(TWO)
    first = adapter.feed(stored("ab", group=1, extra_keys=[["pepper"], None]))
    later = adapter.feed(stored("abc", 2, group=1))

    assert ["pepper", "pepper"] == [event.cache_salt for event in (*first, *later)]  # type: ignore[union-attr]


def test_salt_and_lora_may_come_together() -> None:
    keys = [["adapter", "pepper"], ["adapter"]]
    event = stored("ab", group=1, lora_id=1, lora_name="adapter", extra_keys=keys)

    assert [BlocksStored(1, None, (block("a"), block("ab")), cache_salt="pepper", lora_name="adapter")] == (
        VllmEventAdapter(TWO).feed(event)
    )


@pytest.mark.parametrize("key", [["image", 3], b"embeddings"], ids=["multimodal", "embeddings"])
def test_blocks_that_hold_more_than_tokens_are_left_out_with_what_follows(rank: Rank, key: Any) -> None:
    rank.take(stored("abc", group=1, extra_keys=[None, [key], None]), stored("abcd", 3, group=1))
    assert {0: set(), 1: {"a"}} == rank.holds("a")

    rank.take(removed("ab", "a", group=1))
    assert {0: set(), 1: set()} == rank.holds("a")


def test_a_lora_without_a_name_is_left_out(rank: Rank) -> None:
    assert [] == rank.take(stored("a", group=1, lora_id=4, extra_keys=[[4]]))


# -- layout ----------------------------------------------------------------------------------------


def test_the_engines_word_on_a_window_is_taken_and_what_is_resident_told_again() -> None:
    rank = Rank(layout_of(None, None))
    spec = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 8}
    rank.take(stored("ab", group=1, kv_cache_spec_kind="full_attention"))
    told = rank.take(stored("ab", group=0, **spec))

    assert [GroupCreated(0, 8), 1, 0] == [told[0], *(event.group_id for event in told[1:])]  # type: ignore[union-attr]
    assert (CacheGroup(0, 8, SIZE), 1) == (rank.residency.layout.groups[0], rank.restarts)
    assert {0: {"a", "ab"}, 1: {"a", "ab"}} == rank.holds(["a", "ab"])
    assert not any(isinstance(event, GroupCreated) for event in rank.take(stored("abc", 2, **spec)))


def test_the_group_may_go_unsaid_where_there_is_one() -> None:
    rank = Rank(layout_of(None))
    rank.take(stored("a") | {"group_idx": None})

    assert {0: {"a"}} == rank.holds("a")


def test_the_format_is_the_plugins() -> None:
    assert isinstance(plugin.vswa_event_adapter("vllm", TWO), VllmEventAdapter)
    assert plugin.vswa_event_adapter("trtllm", TWO) is None


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (7, "expected a KV event as a map or an array, got int"),
        ([], "expected a KV event as a map or an array, got list"),
        ({"type": "BlockStord"}, "unknown type 'BlockStord': did you mean 'BlockStored'?"),
        ({"type": 5}, "unknown type 'int'"),
        (
            stored("a", group=2),
            "BlockStored: expected a group_idx of 0 (window 8) or 1 (window global), got 2",
        ),
        (removed("a") | {"group_idx": None}, "BlockRemoved: expected a group_idx of 0"),
        (stored("a", token_ids=[-1] * 4), "BlockStored: Expected `int` >= 0 - at `$.token_ids[0]`"),
        (stored("a", block_hashes=[1.5]), "expected 64-bit numbers or digests, got float"),
        (stored("a", block_hashes=[1 << 64]), "expected 64-bit numbers or digests, got int"),
        (stored("a", block_hashes=[1, 2]), "expected at most a hash for each 4 tokens, got 2 for 4 tokens"),
        (
            stored("ab", block_size=8),
            "expected blocks of 4 tokens, as the layout states, got blocks of 8: two block sizes are mixed",
        ),
        (stored("a", token_ids=[1, 2, 3]), "got 1 for 3 tokens"),
        (stored("ab", extra_keys=[None]), "expected extra_keys for each of 2 block_hashes, got 1"),
        (stored("a", kv_cache_spec_kind="sliding_window"), "expected kv_cache_spec_sliding_window, got none"),
    ],
)
def test_what_is_not_an_event_of_vllm_is_named(rank: Rank, event: Any, said: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        rank.take(event)

    assert said in str(caught.value)
    assert str(tokens_of("a")[0]) not in str(caught.value), "token ids never get into messages"


# -- against an engine that keeps copies -------------------------------------------------------------

PATHS = [a + b + c + d for a in "ab" for b in ("", "a", "b") for c in ("", "c") for d in ("", "d")]
PREFIXES = sorted({path[: n + 1] for path in PATHS for n in range(len(path))})


@st.composite
def batches(
    draw: st.DrawFn, sliding: int, with_global: bool
) -> tuple[list[list[Any]], list[dict[int, set[str]]]]:
    """Batches of an engine's events, and what every group holds after each."""
    groups = sliding + with_global
    copies = Copies(groups)
    said: list[list[Any]] = []
    held: list[dict[int, set[str]]] = []
    for _ in range(draw(st.integers(1, 12))):
        group = draw(st.integers(0, groups - 1))
        there = copies.everywhere(group)
        if there and draw(st.booleans()):
            gone = draw(st.sampled_from(there))
            copies.of[group][gone] -= 1
            batch = [removed(gone, group=group)]
        else:
            batch = _store(draw, copies, sliding, with_global)
        said.append(batch)
        held.append(copies.held())
    return said, held


def _store(draw: st.DrawFn, copies: Copies, sliding: int, with_global: bool) -> list[Any]:
    """One request's blocks from a position on up to which the global group holds all, or from the root."""
    path = draw(st.sampled_from(PATHS))
    held = copies.held().get(sliding, set())
    starts = [n for n in range(len(path)) if all(path[: i + 1] in held for i in range(n))]
    first = draw(st.sampled_from(starts)) if with_global else 0
    batch = []
    for group in range(sliding):
        listed = sorted(draw(st.sets(st.sampled_from(range(first, len(path))))))
        copies.of[group].update(path[: at + 1] for at in listed)
        batch.append(stored(path, first, group, listed))
    if with_global:
        copies.of[sliding].update(path[: at + 1] for at in range(first, len(path)))
        batch.append(stored(path, first, sliding))
    return batch


@given(batches(sliding=2, with_global=True))
@examples(60)
def test_after_every_batch_each_group_holds_what_it_has_copies_of(
    script: tuple[list[list[Any]], list[dict[int, set[str]]]],
) -> None:
    rank = Rank(layout_of(8, 4, None))
    for batch, held in zip(*script, strict=True):
        rank.take(*batch)
        assert held == rank.holds(PREFIXES)
    assert 0 == rank.residency.unattributed


@given(batches(sliding=2, with_global=False))
@examples(60)
def test_sliding_groups_alone_are_known_one_event_later(
    script: tuple[list[list[Any]], list[dict[int, set[str]]]],
) -> None:
    rank = Rank(layout_of(8, 4))
    for batch, held in zip(*script, strict=True):
        rank.take(*batch, removed("z"))
        assert held == rank.holds(PREFIXES)
