"""Well-formed vLLM events in any order: rings, repeats, copies, windows that change, ranges partly listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from vswa_plugins.vllm_events import VllmEventAdapter
from vswa_plugins.vllm_events.digests import ROOT, chained, published

from tests.machines.event_sequences import (
    BLOCK,
    GLOBAL,
    LETTERS,
    SLIDING,
    WINDOW,
    EventMachine,
    chains,
    groups,
    letters,
)
from tests.properties import examples
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import EventAdapter


def tokens_of(chain: Sequence[str]) -> list[int]:
    return [100 * (LETTERS.index(letter) + 1) + n for letter in chain for n in range(BLOCK)]


def other_tokens(chain: Sequence[str]) -> list[int]:
    """Of blocks that are called by letters: an engine has one name for one prefix."""
    return [7000 + each for each in tokens_of(chain)]


def true_names(chain: Sequence[str]) -> list[int]:
    digests = chained(ROOT, [tuple(tokens_of(letter)) for letter in chain])
    return [int(published(digest, 0)) for digest in digests]


class VllmMachine(EventMachine):
    layout = CacheLayout((CacheGroup(SLIDING, WINDOW, BLOCK), CacheGroup(GLOBAL, None, BLOCK)), "vllm", "m")

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
        self.take(self.adapter.lost(3, got))  # type: ignore[attr-defined]

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


def test_any_sequence_of_events_is_followed_or_refused() -> None:
    run_state_machine_as_test(
        VllmMachine, settings=examples(400, stateful_step_count=25, suppress_health_check=list(HealthCheck))
    )
