"""Well-formed vLLM events in any order: rings, repeats, copies, windows that change, ranges partly listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from vswa_plugins.vllm_events import VllmEventAdapter
from vswa_plugins.vllm_events.digests import ROOT, chained, published

from tests.machines.event_sequences import (
    BLOCK,
    GLOBAL,
    LETTERS,
    MOST_LINES,
    SLIDING,
    WINDOW,
    EventMachine,
    chains,
    groups,
    letters,
)
from tests.properties import examples
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.engine.contract import EventAdapter
from vswa_plugin.errors import ProtocolError
from vswa_plugin.testing.adapter_checks import bounded


def tokens_of(chain: Sequence[str]) -> list[int]:
    return [100 * (LETTERS.index(letter) + 1) + n for letter in chain for n in range(BLOCK)]


def other_tokens(chain: Sequence[str]) -> list[int]:
    """Of blocks that are called by letters: an engine has one name for one prefix."""
    return [7000 + each for each in tokens_of(chain)]


def true_names(chain: Sequence[str]) -> list[int]:
    return [int(published(digest)) for digest in chained(ROOT, tokens_of(chain), BLOCK, 0)]


class VllmMachine(EventMachine):
    layout = CacheLayout((CacheGroup(SLIDING, WINDOW, BLOCK), CacheGroup(GLOBAL, None, BLOCK)), "vllm", "m")

    adapter: VllmEventAdapter
    prompts_wait = 0

    def new_adapter(self) -> EventAdapter:
        return VllmEventAdapter(self.layout)

    def counted(self, raw: Mapping[str, Any]) -> None:
        if raw["type"] == "AllBlocksCleared":
            self.said.clear()
            return
        held = self.said.setdefault(raw["group_idx"], {})
        step = 1 if raw["type"] == "BlockStored" else -1
        for name in raw["block_hashes"] if raw["medium"] == "GPU" else ():
            held[name] = max(0, held.get(name, 0) + step)

    def store(self, group: int, parent: int | None, names: list[int], tokens: list[int], **more: Any) -> None:
        event = {
            "type": "BlockStored",
            "block_hashes": names,
            "parent_block_hash": parent,
            "token_ids": tokens,
        }
        self.feed({**event, "block_size": BLOCK, "medium": "GPU", "group_idx": group, **more})

    @rule(group=groups, parent=st.none() | letters, chain=chains)
    def store_under_any_name(self, group: int, parent: str | None, chain: list[str]) -> None:
        names = [ord(letter) for letter in chain]
        self.store(group, parent and ord(parent), names, other_tokens(chain))

    @rule(group=groups, chain=chains, start=st.integers(0, 3), listed=st.integers(0, 4))
    def store_under_its_own_name(self, group: int, chain: list[str], start: int, listed: int) -> None:
        """A range of tokens, of which only the last blocks may be listed."""
        names, start = true_names(chain), min(start, len(chain) - 1)
        parent = names[start - 1] if start else None
        self.store(group, parent, names[max(start, len(chain) - listed) :], tokens_of(chain[start:]))

    @rule(
        group=groups,
        parent=st.none() | letters,
        chain=chains,
        listed=st.lists(letters, max_size=3),
    )
    def store_a_part_under_any_name(
        self, group: int, parent: str | None, chain: list[str], listed: list[str]
    ) -> None:
        # The blocks that are listed are the last ones; a name has the same tokens wherever it comes.
        before = chain[: max(0, len(chain) - len(listed))]
        names = [ord(letter) for letter in listed]
        self.store(group, parent and ord(parent), names, other_tokens([*before, *listed]))

    @rule(group=groups, chain=chains, salt=st.sampled_from(["salt", "other"]), lora=st.booleans())
    def store_salted(self, group: int, chain: list[str], salt: str, lora: bool) -> None:
        more: dict[str, Any] = {"lora_name": "tuned", "lora_id": 1} if lora else {}
        keys = [["tuned"] if lora else [] for _ in chain]
        keys[0] = [*keys[0], salt]
        names = [ord(letter) for letter in chain]
        self.store(group, None, names, other_tokens(chain), extra_keys=keys, **more)

    @rule(group=groups, chain=chains, own=st.booleans(), medium=st.sampled_from(["GPU", "GPU", "CPU"]))
    def remove(self, group: int, chain: list[str], own: bool, medium: str) -> None:
        names = true_names(chain) if own else [ord(letter) for letter in chain]
        self.feed({"type": "BlockRemoved", "block_hashes": names, "medium": medium, "group_idx": group})

    @rule(group=groups, letter=letters, window=st.sampled_from([None, WINDOW, 3 * WINDOW]))
    def store_with_another_window(self, group: int, letter: str, window: int | None) -> None:
        kind = {"kv_cache_spec_kind": "full_attention"}
        if window is not None:
            kind = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": window}  # type: ignore[dict-item]
        self.store(group, None, [ord(letter)], other_tokens(letter), **kind)

    @rule(chain=chains, tail=st.integers(0, BLOCK - 1), salt=st.sampled_from([None, None, "salt"]))
    def a_prompt_goes_to_the_engine(self, chain: list[str], tail: int, salt: str | None) -> None:
        tokens = [*tokens_of(chain), *range(tail)]
        bounded(lambda: self.adapter.prompt(tokens, salt, None), MOST_LINES)
        self.prompts_wait += 1
        if self.prompts_wait > 3:  # a worker does it while it has nothing else to do
            self.some_of_it_is_hashed()

    @rule()
    def some_of_it_is_hashed(self) -> None:
        bounded(self.adapter.prepare, MOST_LINES)
        self.prompts_wait = 0

    @rule()
    def no_more_events_are_there(self) -> None:
        try:
            events = bounded(self.adapter.settle, 5 * MOST_LINES)
        except ProtocolError as error:
            self.lose(str(error))
        else:
            self.take(events)

    @rule()
    def clear(self) -> None:
        self.feed({"type": "AllBlocksCleared"})

    @rule(group=groups, chain=chains)
    def another_block_size(self, group: int, chain: list[str]) -> None:
        names = [ord(letter) for letter in chain]
        self.store(group, None, names, tokens_of(chain), block_size=2 * BLOCK)

    @rule(group=groups, chain=st.permutations(LETTERS))
    def close_a_ring(self, group: int, chain: Sequence[str]) -> None:
        """Child first, then its parent below it, then blocks below both whose names must be computed."""
        first, second, third, *_ = map(ord, chain)
        self.store(group, second, [first], other_tokens(chain[0]))
        self.store(group, first, [second], other_tokens(chain[1]))
        self.store(group, first, [third], other_tokens(chain[2:4]))
        self.clear()

    @rule(got=st.integers(0, 5))
    def batches_are_lost(self, got: int) -> None:
        self.said.clear()
        self.take(self.adapter.lost(3, got))

    @rule(chain=st.permutations(LETTERS).map(lambda order: order[:3]))
    def after_a_loss_all_is_followed(self, chain: list[str]) -> None:
        self.batches_are_lost(5)
        names = true_names(chain)
        for group in (GLOBAL, SLIDING):
            self.store(group, None, names, tokens_of(chain))

        for group in (SLIDING, GLOBAL):
            assert set(names) == {name for name, _ in self.ledger.residency.frozen()[group]}
            self.feed({"type": "BlockRemoved", "block_hashes": names, "medium": "GPU", "group_idx": group})
            assert 0 == self.ledger.residency.counts()[group]


class SparseMachine(VllmMachine):
    """No group names every block: names are computed, of prompts too."""

    layout = CacheLayout((CacheGroup(SLIDING, WINDOW, BLOCK), CacheGroup(GLOBAL, 8, BLOCK)), "vllm", "m")

    @rule(chain=st.permutations(LETTERS).map(lambda order: order[:4]), group=groups)
    def what_only_a_prompt_names_is_held(self, chain: list[str], group: int) -> None:
        self.batches_are_lost(5)
        self.a_prompt_goes_to_the_engine(chain, 1, None)
        *_, above, last = true_names(chain)
        self.store(group, above, [last], tokens_of(chain[-1]))
        self.no_more_events_are_there()

        # The names of letters are none that sha256 gives: where they came first nothing is computed.
        held = {name for name, _ in self.ledger.residency.frozen()[group]}
        assert {last} == held or not self.adapter.wants_prompts


class HybridMachine(VllmMachine):
    """Blocks of two units, and entries of one inside them; a state in place of a window."""

    layout = CacheLayout(
        (CacheGroup(SLIDING, None, 2 * BLOCK, "recurrent"), CacheGroup(GLOBAL, None, 2 * BLOCK)),
        "vllm_hybrid",
        "m",
        resumption=Resumption(2 * BLOCK, BLOCK),
    )

    @rule(
        group=groups,
        chain=st.permutations(LETTERS).map(lambda order: order[:4]),
        start=st.sampled_from([0, 2]),
        listed=st.sampled_from([[], [1], [3], [1, 3]]),
    )
    def store_blocks_of_two_units(
        self, group: int, chain: list[str], start: int, listed: Sequence[int]
    ) -> None:
        names = true_names(chain)
        kept = [names[at] for at in listed if at >= start]
        parent = names[start - 1] if start else None
        self.store(group, parent, kept, tokens_of(chain[start:]), block_size=2 * BLOCK)

    @rule(group=groups, chain=chains, ahead=st.lists(st.lists(st.integers(0, 9), max_size=60), max_size=60))
    def tokens_that_no_layout_states(self, group: int, chain: list[str], ahead: list[list[int]]) -> None:
        self.store(group, None, true_names(chain), tokens_of(chain), lookahead_token_ids=ahead)

    @rule(group=groups, letter=letters, kind=st.sampled_from(["mamba", "full_attention", "a_later_kind"]))
    def another_kind(self, group: int, letter: str, kind: str) -> None:
        self.store(group, None, true_names(letter), tokens_of(letter), kv_cache_spec_kind=kind)


@pytest.mark.parametrize("machine", [VllmMachine, SparseMachine, HybridMachine])
def test_any_sequence_of_events_is_followed_or_refused(machine: type[VllmMachine]) -> None:
    run_state_machine_as_test(
        machine, settings=examples(150, stateful_step_count=25, suppress_health_check=list(HealthCheck))
    )
