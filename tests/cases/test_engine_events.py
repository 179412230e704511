"""Engine events that real engines sent, or may send: chains that close on themselves, odd ids and names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from vswa_plugins.trtllm_events import TrtllmEventAdapter
from vswa_plugins.vllm_events import VllmEventAdapter

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksStored, EventAdapter
from vswa_plugin.errors import ProtocolError
from vswa_plugin.publishing.residency import Residency, Restart
from vswa_plugin.testing.adapter_checks import bounded

BLOCK = 4
SLIDING, GLOBAL = 0, 1
TRTLLM_RULES = ("trtllm_v2", "trtllm_v1", "trtllm_v1_contiguous")
#: Lines of Python in which a short sequence of events must be read.
MOST_LINES = 20_000


class Told(NamedTuple):
    """What came of a sequence of events.

    :param refused: per event that could not be read, its index and the reason.
    :param restarts: per beginning of a new epoch, the index of its event and the reason.
    :param counts: blocks held at the end, by group.
    """

    refused: dict[int, str]
    restarts: dict[int, str]
    counts: dict[int, int]


def fed(adapter: EventAdapter, residency: Residency, events: Sequence[dict[str, Any]]) -> Told:
    """As a publisher does it: whatever cannot be read or was lost leaves nothing resident."""
    refused: dict[int, str] = {}
    restarts: dict[int, str] = {}
    for index, raw in enumerate(events):
        try:
            told = adapter.feed(raw)
        except ProtocolError as error:
            residency.clear()
            refused[index] = str(error)
            continue
        for event in told:
            try:
                residency.apply(event)
            except Restart as reason:
                restarts[index] = str(reason)
    return Told(refused, restarts, residency.counts())


# -- TensorRT-LLM's events ---------------------------------------------------------------------------


def block(name: int | str, first_token: int, size: int = BLOCK) -> dict[str, Any]:
    tokens = [{"token_id": first_token + n, "token_extra_id": 0} for n in range(size)]
    return {
        "type": "stored_block",
        "block_hash": name,
        "tokens": tokens,
        "cache_level": 0,
        "priority": 35,
        "mm_keys": [],
    }


def stored(parent: int | str | None, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"type": "stored", "parent_hash": parent, "blocks": list(blocks)}


def removed(*names: float | str) -> dict[str, Any]:
    return {"type": "removed", "block_hashes": list(names)}


CREATED = {"type": "created", "num_blocks_per_cache_level": [99, 0]}
WINDOWS = {SLIDING: 8, GLOBAL: 64}


def event(event_id: int, group: int, data: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"event_id": event_id, "window_size": WINDOWS[group], "data": data, "group": group, **more}


def of_trtllm(rule: str, events: Sequence[dict[str, Any]]) -> Told:
    layout = CacheLayout((CacheGroup(SLIDING, 8, BLOCK), CacheGroup(GLOBAL, None, BLOCK)), rule, "m")
    raw = []
    for each in events:
        rest = {key: value for key, value in each.items() if key != "group"}
        raw.append(rest | {"layer_group_id": each["group"]} if rule == "trtllm_v2" else rest)
    return fed(TrtllmEventAdapter(layout), Residency(layout), raw)


HEAD = [event(0, SLIDING, CREATED), event(1, GLOBAL, CREATED)]
TWO_BLOCKS = stored(None, block(11, 1000), block(12, 2000))
HELD = [*HEAD, event(2, SLIDING, TWO_BLOCKS), event(3, GLOBAL, TWO_BLOCKS)]


def in_global(*data: dict[str, Any]) -> list[dict[str, Any]]:
    """The two groups are created, and then this happens in the global one."""
    return [*HEAD, *(event(2 + n, GLOBAL, each) for n, each in enumerate(data))]


TRTLLM_CHAINS: dict[str, list[dict[str, Any]]] = {
    "its own parent": in_global(stored(5, block(5, 10)), removed(5)),
    "its own parent, known": in_global(stored(None, block(5, 10)), stored(5, block(5, 10)), removed(5)),
    "a ring of two": in_global(stored(6, block(5, 10)), stored(5, block(6, 20)), removed(5)),
    "twice in one event": in_global(
        stored(None, block(5, 10), block(6, 20), block(5, 10)), removed(5), removed(6)
    ),
}


# -- vLLM's events -----------------------------------------------------------------------------------


def vllm_stored(names: list[int], parent: int | None, tokens: int, group: int = 0) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": names,
        "parent_block_hash": parent,
        "token_ids": list(range(1, 1 + tokens)),
        "block_size": BLOCK,
        "medium": "GPU",
        "group_idx": group,
    }


def vllm_removed(*names: int, group: int = 0) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(names), "group_idx": group, "medium": "GPU"}


def of_vllm(_: str, events: Sequence[dict[str, Any]]) -> Told:
    layout = CacheLayout((CacheGroup(0, None, BLOCK), CacheGroup(1, 8, BLOCK)), "vllm", "m")
    return fed(VllmEventAdapter(layout), Residency(layout), events)


#: The sliding group lists one hash for two blocks, so that the one before it is computed from its parent.
VLLM_CHAINS: dict[str, list[dict[str, Any]]] = {
    "its own parent": [vllm_stored([5], 5, 4), vllm_stored([9], 5, 8, group=1), vllm_removed(5)],
    "its own parent, known": [
        vllm_stored([5], None, 4),
        vllm_stored([5], 5, 4),
        vllm_removed(5),
        vllm_removed(5),
    ],
    "a ring of two": [
        vllm_stored([5], 6, 4),
        vllm_stored([6], 5, 4),
        vllm_stored([9], 6, 8, group=1),
        vllm_stored([10], None, 4),
        vllm_removed(10),
    ],
    "twice in one event": [vllm_stored([5, 6, 5], None, 12), vllm_removed(5), vllm_removed(5, 6)],
}


# -- chains that close on themselves -----------------------------------------------------------------


CHAINS = [(rule, case) for rule in (*TRTLLM_RULES, "vllm") for case in VLLM_CHAINS]


def outcome(rule: str, case: str) -> Told:
    """What came of it; an assertion fails where a walk over the chain does not end."""
    if rule == "vllm":
        return bounded(lambda: of_vllm(rule, VLLM_CHAINS[case]), MOST_LINES)
    return bounded(lambda: of_trtllm(rule, TRTLLM_CHAINS[case]), MOST_LINES)


@pytest.mark.parametrize(("rule", "case"), CHAINS)
def test_a_chain_that_closes_on_itself_ends_and_leaves_nothing_behind_once_it_is_removed(
    rule: str, case: str
) -> None:
    assert {0: 0, 1: 0} == outcome(rule, case).counts


@pytest.mark.parametrize(
    ("rule", "case"),
    [(rule, case) for rule, case in CHAINS if case in ("its own parent", "its own parent, known")],
)
def test_a_block_that_is_its_own_parent_is_a_fault_of_the_protocol(rule: str, case: str) -> None:
    told = outcome(rule, case)
    own_parent = {"its own parent": 0, "its own parent, known": 1}[case] + (0 if rule == "vllm" else 2)

    assert own_parent in told.refused
    assert "as its own parent" in told.refused[own_parent]


@pytest.mark.parametrize(("rule", "case"), [(rule, case) for rule, case in CHAINS if "twice" in case])
def test_a_block_that_comes_twice_in_one_chain_is_a_fault_of_the_protocol(rule: str, case: str) -> None:
    (reason,) = outcome(rule, case).refused.values()

    assert "got block 5 again below itself" in reason


@pytest.mark.parametrize("rule", ["trtllm_v1", "trtllm_v1_contiguous", "vllm"])
def test_an_event_that_closes_a_ring_of_two_is_a_fault_of_the_protocol(rule: str) -> None:
    """Where the adapter keeps parents. The others keep none, and the residency takes neither block."""
    refused = outcome(rule, "a ring of two").refused

    assert [1 if rule == "vllm" else 3] == list(refused)
    assert "got block 6 below block 5, which has it among its own parents" in next(iter(refused.values()))


# -- ids, names and sizes that a TensorRT-LLM engine may give ------------------------------------------


@pytest.mark.parametrize("rule", TRTLLM_RULES)
class TestTensorRtLlm:
    def test_what_is_stored_in_both_groups_is_held_in_both(self, rule: str) -> None:
        assert Told({}, {}, {SLIDING: 2, GLOBAL: 2}) == of_trtllm(rule, HELD)

    def test_ids_that_begin_again_leave_what_was_stored_since(self, rule: str) -> None:
        told = of_trtllm(rule, [*HELD, *STARTED_AGAIN])

        assert ({SLIDING: 1, GLOBAL: 1}, [4], {}) == (told.counts, list(told.restarts), told.refused)

    def test_ids_that_go_backwards_are_called_an_engine_that_started_again(self, rule: str) -> None:
        (reason,) = of_trtllm(rule, [*HELD, *STARTED_AGAIN]).restarts.values()

        assert "started again" in reason
        assert "overflowed" not in reason

    def test_an_id_that_is_skipped_is_called_a_buffer_that_overflowed(self, rule: str) -> None:
        told = of_trtllm(rule, [*HELD, event(9, SLIDING, stored(None, block(21, 3000)))])

        assert {SLIDING: 1, GLOBAL: 0} == told.counts
        assert "overflowed" in told.restarts[4]

    def test_events_of_another_attention_dp_rank_are_told_as_those_of_that_rank(self, rule: str) -> None:
        layout = CacheLayout((CacheGroup(SLIDING, 8, BLOCK), CacheGroup(GLOBAL, None, BLOCK)), rule, "m")
        adapter = TrtllmEventAdapter(layout)
        for each in HELD:
            adapter.feed(each)
        told = [got for each in HELD for got in adapter.feed({**each, "attention_dp_rank": 3})]

        assert {3} == {each.dp_rank for each in told}
        assert 2 == len([each for each in told if isinstance(each, BlocksStored)])

    def test_an_event_that_comes_twice_never_makes_blocks_that_were_not_stored(self, rule: str) -> None:
        told = of_trtllm(rule, [*HELD, HELD[-1]])

        assert {} == told.refused
        assert told.counts[SLIDING] in (0, 2)
        assert 2 == told.counts[GLOBAL]

    def test_a_child_before_its_parent_is_left_out_until_the_parent_is_known(self, rule: str) -> None:
        child, parent = stored(11, block(12, 2000)), stored(None, block(11, 1000))
        told = of_trtllm(
            rule,
            [*HEAD, event(2, SLIDING, child), event(3, SLIDING, parent), event(4, GLOBAL, child)],
        )

        assert Told({}, {}, {SLIDING: 1, GLOBAL: 1}) == told

    def test_an_event_of_an_unknown_type_is_named_and_leaves_nothing(self, rule: str) -> None:
        told = of_trtllm(
            rule,
            [*HELD, event(4, SLIDING, {"type": "reset"}), event(5, SLIDING, stored(None, block(31, 4000)))],
        )

        assert {SLIDING: 1, GLOBAL: 0} == told.counts
        assert "'reset'" in told.refused[4]

    def test_a_block_larger_than_the_block_size_is_refused_with_both_sizes(self, rule: str) -> None:
        told = of_trtllm(rule, [*HELD, event(4, SLIDING, stored(None, block(41, 5000, 2 * BLOCK)))])

        assert {SLIDING: 0, GLOBAL: 0} == told.counts
        assert f"{BLOCK} of them" in told.refused[4]
        assert f"{2 * BLOCK} of them; block sizes are mixed" in told.refused[4]

    def test_a_block_may_be_named_by_a_text(self, rule: str) -> None:
        name = "a" * 64
        held = stored(None, block(name, 1000))
        told = of_trtllm(
            rule, [*HEAD, event(2, SLIDING, held), event(3, GLOBAL, held), event(4, SLIDING, removed(name))]
        )

        assert Told({}, {}, {SLIDING: 0, GLOBAL: 1}) == told

    def test_a_name_below_zero_is_the_same_64_bits_as_its_unsigned_spelling(self, rule: str) -> None:
        signed = stored(None, block(-5, 1000), block(-6, 2000))
        unsigned = stored(None, block((1 << 64) - 5, 1000), block((1 << 64) - 6, 2000))
        gone = removed((1 << 64) - 6)
        told = of_trtllm(
            rule, [*HEAD, event(2, SLIDING, signed), event(3, GLOBAL, unsigned), event(4, SLIDING, gone)]
        )

        assert Told({}, {}, {SLIDING: 1, GLOBAL: 2}) == told

    def test_a_name_that_lost_digits_on_its_way_is_refused(self, rule: str) -> None:
        told = of_trtllm(rule, [*HELD, event(4, SLIDING, removed(1.2e19))])

        assert {SLIDING: 0, GLOBAL: 0} == told.counts
        assert "block_hashes" in told.refused[4]


STARTED_AGAIN = [
    event(0, SLIDING, CREATED),
    event(1, GLOBAL, CREATED),
    event(2, SLIDING, stored(None, block(21, 3000))),
    event(3, GLOBAL, stored(None, block(21, 3000))),
]
