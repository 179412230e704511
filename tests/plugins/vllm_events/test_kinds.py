"""Groups of any kind: what events say of them, what they leave out, and what contradicts the layout."""

from __future__ import annotations

import hashlib
import pickle
from typing import Any

import pytest
from vswa_plugins.vllm_events import VllmEventAdapter, adapter, digests, naming

from tests.hybrid_manager import names_of
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.engine import BlocksRemoved, BlocksStored, EngineBlock, GroupCreated
from vswa_plugin.errors import ProtocolError
from vswa_plugin.publishing.residency import Residency, Restart

UNIT = 4
PROMPT = [7 * n % 50 for n in range(40)]
NAMES = names_of(PROMPT, None, UNIT, 0)
#: One group of states, of which events list some, and one of full attention in blocks of two units.
STATES = CacheLayout(
    (CacheGroup(0, None, 8, "recurrent"), CacheGroup(1, None, 8)),
    "vllm_hybrid",
    "m",
    resumption=Resumption(UNIT, UNIT, True),
).check()
SLIDING = CacheLayout((CacheGroup(0, 8, UNIT),), "vllm", "m")
AHEAD = CacheLayout(
    (CacheGroup(0, None, UNIT),), "vllm_hybrid", "m", resumption=Resumption(UNIT, UNIT, lookahead=2)
)


def stored(start: int, end: int, listed: list[int], group: int = 0, size: int = UNIT, **more: Any) -> Any:
    """Blocks of ``size`` tokens between two positions; ``listed``: where those end that are named."""
    return {
        "type": "BlockStored",
        "block_hashes": [NAMES[at] for at in listed],
        "parent_block_hash": NAMES.get(start),
        "token_ids": PROMPT[start:end],
        "block_size": size,
        "medium": "GPU",
        "group_idx": group,
        **more,
    }


def placed(events: list[Any]) -> list[tuple[int, Any, list[tuple[Any, int]]]]:
    """Group, parent, and of each block name and number of tokens."""
    return [
        (event.group_id, event.parent_hash, [(b.hash, len(b.token_ids)) for b in event.blocks])
        for event in events
        if isinstance(event, BlocksStored)
    ]


# -- names that only tokens give ---------------------------------------------------------------------


def test_an_entry_inside_a_block_is_handed_over_below_the_nearest_block_that_is_known() -> None:
    vllm = VllmEventAdapter(STATES)
    vllm.prompt(PROMPT, None, None)
    vllm.feed(stored(0, 16, [8, 16], group=1, size=8))

    assert [] == vllm.feed(stored(24, 28, [28], size=UNIT)), "its parent was never announced"
    assert [(0, NAMES[16], [(NAMES[28], 12)])] == placed(vllm.settle())


def test_what_nothing_names_yet_is_named_by_a_later_event() -> None:
    vllm = VllmEventAdapter(STATES)
    assert [] == vllm.feed(stored(0, 24, [16], size=8)) + [
        event for event in vllm.feed(stored(24, 28, [28])) if isinstance(event, BlocksStored)
    ]
    assert [(0, None, [(NAMES[16], 16)]), (0, NAMES[16], [(NAMES[28], 12)])] == placed(vllm.settle())


def test_the_tokens_of_an_answer_are_kept_until_a_name_below_them_is_listed() -> None:
    vllm = VllmEventAdapter(SLIDING)
    vllm.prompt(PROMPT[:14], None, None)
    for end in range(16, 36, UNIT):
        assert [] == vllm.feed(stored(end - UNIT, end, [])) + vllm.settle()
    vllm.feed(stored(32, 36, [36]))
    (chain, removed) = vllm.settle()

    assert [(0, None, [(NAMES[at], UNIT) for at in range(UNIT, 40, UNIT)])] == placed([chain])
    assert BlocksRemoved(0, tuple(NAMES[at] for at in range(UNIT, 36, UNIT))) == removed


def test_only_so_much_of_answers_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "MAX_KEPT_TOKENS", 3 * UNIT)
    vllm = VllmEventAdapter(SLIDING)
    for end in range(UNIT, 40, UNIT):
        vllm.feed(stored(end - UNIT, end, []))
        vllm.settle()

    assert (3, 3 * UNIT) == (len(vllm._naming._kept), vllm._naming._kept_tokens)


