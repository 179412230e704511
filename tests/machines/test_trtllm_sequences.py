"""Well-formed TensorRT-LLM events in any order: rings, repeats, lost ids, windows that come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test
from vswa_plugins.trtllm_events import TrtllmEventAdapter
from vswa_plugins.trtllm_events.hashing import block_key

from tests.machines.event_sequences import (
    BLOCK,
    GLOBAL,
    LETTERS,
    LONGEST,
    SLIDING,
    WINDOW,
    EventMachine,
    chains,
    groups,
    letters,
)
from tests.properties import examples
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import EngineHash, EventAdapter

GROUPS = (CacheGroup(SLIDING, WINDOW, BLOCK), CacheGroup(GLOBAL, None, BLOCK))
WINDOWS = {SLIDING: WINDOW, GLOBAL: LONGEST}


def tokens_of(letter: str) -> list[int]:
    return [100 * (LETTERS.index(letter) + 1) + n for n in range(BLOCK)]


def true_names(chain: Sequence[str]) -> list[int]:
    """As the engine names a chain from the root."""
    names: list[int] = []
    for letter in chain:
        names.append(block_key(tokens_of(letter), names[-1] if names else None))
    return names


class TrtllmMachine(EventMachine):
    rule_name = "trtllm_v2"

    def __init__(self) -> None:
        self.layout = CacheLayout(GROUPS, self.rule_name, "m")
        self.next_id = 0
        #: Tokens by name, of every block that an event named.
        self.tokens: dict[EngineHash, tuple[int, ...]] = {}
        super().__init__()

    def new_adapter(self) -> EventAdapter:
        return TrtllmEventAdapter(self.layout)

    def event(self, data: dict[str, Any], group: int, window: int | None = None) -> str | None:
        raw = {"event_id": self.next_id, "window_size": window or WINDOWS[group], "data": data}
        if self.rule_name == "trtllm_v2":
            raw["layer_group_id"] = group
        self.next_id += 1
        return self.feed(raw)

    def counted(self, raw: Mapping[str, Any]) -> None:
        data = raw["data"]
        # Manager V1 gives no groups: which one of the layout a window belongs to, its reader finds out.
        held = self.said.setdefault(raw.get("layer_group_id", raw["window_size"]), {})
        for block in data.get("blocks", ()):
            held[block["block_hash"]] = 1
            self.tokens[block["block_hash"]] = tuple(token["token_id"] for token in block["tokens"])
        for name in data.get("block_hashes", ()):
            held.pop(name, None)

    def said_to_be_in(self, group: int) -> set[EngineHash]:
        if self.rule_name == "trtllm_v2":
            return super().said_to_be_in(group)
        window = self.ledger.layout.group(group).window_size
        names = {name for each, held in self.said.items() if window in (None, each) for name in held}
        if self.rule_name != "trtllm_v1":
            return names
        # A sliding window may name a block otherwise than the widest one, by which name it is published.
        tokens = {self.tokens[name] for name in names}
        return {name for name, each in self.tokens.items() if each in tokens}

    @initialize(created=st.booleans())
    def start(self, created: bool) -> None:
        if created:
            for group in (SLIDING, GLOBAL):
                self.create(group, WINDOWS[group])

    @rule(group=groups, window=st.sampled_from([WINDOW, 2 * WINDOW, LONGEST]))
    def create(self, group: int, window: int) -> None:
        self.event({"type": "created", "num_blocks_per_cache_level": [9]}, group, window)

    @rule(
        group=groups,
        parent=st.none() | letters,
        chain=chains,
        size=st.integers(1, BLOCK + 1),
        level=st.integers(0, 1),
    )
    def store_under_any_name(
        self, group: int, parent: str | None, chain: list[str], size: int, level: int
    ) -> None:
        """A name stands for a letter, whatever comes before it; a part of a block has a name of its own."""
        # Other tokens than under the true names: an engine has one name for one prefix.
        blocks = [_block(ord(letter), [7000 + each for each in tokens_of(letter)], level) for letter in chain]
        last = blocks[-1]
        last["tokens"] = (last["tokens"] * 2)[:size]
        last["block_hash"] += 1000 * (BLOCK - size)
        self.event({"type": "stored", "parent_hash": parent and ord(parent), "blocks": blocks}, group)

    @rule(group=groups, chain=chains, start=st.integers(0, 3))
    def store_under_its_own_name(self, group: int, chain: list[str], start: int) -> None:
        names = true_names(chain)
        start = min(start, len(chain) - 1)
        blocks = [_block(names[n], tokens_of(chain[n]), 0) for n in range(start, len(chain))]
        parent = names[start - 1] if start else None
        self.event({"type": "stored", "parent_hash": parent, "blocks": blocks}, group)

    @rule(group=groups, chain=chains, own=st.booleans())
    def remove(self, group: int, chain: list[str], own: bool) -> None:
        names = true_names(chain) if own else [ord(letter) for letter in chain]
        self.event({"type": "removed", "block_hashes": names}, group)

    @rule(group=groups, chain=st.permutations(LETTERS))
    def close_a_ring(self, group: int, chain: Sequence[str]) -> None:
        first, second, *_ = chain
        for parent, letter in ((None, first), (first, second), (second, first)):
            self.store_under_any_name(group, parent, [letter], BLOCK, 0)
        self.remove(group, [first], own=False)

    @rule(group=groups, letter=letters, levels=st.sampled_from([(0, 1), (1, 0), (1, 1)]))
    def move(self, group: int, letter: str, levels: tuple[int, int]) -> None:
        change = {"type": "event_diff", "old_value": levels[0], "new_value": levels[1]}
        self.event({"type": "updated", "block_hash": ord(letter), "cache_level": change}, group)

    @rule(to=st.integers(0, 3) | st.just(1 << 40))
    def ids_jump(self, to: int) -> None:
        self.next_id = to

    @rule(group=groups)
    def something_unknown(self, group: int) -> None:
        assert self.event({"type": "reset"}, group) is not None

    @rule(chain=st.permutations(LETTERS).map(lambda order: order[:3]))
    def an_engine_that_starts_again_is_followed(self, chain: list[str]) -> None:
        """Whatever came before: ids from 0 on, the groups as they were declared, and nothing held."""
        self.next_id = 0
        for group in (SLIDING, GLOBAL):
            self.create(group, WINDOWS[group])
        self.store_under_its_own_name(GLOBAL, list(chain), 0)
        self.store_under_its_own_name(SLIDING, list(chain), 0)
        known = {group.group_id: group.window_size for group in self.ledger.layout.groups}
        if known != {SLIDING: WINDOW, GLOBAL: None}:
            return  # the engine has said otherwise before
        names = set(true_names(chain))

        for group in (SLIDING, GLOBAL):
            assert names == {name for name, _ in self.ledger.residency.frozen()[group]}
            self.event({"type": "removed", "block_hashes": sorted(names)}, group)
            assert 0 == self.ledger.residency.counts()[group]


def _block(name: int, tokens: list[int], level: int) -> dict[str, Any]:
    listed = [{"type": "unique_token", "token_id": each, "token_extra_id": 0} for each in tokens]
    return {
        "type": "stored_block",
        "block_hash": name,
        "tokens": listed,
        "cache_level": level,
        "priority": 35,
    }


@pytest.mark.parametrize("rule_name", ["trtllm_v2", "trtllm_v1", "trtllm_v1_contiguous"])
def test_any_sequence_of_events_is_followed_or_refused(rule_name: str) -> None:
    machine = type("Machine", (TrtllmMachine,), {"rule_name": rule_name})
    run_state_machine_as_test(
        machine, settings=examples(150, stateful_step_count=25, suppress_health_check=list(HealthCheck))
    )