def test_very_many_open_blocks_are_named_before_the_batch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_MAX_OPEN_TOKENS", 8)
    vllm = VllmEventAdapter(SLIDING)

    assert [] == vllm.feed(stored(0, 12, [8]))
    assert [(0, None, [(NAMES[4], 4), (NAMES[8], 4)])] == placed(vllm.feed(stored(12, 16, [])))


def test_a_salted_prompt_names_salted_blocks_and_no_others() -> None:
    salted = names_of(PROMPT, "pepper", UNIT, 0)
    for prompts in (["pepper"], [None, "pepper"], [None], ["other"]):
        vllm = VllmEventAdapter(SLIDING)
        for salt in prompts:
            vllm.prompt(PROMPT, salt, None)
        event = stored(16, 20, [], block_hashes=[salted[20]], parent_block_hash=salted[16])
        vllm.feed(event)
        found = [event for event in vllm.settle() if isinstance(event, BlocksStored)]

        right = {e.cache_salt for e in found if e.blocks[-1].hash == salted[20] and e.parent_hash is None}
        assert ({"pepper"} if "pepper" in prompts else set()) == right


@pytest.mark.parametrize(
    "prompt", [(PROMPT, None, "lora"), (PROMPT, 7, None), (["x"] * 40, None, None)], ids=str
)
def test_prompts_whose_names_are_not_known_name_nothing(prompt: Any) -> None:
    vllm = VllmEventAdapter(SLIDING)
    vllm.prompt(*prompt)

    assert not vllm._naming._computed._waiting


def test_prompts_are_wanted_only_where_no_group_names_all_prefixes() -> None:
    full = CacheGroup(1, None, UNIT)
    named = CacheLayout((CacheGroup(0, 8, UNIT), full), "vllm", "m")

    assert (False, True, True) == tuple(
        VllmEventAdapter(each).wants_prompts for each in (named, SLIDING, STATES)
    )


def test_whole_digests_are_computed_as_well() -> None:
    digest = hashlib.sha256(pickle.dumps("vllm-none-hash", 5)).digest()
    whole = [each.hex() for each in digests.chained(digest, PROMPT, UNIT, 0)]
    vllm = VllmEventAdapter(SLIDING)
    vllm.prompt(PROMPT, None, None)
    vllm.feed(
        stored(16, 20, [], block_hashes=[bytes.fromhex(whole[4])], parent_block_hash=bytes.fromhex(whole[3]))
    )

    assert [whole[:5]] == [[b.hash for b in e.blocks] for e in vllm.settle() if isinstance(e, BlocksStored)]


def test_where_the_engine_hashes_otherwise_that_is_said_once_and_nothing_is_computed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vllm = VllmEventAdapter(STATES)
    assert vllm.wants_prompts
    for first in (100, 200):
        vllm.feed(stored(0, 8, [], group=1, size=8, block_hashes=[first]))
        vllm.feed(stored(0, 16, [], size=8, block_hashes=[first + 1]))
        vllm.settle()

    assert not vllm.wants_prompts
    assert [True] == ["block hashes are not those of sha256" in each for each in caplog.messages]
    vllm.prompt(PROMPT, None, None)
    assert not vllm._naming._computed._waiting


@pytest.mark.parametrize(
    ("then", "listed", "parent"),
    [([4], [4], 8), ([4], [8, 4], None)],
    ids=["below what hangs on it", "behind what hangs on it, and stays there"],
)
def test_a_block_that_comes_back_below_itself_is_refused(
    then: list[int], listed: list[int], parent: int | None
) -> None:
    vllm = VllmEventAdapter(SLIDING)
    vllm.feed(stored(0, 8, [4, 8]))
    vllm.feed({"type": "BlockRemoved", "block_hashes": [NAMES[at] for at in then], "group_idx": 0})

    with pytest.raises(ProtocolError, match="which has it among its own parents"):
        vllm.feed(stored(parent or 0, (parent or 0) + UNIT * len(listed), listed))


def test_larger_blocks_over_the_same_tokens_are_no_ring() -> None:
    mixed = CacheLayout((CacheGroup(0, 20, 8), CacheGroup(1, None, UNIT)), "vllm_hybrid", "m")
    vllm = VllmEventAdapter(mixed)
    vllm.feed(stored(0, 32, [8, 16, 24, 32], size=8))
    found = vllm.feed(stored(0, 32, list(range(4, 33, 4)), group=1))

    assert {NAMES[at] for at in range(4, 33, 4)} == {
        block.hash for event in found if isinstance(event, BlocksStored) for block in event.blocks
    }


# -- what events say of their group ------------------------------------------------------------------


def test_a_kind_that_contradicts_the_layout_corrects_it() -> None:
    vllm, residency = VllmEventAdapter(SLIDING), Residency(SLIDING)
    created, *_ = vllm.feed(stored(0, 4, [4], kv_cache_spec_kind="mamba"))

    assert GroupCreated(0, None, kind="recurrent") == created
    with pytest.raises(Restart):
        residency.apply(created)
    assert "vllm_hybrid" == residency.layout.rule
    again = vllm.feed(stored(4, 8, [8], kv_cache_spec_kind="mamba"))
    assert not any(isinstance(event, GroupCreated) for event in again)


@pytest.mark.parametrize("kind", ["chunked_local_attention", "a_later_kind"])
def test_a_kind_that_cannot_be_followed_is_kept_as_it_is_called_and_said_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    vllm = VllmEventAdapter(SLIDING)
    said = [
        event
        for end in (4, 8, 12)
        for event in vllm.feed(stored(end - 4, end, [end], kv_cache_spec_kind=kind))
        if isinstance(event, GroupCreated)
    ]

    assert [GroupCreated(0, None, kind=kind)] == said
    assert [True] == [f"of the kind {kind}, which is not known" in each for each in caplog.messages]


def test_a_kind_that_the_layout_did_not_know_either_is_no_contradiction() -> None:
    layout = CacheLayout((CacheGroup(0, None, UNIT, "xlstm"),), "vllm_hybrid", "m")

    events = VllmEventAdapter(layout).feed(stored(0, 4, [4], kv_cache_spec_kind="xlstm_state"))
    assert not any(isinstance(event, GroupCreated) for event in events)


def test_a_chunked_group_keeps_the_chunks_that_only_the_layout_states() -> None:
    layout = CacheLayout((CacheGroup(0, None, UNIT, "chunked", 8),), "vllm_hybrid", "m")

    events = VllmEventAdapter(layout).feed(stored(0, 4, [4], kv_cache_spec_kind="chunked_local_attention"))
    assert [BlocksStored(0, None, (EngineBlock(NAMES[4], tuple(PROMPT[:4])),))] == events


@pytest.mark.parametrize(
    ("layout", "event", "said"),
    [
        (
            STATES,
            stored(0, 8, [8], size=16),
            "expected blocks of 8 tokens, as the layout states, got blocks of 16",
        ),
        (STATES, stored(0, 8, [8]), "expected blocks of 8 tokens, as the layout states, got blocks of 4"),
        (STATES, stored(0, 12, [8], size=8), "got 1 for 12 tokens, block_size 8"),
        (STATES, stored(0, 8, [8], size=8, lookahead_token_ids=[[1]]), "lookahead_token_ids of 0 tokens"),
        (AHEAD, stored(0, 4, [4]), "lookahead_token_ids of 2 tokens, as the layout states, for each of 1"),
        (AHEAD, stored(0, 4, [4], lookahead_token_ids=[[1]]), "got 1 for a block"),
        (AHEAD, stored(0, 8, [8], lookahead_token_ids=[[1, 2]] * 2), "got 2 lists of them"),
        (AHEAD, stored(0, 4, [4], lookahead_token_ids=[[1] * 100_000]), "got 100000 for a block"),
        (AHEAD, stored(0, 4, [4], lookahead_token_ids=[["x", 1]]), "BlockStored: Expected `int`"),
    ],
)
def test_what_does_not_fit_the_layout_is_refused_in_one_line(
    layout: CacheLayout, event: Any, said: str
) -> None:
    vllm = VllmEventAdapter(layout)
    with pytest.raises(ProtocolError) as caught:
        vllm.feed(event)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [] == vllm.settle()
